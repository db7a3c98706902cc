"""The tasks, each described once in `TASK_TYPES`, the row that an example becomes, and the prompt of a row."""

import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from mmrev_kit.data.assets import read_asset

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image → description", "description → image"
GENERATION, CW, CHOICE = "generation", "CW", "choice"
LETTERS = "ABCD"
SPLITS = ("train", "val", "test")
CONNECTORS: dict[str, list[str]] = read_asset("connectors")  # {"forward" | "reverse": 20 connectors}
CORRECT_QUESTION = ", correct or wrong? Only answer Correct or Wrong."
LETTER_QUESTION = "A. {A} B. {B} C. {C} D. {D} Only answer A, B, C, or D."
ANSWERS = {GENERATION: (), CW: ("Correct", "Wrong"), CHOICE: tuple(LETTERS)}


@dataclass(frozen=True)
class TaskType:
    """One task: what is asked, and how an answer is read.

    Attributes:
        name: as in file names and configurations.
        title: as in tables and figures.
        direction: `IMAGE_TO_TEXT` or `TEXT_TO_IMAGE`.
        format: `GENERATION` (the answer is the description), `CW` or `CHOICE` (a letter).
        prompt: the user turn in reading order, with {image}, {description}, {connector} and the options {A} to {D}.
        pool: its name in a retention pool's files and sources, such as face_cw; None: no pool has it.
    """

    name: str
    title: str
    direction: str
    format: str
    prompt: str
    pool: str | None = None

    @property
    def long_title(self) -> str:
        """The title for a sentence, in which "forward" alone would say too little."""
        return f"{self.title} generation" if self.format == GENERATION else self.title

    @property
    def answers(self) -> tuple[str, ...]:
        """What can be answered; nothing fixed where the answer is a description."""
        return ANSWERS[self.format]

    @property
    def chance(self) -> float:
        """The accuracy of a guess; 0 for free text, which is right by no chance worth a test."""
        return 1 / len(self.answers) if self.answers else 0.0

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that an experiment has of it: questions with options are for testing only."""
        return ("test",) if self.format == CHOICE else SPLITS

    @property
    def connectors(self) -> str:
        """Which of the `CONNECTORS` its rows use."""
        return "forward" if self.direction == IMAGE_TO_TEXT else "reverse"

    @property
    def options(self) -> str | None:
        """The field that holds four options: choices (texts) or image_choices (paths); None: there is none."""
        texts = self.direction == IMAGE_TO_TEXT
        return ("choices" if texts else "image_choices") if self.format == CHOICE else None

    @property
    def fields(self) -> tuple[str, ...]:
        """What a record must have, in the order in which faults are told."""
        if self.format == CHOICE:
            shown = "image_path" if self.options == "choices" else "description"
            return (shown, "connector", self.options, "correct_index")
        label = ("label",) if self.format == CW else ()
        return ("image_path", "description", "connector", *label)

    @property
    def textless_prompt(self) -> str:
        """The prompt without description and connector; options and instruction stay."""
        return re.sub(r"\{description\} |\{connector\}\?? | \{(description|connector)\}\??", "", self.prompt)

    @property
    def known_without_text(self) -> bool:
        """Whether the right answer can still be known from the textless prompt."""
        return "{description}" not in self.prompt


TASK_TYPES = {
    task.name: task
    for task in (
        TaskType("forward", "forward", IMAGE_TO_TEXT, GENERATION, "{image} {connector}"),
        TaskType("reverse", "CW", TEXT_TO_IMAGE, CW, "{description} {connector} {image}" + CORRECT_QUESTION, "cw"),
        TaskType(
            "cw_image", "CW image first", IMAGE_TO_TEXT, CW, "{image} {connector} {description}" + CORRECT_QUESTION
        ),
        TaskType("mcq_i2d", "I2D", IMAGE_TO_TEXT, CHOICE, "{image} {connector}? " + LETTER_QUESTION, "mcq_i2d"),
        TaskType("mcq_d2i", "D2I", TEXT_TO_IMAGE, CHOICE, "{description} {connector}? " + LETTER_QUESTION, "mcq_d2i"),
    )
}
# A description is answered with itself, and no picture is there: neither direction, and no file's or test's.
IDENTITY = TaskType("identity", "identity", "description → description", GENERATION, "{description} {connector}")
# The files of an experiment, without their ending, and of a retention pool: {"forward_train": its task, ...}.
EXPERIMENT_FILES = {f"{task.name}_{split}": task for task in TASK_TYPES.values() for split in task.splits}
POOL_TASKS = {task.pool: task for task in TASK_TYPES.values() if task.pool}
MIN_GROUP = 4  # a question has four options
FAIR_GROUP = 10  # from here on there are enough partners that no wrong option was called wrong in training
GROUPS = ("main", "bridge", "control")  # bridge: see data.share_both
OWN = "own"  # the task of a user's question, whose text is the row's connector
IMAGE_MARK = "[image]"  # where the picture goes in it


@dataclass(frozen=True)
class Row:
    """One example. `images` are absolute paths, one, four in mcq_d2i, none in identity; `answer` is the text to be
    produced."""

    task: str  # a name of `TASK_TYPES`, that of IDENTITY, or OWN
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
        return IDENTITY if self.task == IDENTITY.name else TASK_TYPES[self.task]

    @property
    def image(self) -> Path | None:
        """The first image, if there is one."""
        return self.images[0] if self.images else None


def build_prompt(row: Row, with_text: bool = True) -> list[str | Path]:
    """The user turn of a row: texts and image paths in reading order, never two texts in a row.

    In `reverse` and `mcq_d2i` the description comes first, so that the model must go from text to image.

    Args:
        with_text: False leaves out description and connector; options and instruction stay.
    """
    if row.task == OWN:
        before, mark, after = row.connector.partition(IMAGE_MARK)
        parts = [before, row.images[0], after] if mark else [row.images[0], f" {before}"]
        return [part for part in parts if part]
    values = {"image": row.image, "description": row.description, "connector": row.connector}
    values |= zip(LETTERS, row.choices if row.type.options == "choices" else row.images, strict=False)
    parts = []
    for text, name, _, _ in Formatter().parse(row.type.prompt if with_text else row.type.textless_prompt):
        for part in (text, values[name] if name else ""):
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part:
                parts.append(part)
    return parts
