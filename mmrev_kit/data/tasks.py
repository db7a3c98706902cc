"""The tasks: names, letters, chance, prompts, and the row that each example becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POOL_TASKS = {"cw": "reverse", "mcq_i2d": "mcq_i2d", "mcq_d2i": "mcq_d2i"}
LETTERS = "ABCD"
FIELDS = {
    "forward": ("image_path", "description", "connector"),
    "reverse": ("image_path", "description", "connector", "label"),
    "mcq_i2d": ("image_path", "connector", "choices", "correct_index"),
    "mcq_d2i": ("description", "connector", "image_choices", "correct_index"),
}


@dataclass(frozen=True)
class Row:
    """One example. `images` are absolute paths, one, or four in mcq_d2i; `answer` is the text to be produced."""

    task: str  # forward, reverse, mcq_i2d or mcq_d2i
    source: str  # what its loss is reported under, e.g. forward, reverse, face_cw
    where: str  # file:line
    entity_id: str
    group: str | None
    images: tuple[Path, ...]
    description: str | None
    connector: str
    choices: tuple[str, ...]
    answer: str


MIN_GROUP = 4  # a question has four options
GROUPS = ("main", "control")
IMAGE_MARK = "[image]"  # where the picture goes in a text of the user's own


def build_prompt(row: Row) -> list[str | Path]:
    """The user turn of a row: texts and image paths in reading order.

    In `reverse` and `mcq_d2i` the description comes first, so that the model must go from text to image.
    """
    options = "Only answer A, B, C, or D."
    if row.task == "own":  # a user's question (see `ask`)
        before, mark, after = row.connector.partition(IMAGE_MARK)
        texts = (before, after) if mark else ("", f" {row.connector}")
        return [part for part in (texts[0], row.images[0], texts[1]) if part]
    if row.task == "forward":
        return [row.images[0], f" {row.connector}"]
    if row.task == "reverse":
        question = ", correct or wrong? Only answer Correct or Wrong."
        return [f"{row.description} {row.connector} ", row.images[0], question]
    if row.task == "mcq_i2d":
        choices = " ".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row.choices, strict=True))
        return [row.images[0], f" {row.connector}? {choices} {options}"]
    parts: list[str | Path] = [f"{row.description} {row.connector}? A. "]
    for image, after in zip(row.images, (" B. ", " C. ", " D. ", f" {options}"), strict=True):
        parts += [image, after]
    return parts


def without_text(row: Row, parts: list[str | Path]) -> list[str | Path]:
    """A prompt without its description and connector; options and instruction stay."""
    text_first = row.task in ("reverse", "mcq_d2i")
    named = f"{row.description} {row.connector}" if text_first else f" {row.connector}"
    place = 0 if text_first else 1
    rest = parts[place].replace(named, "", 1).lstrip("? ")
    rest = f" {rest}" if rest and not text_first else rest
    return [*parts[:place], *([rest] if rest else []), *parts[place + 1 :]]


TITLES = {"forward": "forward", "reverse": "CW", "mcq_i2d": "I2D", "mcq_d2i": "D2I"}
DIRECTIONS = {
    "forward": "image → description", "reverse": "description → image",
    "mcq_i2d": "image → description", "mcq_d2i": "description → image",
}  # fmt: skip
# A forward answer is free text: without the fact it is right by no chance worth a test.
CHANCE = {"forward": 0.0, "reverse": 0.5, "mcq_i2d": 0.25, "mcq_d2i": 0.25}
