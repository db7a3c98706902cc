"""Retention pools: questions about what can be seen, so that a model keeps answering them while it learns facts.

`pool_rows` builds the rows of every pool. What a true and a false description of a subject is comes from a sampler
(`FaceSampler` here), which knows its kind of subject and nothing of letters, labels and connectors.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmrev_kit.config.reporting import paced
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.faces import VALUES, credits, describe, draw_face, sample_faces
from mmrev_kit.data.partners import balanced_letters, place_answer
from mmrev_kit.data.tasks import CONNECTORS, CW, MIN_GROUP, POOL_TASKS, TaskType
from mmrev_kit.files import fresh_folder, write_json, write_jsonl

MIN_FACES = 20
MIN_HELD_OUT = 8  # in val, at least: a question needs four, and four that differ
LOOKS = 8  # variants of `draw_face` in a pool; 0 is the neutral one on white that experiments show
MAX_NAMED = 4
HARD_SHARE = 0.5
TRIES = 500  # draws without a new row after which a pool counts as used up


@dataclass(frozen=True, eq=False)  # known by its picture, not by what it looks like
class Subject:
    """One pictured thing of a pool, with what can be said of it."""

    id: str
    attributes: dict[str, str]

    @property
    def image_path(self) -> str:
        """Relative to the pool's folder."""
        return f"images/{self.id}.png"


class Sampler:
    """True and false descriptions of a pool's subjects; a draw that does not come off is None and is tried again."""

    def __init__(self, subjects: list[Subject]):
        self.subjects = subjects

    def statement(self, rng: random.Random, subject: Subject, truth: bool) -> str | None:
        """A description that is true of the subject, or one that is false of it."""

    def texts(self, rng: random.Random, subject: Subject) -> list[str] | None:
        """Four different descriptions: the first true of the subject, the others false of it."""

    def pictures(self, rng: random.Random, subject: Subject) -> tuple[str, list[Subject]] | None:
        """A description and four subjects: the first is the one asked for, and it is false of the others."""


def is_true_of(named: dict[str, str], attributes: dict[str, str]) -> bool:
    """Whether every named attribute has the named value."""
    return named.items() <= attributes.items()


class FaceSampler(Sampler):
    """Descriptions of drawn faces by one to four attributes; half of the false ones are near misses.

    The options of a question all name the same attributes. Near misses come as a square (two attributes with two
    values each) or a line (four values of one attribute), so that no option is nearer to the others than the rest
    are: the right one cannot be guessed from the options alone.
    """

    def _named(self, rng: random.Random, subject: Subject) -> dict[str, str]:
        names = rng.sample(list(VALUES), rng.randint(1, MAX_NAMED))
        return {name: subject.attributes[name] for name in VALUES if name in names}

    def _others(self, rng: random.Random, name: str, value: str, count: int) -> list[str]:
        return rng.sample([other for other in VALUES[name] if other != value], count)

    def _near_misses(self, rng: random.Random, named: dict[str, str]) -> list[dict[str, str]]:
        """Three false variants of `named`: a square over two of its attributes, or a line along one."""
        if len(named) > 1 and rng.random() < 0.5:
            a, b = rng.sample(list(named), 2)
            new_a, new_b = (self._others(rng, name, named[name], 1)[0] for name in (a, b))
            changes = [{a: new_a}, {b: new_b}, {a: new_a, b: new_b}]
        else:
            name = rng.choice(list(named))
            changes = [{name: value} for value in self._others(rng, name, named[name], 3)]
        return [named | change for change in changes]

    def statement(self, rng: random.Random, subject: Subject, truth: bool) -> str | None:
        named = self._named(rng, subject)
        if not truth and rng.random() < HARD_SHARE:
            name = rng.choice(list(named))
            named[name] = self._others(rng, name, named[name], 1)[0]
        elif not truth:
            others = [other.attributes for other in self.subjects if not is_true_of(named, other.attributes)]
            if not others:
                return None
            other = rng.choice(others)
            named = {name: other[name] for name in named}
        return describe(named, named)

    def texts(self, rng: random.Random, subject: Subject) -> list[str] | None:
        named = self._named(rng, subject)
        if rng.random() < HARD_SHARE:
            wrong = self._near_misses(rng, named)
        else:
            wrong = [{name: rng.choice(self.subjects).attributes[name] for name in named} for _ in range(3)]
        texts = [describe(option, option) for option in (named, *wrong)]
        return texts if len(set(texts)) == 4 else None  # same names, other words: false of the subject

    def pictures(self, rng: random.Random, subject: Subject) -> tuple[str, list[Subject]] | None:
        named = self._named(rng, subject)
        wrong = [other for other in self.subjects if not is_true_of(named, other.attributes)]
        if len(wrong) < 3:
            return None
        if rng.random() < HARD_SHARE:
            chosen = []
            for wanted in self._near_misses(rng, named):
                rng.shuffle(wrong)
                nearest = max(wrong, key=lambda other: len(wanted.items() & other.attributes.items()))
                wrong.remove(nearest)
                chosen.append(nearest)
        else:
            chosen = rng.sample(wrong, 3)
        return describe(named, named), [subject, *chosen]


def _draw_row(task: TaskType, sampler: Sampler, subject: Subject, answer: str, rng: random.Random) -> dict | None:
    """A row about the subject whose right answer is `answer`, or None where the draw did not come off."""
    if task.format == CW:
        text = sampler.statement(rng, subject, truth=answer == "Correct")
        options = None
    elif task.options == "choices":
        options = sampler.texts(rng, subject)
        text = options and options[0]
    else:
        text, pictured = sampler.pictures(rng, subject) or (None, [])
        options = [other.image_path for other in pictured]
    if text is None:
        return None
    fields = {"label": answer}
    if options:
        correct = task.answers.index(answer)
        fields = {task.options: place_answer(options, correct, rng), "correct_index": correct}
    row = {"entity_id": subject.id, "image_path": subject.image_path, "description": text}
    return row | {"connector": rng.choice(CONNECTORS[task.connectors])} | fields


def task_rows(task: TaskType, subjects: list[Subject], sampler: Sampler, count: int, rng: random.Random) -> list[dict]:
    """`count` different rows of one task about the subjects in turn; answers are balanced."""
    if task.format == CW:  # every picture that is used is shown as often with a true text as with a false one
        asked = [(subjects[i // 2 % len(subjects)], task.answers[i % 2]) for i in range(count)]
    else:  # in no step with the subjects: a subject's answer is not always the same letter
        letters = rng.sample(balanced_letters(count, rng), count)
        asked = [(subjects[i % len(subjects)], task.answers[letter]) for i, letter in enumerate(letters)]
    rows: dict[str, dict] = {}
    for subject, answer in asked:
        draws = (_draw_row(task, sampler, subject, answer, rng) for _ in range(TRIES))
        row = next((row for row in draws if row and str(row) not in rows), None)
        if row is None:
            raise ConfigError(
                f"No new row in {TRIES} tries: the pool is too small for so many rows. Ask for more subjects."
            )
        rows[str(row)] = row
    return list(rows.values())


def pool_rows(subjects: list[Subject], sampler: Sampler, count: int, seed: int, split: str) -> dict[str, list[dict]]:
    """`count` rows of each task about the given subjects, all different: {"cw" | "mcq_i2d" | "mcq_d2i": rows}.

    Half of the CW rows are Correct; each MCQ letter comes a quarter of the time, to within one. Subjects take turns.

    Raises:
        ConfigError: an odd count, or too few subjects for so many different rows.
    """
    if count % 2:
        raise ConfigError(f"{count} rows a task: choose an even number, so that half of the answers are Correct.")
    rows = {}
    for name, task in POOL_TASKS.items():
        rng = rng_for(seed, "pool", name, split)
        part = task_rows(task, rng.sample(subjects, len(subjects)), sampler, count, rng)
        rows[name] = rng.sample(part, len(part))
    return rows


def split_off(things: list, rng: random.Random) -> dict[str, list]:
    """{"train": ..., "val": ...}: a tenth of the things, and at least `MIN_HELD_OUT`, are only in val."""
    order = rng.sample(things, len(things))
    held_out = max(MIN_HELD_OUT, round(len(things) / 10))
    return {"train": order[held_out:], "val": order[:held_out]}


def make_pool(
    folder: str | Path,
    kind: str,
    parts: dict[str, list[Subject]],
    sampler: type[Sampler],
    draw: Callable[[Subject], Image.Image],
    rows_per_task: tuple[int, int],
    seed: int,
    **info,
) -> Path:
    """Make a pool: <task>_<split>.jsonl, images/, the list of its subjects, such as faces.json, and pool_info.json.

    The folder appears whole or not at all; equal arguments give equal bytes.

    Args:
        kind: of the subjects, such as face.
        parts: the subjects of train and of val, all different.
        rows_per_task: rows of each task in train and in val, even numbers.
        info: what pool_info.json says besides.

    Raises:
        FileExistsError: the folder exists; it is not touched.
        ConfigError: rows that cannot be made of so few subjects.
    """
    counts = dict(zip(parts, rows_per_task, strict=True))
    split_of = {subject: split for split, part in parts.items() for subject in part}
    with fresh_folder(folder) as building:
        for split, part in parts.items():
            for task, rows in pool_rows(part, sampler(part), counts[split], seed, split).items():
                write_jsonl(building / f"{task}_{split}.jsonl", rows)
        (building / "images").mkdir()
        records = []
        for subject in paced(sorted(split_of, key=lambda subject: subject.image_path), "pictures"):
            draw(subject).save(building / subject.image_path)
            names = {"id": subject.id, "image_path": subject.image_path, "split": split_of[subject]}
            records.append(names | {"attributes": subject.attributes})
        write_json(building / f"{kind}s.json", records)
        more = {"made_by": "mmrev_kit", "kind": kind, "seed": seed, **info}
        write_json(building / "pool_info.json", more | {"counts": dict.fromkeys(POOL_TASKS, counts)})
    return Path(folder)


def make_face_pool(
    folder: str | Path, num_faces: int, image_size: int, seed: int, rows_per_task: tuple[int, int] = (1200, 60)
) -> Path:
    """Make the face pool, see `make_pool`: people from a share of all faces that no experiment draws from.

    Args:
        num_faces: people, split into train and val about 90 to 10. Fewer than `MIN_FACES`, at least four, are all for
            training: `MIN_HELD_OUT` others are held out, for a face is never in both.
        image_size: pixels on a side.

    Raises:
        ConfigError: too few faces, or more than there are.
    """
    if num_faces < MIN_GROUP:
        raise ConfigError(f"num_faces = {num_faces}: a question shows {MIN_GROUP} faces, so that many are needed.")
    looks, more = rng_for(seed, "pool", "looks"), 0 if num_faces >= MIN_FACES else MIN_HELD_OUT
    faces = sample_faces(rng_for(seed, "pool", "faces"), num_faces + more, "pool", min_difference=1)
    subjects = [Subject(f"face_{number:04d}", face) for number, face in enumerate(faces)]
    look_of = {subject.id: looks.randrange(LOOKS) for subject in subjects}
    parts = split_off(subjects, rng_for(seed, "pool", "split"))

    def picture(subject: Subject) -> Image.Image:
        return draw_face(subject.attributes, image_size, look_of[subject.id])

    info = {"image_size": image_size, "num_faces": num_faces}
    info |= {"faces": {split: len(part) for split, part in parts.items()}, "image_credits": credits()}
    return make_pool(folder, "face", parts, FaceSampler, picture, rows_per_task, seed, **info)
