"""The tasks, each described once in `TASK_TYPES`, the row that an example becomes, and the prompt of a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter

from mmrev_kit.data.assets import read_asset

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image → description", "description → image"
GENERATION, CORRECT_OR_WRONG, CHOICE = "generation", "CW", "choice"
LETTERS = "ABCD"
SPLITS = ("train", "val", "test")
CONNECTORS: dict[str, list[str]] = read_asset("connectors")  # {"forward" | "reverse": 20 connectors}
CORRECT_QUESTION = ", correct or wrong? Only answer Correct or Wrong."
LETTER_QUESTION = " ".join(f"{letter}. {{{letter}}}" for letter in LETTERS) + " Only answer A, B, C, or D."


@dataclass(frozen=True)
class TaskType:
    """One task: what is asked, and how an answer is read.

    Attributes:
        name: as in file names and configurations.
        title: as in tables and figures.
        prompt: the user turn in reading order, with {image}, {description}, {connector} and the options {A} to {D}.
        fields: what a record must have, in the order in which faults are told.
        answers: what can be answered; none where the answer is a description.
        splits: those that an experiment has of it.
        pool: its name in a retention pool's files and sources, such as face_cw; None: no pool has it.
    """

    name: str
    title: str
    direction: str  # IMAGE_TO_TEXT or TEXT_TO_IMAGE
    format: str  # GENERATION, CORRECT_OR_WRONG or CHOICE
    prompt: str
    fields: tuple[str, ...]
    answers: tuple[str, ...] = ()
    splits: tuple[str, ...] = SPLITS
    pool: str | None = None

    @property
    def long_title(self) -> str:
        """The title for a sentence, in which "forward" alone would say too little."""
        return f"{self.title} generation" if self.format == GENERATION else self.title

    @property
    def chance(self) -> float:
        """The accuracy of a guess; 0 for free text, which is right by no chance worth a test."""
        return 1 / len(self.answers) if self.answers else 0.0

    @property
    def connectors(self) -> str:
        """Which of the `CONNECTORS` its rows use."""
        return "forward" if self.direction == IMAGE_TO_TEXT else "reverse"

    @property
    def options(self) -> str | None:
        """The field that holds four options: choices (texts) or image_choices (paths)."""
        return next((name for name in self.fields if name.endswith("choices")), None)

    @property
    def known_without_text(self) -> bool:
        """Whether the right answer can still be known from a prompt without description and connector."""
        return "{description}" not in self.prompt

    @cached_property
    def textless_prompt(self) -> str:
        """The prompt without description and connector; options and instruction stay."""
        rest = self.prompt.replace("{description} ", "").replace(" {description}", "")
        return rest.replace("{connector}?", "{connector}").replace("{connector} ", "").replace(" {connector}", "")


TASK_TYPES = {
    task.name: task
    for task in (
        TaskType(
            name="forward",
            title="forward",
            direction=IMAGE_TO_TEXT,
            format=GENERATION,
            prompt="{image} {connector}",
            fields=("image_path", "description", "connector"),
        ),
        TaskType(
            name="reverse",
            title="CW",
            direction=TEXT_TO_IMAGE,
            format=CORRECT_OR_WRONG,
            prompt="{description} {connector} {image}" + CORRECT_QUESTION,
            fields=("image_path", "description", "connector", "label"),
            answers=("Correct", "Wrong"),
            pool="cw",
        ),
        TaskType(
            name="mcq_i2d",
            title="I2D",
            direction=IMAGE_TO_TEXT,
            format=CHOICE,
            prompt="{image} {connector}? " + LETTER_QUESTION,
            fields=("image_path", "connector", "choices", "correct_index"),
            answers=tuple(LETTERS),
            splits=("test",),
            pool="mcq_i2d",
        ),
        TaskType(
            name="mcq_d2i",
            title="D2I",
            direction=TEXT_TO_IMAGE,
            format=CHOICE,
            prompt="{description} {connector}? " + LETTER_QUESTION,
            fields=("description", "connector", "image_choices", "correct_index"),
            answers=tuple(LETTERS),
            splits=("test",),
            pool="mcq_d2i",
        ),
    )
}
# The files of an experiment, without their ending, and of a retention pool: {"forward_train": its task, ...}.
EXPERIMENT_FILES = {f"{task.name}_{split}": task for task in TASK_TYPES.values() for split in task.splits}
POOL_TASKS = {task.pool: task for task in TASK_TYPES.values() if task.pool}
MIN_GROUP = 4  # a question has four options
GROUPS = ("main", "control")
OWN = "own"  # the task of a user's question, whose text is the row's connector
IMAGE_MARK = "[image]"  # where the picture goes in it


@dataclass(frozen=True)
class Row:
    """One example. `images` are absolute paths, one, or four in mcq_d2i; `answer` is the text to be produced."""

    task: str  # a name of `TASK_TYPES`, or OWN
    source: str  # what its loss is reported under, e.g. forward, reverse, face_cw
    where: str  # file:line
    entity_id: str
    group: str | None
    images: tuple[Path, ...]
    description: str | None
    connector: str
    choices: tuple[str, ...]
    answer: str

    @property
    def type(self) -> TaskType:
        return TASK_TYPES[self.task]


def build_prompt(row: Row, with_text: bool = True) -> list[str | Path]:
    """The user turn of a row: texts and image paths in reading order, never two texts in a row.

    In `reverse` and `mcq_d2i` the description comes first, so that the model must go from text to image.

    Args:
        with_text: False leaves out description and connector; options and instruction stay.
    """
    if row.task == OWN:
        before, mark, after = row.connector.partition(IMAGE_MARK)
        texts = (before, after) if mark else ("", f" {row.connector}")
        return [part for part in (texts[0], row.images[0], texts[1]) if part]
    values = {"image": row.images[0], "description": row.description, "connector": row.connector}
    values |= zip(LETTERS, row.choices if row.type.options == "choices" else row.images, strict=False)
    parts: list[str | Path] = []
    for text, name, _, _ in Formatter().parse(row.type.prompt if with_text else row.type.textless_prompt):
        for part in (text, values[name] if name else ""):
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part:
                parts.append(part)
    return parts
