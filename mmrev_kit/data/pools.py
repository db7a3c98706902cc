"""Retention pools: questions about what can be seen, so that a model keeps answering them while it learns facts.

`pool_rows` builds the rows of every pool. What a true and a false description of a subject is comes from a sampler
(`FaceSampler` here), which knows its kind of subject and nothing of letters, labels and connectors.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.faces import VALUES, credits, describe, draw_face, sample_faces
from mmrev_kit.data.partners import FORWARD_CONNECTORS, REVERSE_CONNECTORS, balanced_letters, place_answer
from mmrev_kit.files import fresh_folder, write_json, write_jsonl

POOL_TASKS = ("cw", "mcq_i2d", "mcq_d2i")
MIN_FACES = 20
MIN_SUBJECTS = 8  # in val, at least: a question needs four, and four that differ
LOOKS = 8  # variants of `draw_face` in a pool; 0 is the neutral one on white that experiments show
MAX_NAMED = 4
HARD_SHARE = 0.5
TRIES = 500  # draws without a new row after which a pool counts as used up


@dataclass(frozen=True, eq=False)  # known by its picture, not by what it looks like
class Subject:
    """One pictured thing of a pool, with what can be said of it."""

    id: str
    image_path: str
    attributes: dict[str, str]


class Sampler(Protocol):
    """True and false descriptions of a pool's subjects; a draw that does not come off is None and is tried again."""

    def statement(self, rng: random.Random, subject: Subject, truth: bool) -> str | None:
        """A description that is true of the subject, or one that is false of it."""

    def texts(self, rng: random.Random, subject: Subject) -> list[str] | None:
        """Four different descriptions: the first true of the subject, the others false of it."""

    def pictures(self, rng: random.Random, subject: Subject) -> tuple[str, list[Subject]] | None:
        """A description and four subjects: the first is the one asked for, and it is false of the others."""


def is_true_of(named: dict[str, str], attributes: dict[str, str]) -> bool:
    """Whether every named attribute has the named value."""
    return all(attributes[name] == value for name, value in named.items())


def _matches(named: dict[str, str], attributes: dict[str, str]) -> int:
    return sum(attributes[name] == value for name, value in named.items())


class FaceSampler:
    """Descriptions of drawn faces by one to four attributes; half of the false ones are near misses.

    The options of a question all name the same attributes. Near misses come as a square (two attributes with two
    values each) or a line (four values of one attribute), so that no option is nearer to the others than the rest
    are: the right one cannot be guessed from the options alone.
    """

    def __init__(self, subjects: list[Subject]):
        self.subjects = subjects

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
        found = [describe(option, option) for option in (named, *wrong)]
        return found if len(set(found)) == 4 else None  # same names, other words: false of the subject

    def pictures(self, rng: random.Random, subject: Subject) -> tuple[str, list[Subject]] | None:
        named = self._named(rng, subject)
        wrong = [other for other in self.subjects if not is_true_of(named, other.attributes)]
        if len(wrong) < 3:
            return None
        if rng.random() < HARD_SHARE:
            chosen = []
            for wanted in self._near_misses(rng, named):
                rng.shuffle(wrong)
                nearest = max(wrong, key=lambda other: _matches(wanted, other.attributes))
                wrong.remove(nearest)
                chosen.append(nearest)
        else:
            chosen = rng.sample(wrong, 3)
        return describe(named, named), [subject, *chosen]


def _row(subject: Subject, description: str, connector: str, **fields) -> dict:
    common = {"entity_id": subject.id, "image_path": subject.image_path, "description": description}
    return {**common, "connector": connector, **fields}


def _distinct(draw: Callable[[], dict | None], seen: set) -> dict:
    """The first row of `draw` that is none of `seen`."""
    for _ in range(TRIES):
        row = draw()
        key = row and tuple(map(str, row.values()))
        if row and key not in seen:
            seen.add(key)
            return row
    raise ValueError(f"No new row in {TRIES} tries: the pool is too small for so many rows. Ask for more subjects.")


def _cw_rows(subjects: list[Subject], sampler: Sampler, count: int, rng: random.Random) -> list[dict]:
    """Every picture that is used is shown as often with a true text as with a false one."""
    rows, seen = [], set()
    for i in range(count):
        subject, truth = subjects[i // 2 % len(subjects)], i % 2 == 0

        def draw(subject=subject, truth=truth):
            text = sampler.statement(rng, subject, truth)
            label = "Correct" if truth else "Wrong"
            return text and _row(subject, text, rng.choice(REVERSE_CONNECTORS), label=label)

        rows.append(_distinct(draw, seen))
    return rows


def _shuffled_letters(count: int, rng: random.Random) -> list[int]:
    """Balanced, and in no step with the turns of the subjects: a subject's answer is not always the same letter."""
    return rng.sample(balanced_letters(count, rng), count)


def _i2d_rows(subjects: list[Subject], sampler: Sampler, count: int, rng: random.Random) -> list[dict]:
    rows, seen = [], set()
    for i, correct in enumerate(_shuffled_letters(count, rng)):
        subject = subjects[i % len(subjects)]

        def draw(subject=subject, correct=correct):
            texts = sampler.texts(rng, subject)
            if texts is None:
                return None
            choices = place_answer(texts, correct, rng)
            word = rng.choice(FORWARD_CONNECTORS)
            return _row(subject, texts[0], word, choices=choices, correct_index=correct)

        rows.append(_distinct(draw, seen))
    return rows


def _d2i_rows(subjects: list[Subject], sampler: Sampler, count: int, rng: random.Random) -> list[dict]:
    rows, seen = [], set()
    for i, correct in enumerate(_shuffled_letters(count, rng)):
        subject = subjects[i % len(subjects)]

        def draw(subject=subject, correct=correct):
            found = sampler.pictures(rng, subject)
            if found is None:
                return None
            text, people = found
            images = place_answer([person.image_path for person in people], correct, rng)
            word = rng.choice(REVERSE_CONNECTORS)
            return _row(subject, text, word, image_choices=images, correct_index=correct)

        rows.append(_distinct(draw, seen))
    return rows


def pool_rows(subjects: list[Subject], sampler: Sampler, count: int, seed: int, split: str) -> dict[str, list[dict]]:
    """`count` rows of each task about the given subjects, all different: {"cw" | "mcq_i2d" | "mcq_d2i": rows}.

    Half of the CW rows are Correct; each MCQ letter comes a quarter of the time, to within one. Subjects take turns.

    Raises:
        ValueError: an odd count, or too few subjects for so many different rows.
    """
    if count % 2:
        raise ValueError(f"{count} rows a task: choose an even number, so that half of the answers are Correct.")
    builders = dict(zip(POOL_TASKS, (_cw_rows, _i2d_rows, _d2i_rows), strict=True))
    rows = {}
    for task, build in builders.items():
        rng = rng_for(seed, "pool", task, split)
        order = rng.sample(subjects, len(subjects))
        part = build(order, sampler, count, rng)
        rows[task] = rng.sample(part, len(part))
    return rows


def split_subjects(subjects: list[Subject], rng: random.Random) -> dict[str, list[Subject]]:
    """{"train": ..., "val": ...}: a tenth of the subjects, and at least `MIN_SUBJECTS`, are only in val."""
    order = rng.sample(subjects, len(subjects))
    held_out = max(MIN_SUBJECTS, round(len(subjects) / 10))
    return {"train": order[held_out:], "val": order[:held_out]}


def write_pool(
    building: Path,
    parts: dict[str, list[Subject]],
    rows: dict[str, dict[str, list[dict]]],
    draw: Callable[[Subject], Image.Image],
    **info,
) -> None:
    """Write a pool: {task}_{split}.jsonl, images/, the list of its subjects and pool_info.json.

    Args:
        building: an empty folder (see `fresh_folder`).
        parts: the subjects of each split, all different.
        rows: split -> task -> rows (see `pool_rows`).
        info: what pool_info.json says; its `kind`, say face, names the list: faces.json.
    """
    for split, tasks in rows.items():
        for task, part in tasks.items():
            write_jsonl(building / f"{task}_{split}.jsonl", part)
    split_of = {subject: split for split, part in parts.items() for subject in part}
    subjects = sorted(split_of, key=lambda subject: subject.image_path)
    (building / "images").mkdir()
    for subject in subjects:
        draw(subject).save(building / subject.image_path)
    records = [
        {"id": s.id, "image_path": s.image_path, "split": split_of[s], "attributes": s.attributes} for s in subjects
    ]
    write_json(building / f"{info['kind']}s.json", records)
    counts = {task: {split: len(tasks[task]) for split, tasks in rows.items()} for task in POOL_TASKS}
    write_json(building / "pool_info.json", {"made_by": "mmrev_kit", **info, "counts": counts})


def make_face_pool(
    folder: str | Path, num_faces: int, image_size: int, seed: int, rows_per_task: tuple[int, int] = (1200, 60)
) -> Path:
    """Make the face pool: cw, mcq_i2d and mcq_d2i rows for train and val, images/, faces.json, pool_info.json.

    The people are drawn from a share of all faces that no experiment draws from. faces.json holds id, image_path,
    split and attributes of each. The folder appears whole or not at all; equal arguments give equal bytes.

    Args:
        folder: where to make it.
        num_faces: people, split into train and val about 90 to 10; at least 20.
        image_size: pixels on a side.
        seed: the pool's seed.
        rows_per_task: rows of each task in train and in val, even numbers.

    Raises:
        FileExistsError: the folder exists; it is not touched.
        ValueError: too few faces, more than there are, or rows that cannot be made of them.
    """
    if num_faces < MIN_FACES:
        raise ValueError(f"num_faces = {num_faces}: a face pool needs {MIN_FACES} faces or more.")
    looks = rng_for(seed, "pool", "looks")
    faces = sample_faces(rng_for(seed, "pool", "faces"), num_faces, "pool", min_difference=1)
    named = [(f"face_{i:04d}", face) for i, face in enumerate(faces)]
    subjects = [Subject(name, f"images/{name}.png", face) for name, face in named]
    look_of = {subject.id: looks.randrange(LOOKS) for subject in subjects}
    parts = split_subjects(subjects, rng_for(seed, "pool", "split"))
    rows = {
        split: pool_rows(part, FaceSampler(part), count, seed, split)
        for (split, part), count in zip(parts.items(), rows_per_task, strict=True)
    }
    with fresh_folder(folder) as building:
        write_pool(
            building,
            parts,
            rows,
            lambda subject: draw_face(subject.attributes, image_size, look_of[subject.id]),
            kind="face",
            seed=seed,
            image_size=image_size,
            num_faces=num_faces,
            faces={split: len(part) for split, part in parts.items()},
            image_credits=credits(),
        )
    return Path(folder)
