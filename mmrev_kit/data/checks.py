"""Everything that can be wrong with a run's data, told at once and before any model is loaded."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmrev_kit.config.project import experiment_dir
from mmrev_kit.config.sections import Config
from mmrev_kit.data.faults import Fault
from mmrev_kit.data.images import ImageError, image_roots, load_image
from mmrev_kit.data.prompts import Encoder, PromptError, Sample
from mmrev_kit.data.rows import read_experiment
from mmrev_kit.data.tasks import CHOICE, CW, GROUPS, LETTERS, Row

SECONDS_BETWEEN_LINES = 5.0


def same_words(text: str) -> str:
    """A text as it is compared: no case, single spaces, no full stop at its end."""
    return " ".join(text.casefold().split()).rstrip(".")


def repeated(values: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(where, where it came first) of every value that has come before, elsewhere; `values` are (where, value)."""
    first: dict[str, str] = {}
    return [(where, first[value]) for where, value in values if first.setdefault(value, where) != where]


def check_entities(entities: list[dict], path: Path) -> list[Fault]:
    """Faults of entities.json: an id or a description that two entities share, a group that does not exist."""
    faults = []
    for name, advice in (("id", "Give each entity an id of its own."), ("description", "Descriptions must differ.")):
        known = [(f"entity {number}", entity.get(name)) for number, entity in enumerate(entities, start=1)]
        told = {where: str(value) for where, value in known if value is not None}
        for where, first in repeated((where, same_words(value)) for where, value in told.items()):
            faults.append(Fault(f"{path}: {where}", f"the {name} {told[where]!r} is that of {first}, too.", advice))
    for number, entity in enumerate(entities, start=1):
        if entity.get("group", "main") not in GROUPS:
            reason = f"the group {entity['group']!r} is neither main nor control."
            faults.append(Fault(f"{path}: entity {number}", reason, "Correct the group."))
    return faults


def _statements(row: Row) -> list[tuple[Path, str, bool]]:
    """What a row claims of pictures: (image, description, whether it is true)."""
    if row.type.format != CHOICE:
        return [(row.images[0], row.description, row.type.format != CW or row.answer == "Correct")]
    right = LETTERS.index(row.answer)
    if row.type.options == "choices":
        return [(row.images[0], text, index == right) for index, text in enumerate(row.choices)]
    return [(image, row.description, index == right) for index, image in enumerate(row.images)]


def check_statements(rows: Iterable[Row]) -> list[Fault]:
    """False Wrongs: a picture and a description that one row calls right and another one wrong."""
    right: dict[tuple[Path, str], str] = {}
    wrong: dict[tuple[Path, str], list[str]] = defaultdict(list)
    for row in rows:
        for image, description, true in _statements(row):
            if true:
                right.setdefault((image, description), row.where)
            else:
                wrong[image, description].append(row.where)
    return [
        Fault(where, f"{pair[0].name} and {pair[1]!r} count as wrong here, as right in {right[pair]}.", "Correct one.")
        for pair, places in wrong.items()
        if pair in right
        for where in places
    ]


def image_sizes(paths: Iterable[Path], quiet: bool = False) -> tuple[dict[Path, tuple[int, int]], dict[Path, str]]:
    """Decode every image in full, on all cores.

    Returns:
        {path: (width, height)} of the images that decode, {path: reason} of those that do not.
    """
    paths = list(dict.fromkeys(paths))
    sizes, broken = {}, {}

    def read(path: Path):
        try:
            return load_image(path).size
        except ImageError as error:
            return error

    told = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, size in zip(paths, pool.map(read, paths), strict=True):
            if isinstance(size, ImageError):
                broken[path] = str(size)
            else:
                sizes[path] = size
            if not quiet and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                print(f"decoded {len(sizes) + len(broken):,} of {len(paths):,} images", flush=True)
    return sizes, broken


def encode_all(rows: list[Row], encoder: Encoder, quiet: bool = False) -> tuple[list[Sample | None], list[Fault]]:
    """Every row as a sample, None where it has a fault: an image that does not decode, or a prompt that cannot fit."""
    sizes, broken = image_sizes((image for row in rows for image in row.images), quiet)
    encoder.sizes.update(sizes)
    samples, faults = [], []
    for row in rows:
        bad = next((image for image in row.images if image in broken), None)
        sample = None
        if bad is not None:
            faults.append(Fault(row.where, broken[bad], "Replace the image.", of_row=True))
        else:
            try:
                sample = encoder.encode(row)
            except PromptError as error:
                faults.append(Fault(row.where, error.reason, error.advice, of_row=True))
        samples.append(sample)
    return samples, faults


def longest_prompts(config: Config, encoder: Encoder) -> list[Sample]:
    """Of each test that the experiment has, the row with most images and, among those, most text; rows with a fault are
    left out."""
    files, _ = read_experiment(experiment_dir(config), image_roots(config))

    def size(row: Row) -> tuple[int, int]:
        return len(row.images), sum(map(len, [row.description or "", row.connector, *row.choices]))

    rows = [max(part, key=size) for name, part in files.items() if name.endswith("_test") and part]
    return [sample for sample in encode_all(rows, encoder, quiet=True)[0] if sample is not None]
