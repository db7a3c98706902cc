"""Everything that can be wrong with a run's data, told at once and before any model is loaded."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmrev_kit.config.project import experiment_dir
from mmrev_kit.config.sections import Config
from mmrev_kit.data.images import ImageError, image_roots, load_image
from mmrev_kit.data.prompts import Encoder, PromptError, Sample
from mmrev_kit.data.rows import DataError, Fault, read_experiment
from mmrev_kit.data.tasks import LETTERS, Row

SECONDS_BETWEEN_LINES = 5.0


def check_entities(entities: list[dict], path: Path) -> list[Fault]:
    """Faults of entities.json: an id or a description that two entities share, a group that does not exist."""
    faults = []
    for name, advice in (("id", "Give each entity an id of its own."), ("description", "Descriptions must differ.")):
        seen: dict[str, int] = {}
        for number, entity in enumerate(entities, start=1):
            value = entity.get(name)
            if value is None:
                continue
            key = " ".join(str(value).casefold().split()).rstrip(".")
            if key in seen:
                reason = f"the {name} {value!r} is that of entity {seen[key]}, too."
                faults.append(Fault(f"{path}: entity {number}", reason, advice))
            seen.setdefault(key, number)
    for number, entity in enumerate(entities, start=1):
        if entity.get("group", "main") not in ("main", "control"):
            reason = f"the group {entity['group']!r} is neither main nor control."
            faults.append(Fault(f"{path}: entity {number}", reason, "Correct the group."))
    return faults


def _statements(row: Row) -> list[tuple[Path, str, bool]]:
    """What a row claims of pictures: (image, description, whether it is true)."""
    if row.task == "forward":
        return [(row.images[0], row.answer, True)]
    if row.task == "reverse":
        return [(row.images[0], row.description, row.answer == "Correct")]
    right = LETTERS.index(row.answer)
    if row.task == "mcq_i2d":
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


def read_sizes(paths: Iterable[Path], quiet: bool = False) -> tuple[dict[Path, tuple[int, int]], dict[Path, str]]:
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
        for path, found in zip(paths, pool.map(read, paths), strict=True):
            if isinstance(found, ImageError):
                broken[path] = str(found)
            else:
                sizes[path] = found
            if not quiet and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                print(f"decoded {len(sizes) + len(broken):,} of {len(paths):,} images", flush=True)
    return sizes, broken


def encode_all(rows: list[Row], encoder: Encoder, quiet: bool = False) -> tuple[list[Sample | None], list[Fault]]:
    """Every row as a sample, None where it has a fault: an image that does not decode, or a prompt that cannot fit."""
    sizes, broken = read_sizes((image for row in rows for image in row.images), quiet)
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


def settle(faults: list[Fault], drop: bool) -> None:
    """Stop on faults; with `drop`, go on without the rows that have one, and say how many and why.

    Raises:
        DataError: with every fault, or, with `drop`, with those that are no single row's.
    """
    fatal = [fault for fault in faults if not (drop and fault.of_row)]
    if fatal:
        raise DataError(faults if not drop else fatal)
    if faults:
        reasons = Counter(fault.reason.split(":")[-1].strip() for fault in faults)
        print(f"{len({fault.where for fault in faults})} rows dropped (data.drop_faulty): ", end="")
        print("; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5)))
        print("\n".join(f"  {fault.where}" for fault in faults[:20]))
