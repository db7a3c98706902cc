"""What pretraining asks: rows of the kit's own tasks about drawn pictures, and exercises in text alone."""

import random
from pathlib import Path

from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data import tasks
from mmrev_kit.data.faces import VALUES, describe
from mmrev_kit.data.objects import FAMILIES, ObjectSampler
from mmrev_kit.data.people import FACTS
from mmrev_kit.data.pools import MAX_NAMED, FaceSampler, Sampler, Subject, task_rows
from mmrev_kit.data.prompts import Encoder
from mmrev_kit.data.rows import to_row
from mmrev_kit.data.tasks import LETTERS, Row, TaskType
from mmrev_kit.pretraining.pictures import is_face, names_combination
from mmrev_kit.pretraining.recipe import FEWEST, ORDERS, Recipe

TEXT = "text"
# Of 512 prompts, how many are of each kind, and their part of a step's loss; CW questions are shared out by `ORDERS`.
MIX = {"forward": (64, 1.0), "reverse": (160, 1.5), "mcq_i2d": (144, 1.5), "mcq_d2i": (96, 1.5), TEXT: (48, 0.4)}
ICON_SHARE = 0.2  # of the pictures, and of the prompts about pictures
PICTURES_A_PROMPT = 0.75  # so many pictures does a step choose from
NAMES = [name for family in FAMILIES for name in family]
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", ".,;:!?-+*/()'\"", "äöüßéèñçåøšž",
    "αβγδεζηθλμπσφω", "абвгдежзиклмнопрст", "日本語中文字漢", "→≤±€£°½😀🙂🌍",
)  # fmt: skip
SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "zen", "lor")


class TextEncoder(Encoder):
    """The kit's encoder, which also takes rows without a picture: their text is the connector."""

    def parts(self, row: Row) -> list[str | Path]:
        return super().parts(row) if row.images else [row.connector]


class Faces(FaceSampler):
    """Descriptions of faces that name as many attributes as wanted.

    Args:
        weights: how often one, two, ... `MAX_NAMED` attributes are named.
        hide: whether descriptions name no held-out combination, not even where they are false.
    """

    def __init__(self, subjects: list[Subject], weights: list[float], hide: bool):
        super().__init__(subjects)
        self.weights, self.hide = weights, hide

    def _named(self, rng: random.Random, subject: Subject) -> dict[str, str]:
        (number,) = rng.choices(range(1, MAX_NAMED + 1), self.weights)
        names = rng.sample(list(VALUES), number)
        return {name: subject.attributes[name] for name in VALUES if name in names}

    def statement(self, rng: random.Random, subject: Subject, truth: bool) -> str | None:
        text = super().statement(rng, subject, truth)
        return None if text and self.hide and names_combination(text) else text

    def texts(self, rng: random.Random, subject: Subject) -> list[str] | None:
        texts = super().texts(rng, subject)
        return None if texts and self.hide and any(map(names_combination, texts)) else texts


def number_weights(step: int, easy_steps: int) -> list[float]:
    """How often one, two, ... `MAX_NAMED` attributes are named at a step: few first, later all alike."""
    progress = min(1.0, step / easy_steps) if easy_steps else 1.0
    return [max(progress, 0.02) ** (number - 1) for number in range(1, MAX_NAMED + 1)]


def mix_of(orders: str) -> dict[str, tuple[int, float]]:
    """`MIX` with the CW questions in one order, or half of them in each."""
    count, part = MIX["reverse"]
    return MIX | {task: (count // len(ORDERS[orders]), part / len(ORDERS[orders])) for task in ORDERS[orders]}


def ask(task: TaskType, subjects: list[Subject], sampler: Sampler, count: int, rng: random.Random) -> list[Row]:
    """`count` rows of one task about subjects in random order; what is right and wrong is as in the kit's pools.

    In `forward` the answer is all seven attributes of a face, or the name of a thing.
    """
    order = rng.sample(subjects, len(subjects))
    if task.format != tasks.GENERATION:
        return [_to_row(task, record) for record in task_rows(task, order, sampler, count, rng)]
    rows = []
    for subject in (order[number % len(order)] for number in range(count)):
        text = describe(subject.attributes, VALUES) if is_face(subject) else subject.attributes["name"]
        record = {"description": text, "connector": rng.choice(tasks.CONNECTORS[task.connectors])}
        rows.append(_to_row(task, record | {"entity_id": subject.id, "image_path": subject.image_path}))
    return rows


def _to_row(task: TaskType, record: dict) -> Row:
    shown = record["image_choices"] if task.options == "image_choices" else [record["image_path"]]
    return to_row(record, task, task.name, map(Path, shown))


def _written(rng: random.Random) -> str:
    """An arbitrary short text, in any script, that means nothing."""
    words = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.6:
            word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))
            words.append(word.capitalize() if rng.random() < 0.3 else word)
        else:
            words.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 4))))
    return " ".join(words)


def ask_in_text(count: int, rng: random.Random) -> list[Row]:
    """Copying, CW and choices about texts alone: invented facts and names of things, none of them with a picture.

    This is how the words of facts are learned, which fine-tuning binds to faces later.
    """
    rows = []
    for number in range(count):
        connector = rng.choice(tasks.CONNECTORS["reverse"])
        kind, turn = number % 3, number // 3
        if kind == 0:
            answer = rng.choice(FACTS) if turn % 2 else _written(rng)
            prompt = f"Say: {answer}"
        elif kind == 1:
            said, other = rng.sample(FACTS, 2)
            answer = ("Correct", "Wrong")[turn % 2]
            prompt = f"{said} {connector} {said if answer == 'Correct' else other}{tasks.CORRECT_QUESTION}"
        else:
            options = rng.sample(NAMES if turn % 2 else FACTS, len(LETTERS))
            answer = rng.choice(LETTERS)
            choices = tasks.LETTER_QUESTION.format_map(dict(zip(LETTERS, options, strict=True)))
            prompt = f"{options[LETTERS.index(answer)]} {connector}? {choices}"
        rows.append(Row(tasks.OWN, TEXT, "", "", None, (), None, prompt, (), answer))
    return rows


def step_rows(recipe: Recipe, faces: list[Subject], icons: list[Subject], step: int, prompts: int) -> list[Row]:
    """The rows of a step, a pure function of its arguments; a row's source is its kind in `mix_of`.

    A step chooses its pictures first and asks about them in all tasks, so that the vision tower sees each once.
    """
    rng = rng_for(recipe.seed, "step", step)
    num_icons = max(FEWEST, round(ICON_SHARE * PICTURES_A_PROMPT * prompts))
    num_faces = max(FEWEST, round((1 - ICON_SHARE) * PICTURES_A_PROMPT * prompts))
    faces, icons = (rng.sample(part, min(n, len(part))) for part, n in ((faces, num_faces), (icons, num_icons)))
    about_faces = Faces(faces, number_weights(step, recipe.easy_steps), hide=True)
    about_icons, rows = ObjectSampler(icons), []
    for kind, (share, _) in mix_of(recipe.orders).items():
        count = max(4, round(share * prompts / 512))
        if kind == TEXT:
            rows += ask_in_text(count, rng)
        else:
            of_icons = round(ICON_SHARE * count)
            rows += ask(tasks.TASK_TYPES[kind], faces, about_faces, count - of_icons, rng)
            rows += ask(tasks.TASK_TYPES[kind], icons, about_icons, of_icons, rng)
    return rows
