"""Everything that can be wrong with a run's data, told at once and before any model is loaded."""

import os
from codecs import BOM_UTF8
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmrev_kit.config.project import experiment_dir
from mmrev_kit.config.reporting import paced
from mmrev_kit.config.sections import Config
from mmrev_kit.data.faults import Fault
from mmrev_kit.data.images import ImageError, image_roots, load_image, locate_image, look_of, whole_pictures
from mmrev_kit.data.prompts import Encoder, PromptError, Sample
from mmrev_kit.data.records import read_info
from mmrev_kit.data.run_data import read_experiment
from mmrev_kit.data.tasks import CHOICE, CW, GENERATION, GROUPS, IDENTITY, LETTERS, Row
from mmrev_kit.data.texts import normal


def repeated(values: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(where, where it came first) of every value that has come before, elsewhere; `values` are (where, value)."""
    first: dict[str, str] = {}
    return [(where, first[value]) for where, value in values if first.setdefault(value, where) != where]


def check_entities(entities: list[dict], path: Path) -> list[Fault]:
    """Faults of entities.json: an id that two entities share, descriptions that judging cannot tell apart, a group that
    does not exist, and groups of another size than the kit noted when it made them.

    Raises:
        DataError: what the kit noted cannot be read.
    """
    faults, sizes, note = [], Counter(entity.get("group", "main") for entity in entities), read_info(path.parent)
    places = {f"entity {number}": entity for number, entity in enumerate(entities, start=1)}
    ids = ((where, entity["id"].strip().casefold()) for where, entity in places.items())
    for where, first in repeated(ids):
        reason = f"the id {places[where]['id']!r} is that of {first}, too."
        faults.append(Fault(f"{path}: {where}", reason, "Give each entity an id of its own."))
    told = {where: entity["description"] for where, entity in places.items() if entity.get("description")}
    for where, first in repeated((where, normal(text)) for where, text in told.items()):
        reason = f"the description {told[where]!r} of {places[where]['id']} is judged as that of {places[first]['id']}."
        faults.append(Fault(f"{path}: {where}", reason, "Descriptions must differ in what can be read."))
    for where, entity in places.items():
        if entity.get("group", "main") not in GROUPS:
            reason = f"the group {entity['group']!r} is none of {', '.join(GROUPS)}."
            faults.append(Fault(f"{path}: {where}", reason, "Correct the group."))
    for group in GROUPS:
        said = note.get(f"num_{group}", sizes[group])
        if said != sizes[group]:
            reason = f"it has {sizes[group]} {group} entities, {said} were written when it was made."
            faults.append(Fault(str(path), reason, "Restore the file, or make the data again."))
    return faults


def _statements(row: Row) -> list[tuple[Path | None, str, bool]]:
    """What a row claims of pictures: (image, description, whether it is true); without one, whose text it is."""
    if row.type.format != CHOICE:
        return [(row.image, row.description, row.type.format != CW or row.answer == "Correct")]
    right = LETTERS.index(row.answer)
    if row.type.options == "choices":
        return [(row.images[0], text, index == right) for index, text in enumerate(row.choices)]
    return [(image, row.description, index == right) for index, image in enumerate(row.images)]


def check_statements(rows: Iterable[Row], looks: dict[Path, str] | None = None) -> list[Fault]:
    """Faults between rows: a picture and a description that one row calls right and another one wrong, two people of
    one picture, and two whose descriptions are the same to who judges an answer. Descriptions are compared as they
    are judged.

    Args:
        looks: what the pictures look like, see `images.look_of`; those that are not in it are told by their paths.
    """
    looks = looks or {}
    right: dict[tuple[Path | str, str], str] = {}
    wrong: dict[tuple[Path | str, str], list[tuple[str, str, str]]] = defaultdict(list)
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    shown: dict[Path | str, Row] = {}
    twins, faults = set(), []
    for row in rows:
        if row.type.format == GENERATION:
            owners[normal(row.answer)].setdefault(row.entity_id, row.where)
            first = shown.setdefault(looks.get(row.image, row.image), row) if row.images else row
            if first.entity_id != row.entity_id and (first.entity_id, row.entity_id) not in twins:
                twins.add((first.entity_id, row.entity_id))
                reason = (
                    f"{row.images[0].name} of {row.entity_id} looks like {first.images[0].name} of {first.entity_id}."
                )
                faults.append(Fault(row.where, reason, "Each person needs a picture of their own."))
        for image, description, true in _statements(row):
            pair = looks.get(image, image), normal(description)
            if true:
                right.setdefault(pair, row.where)
            else:
                wrong[pair].append((row.where, description, image.name))
    faults += [
        Fault(where, f"{name} and {text!r} count as wrong here, as right in {right[pair]}.", "Correct one.")
        for pair, places in wrong.items()
        if pair in right
        for where, text, name in places
    ]
    for text, places in owners.items():
        first, *others = places
        if not text:
            faults.append(Fault(places[first], f"nothing of the description of {first} can be judged.", "Correct it."))
        for other in others:
            reason = f"the description of {other} is judged as that of {first} in {places[first]}."
            faults.append(Fault(places[other], reason, "Descriptions must differ in what can be read."))
    return faults


def check_people(
    rows: Iterable[Row], entities: list[dict], folder: Path, taught: dict[str, tuple[str, ...]] | None = None
) -> list[Fault]:
    """Faults of an experiment's rows beside its entities.json: what a row calls right of a person is another's or
    nobody's description or image, or a task that a group is not taught shows an image or names a description of it.

    Identity rows, which show no picture and answer a description with itself, may name everybody: they tell of no
    direction which face is meant.

    Args:
        entities: from `rows.read_entities`.
        folder: the experiment's.
        taught: the tasks that each group is taught; None where the rows are asked, not trained on.
    """
    texts = {entity["id"]: entity.get("description") for entity in entities}
    pictures = {
        entity["id"]: {path.resolve() for name in entity["images"] if (path := locate_image(folder, name))}
        for entity in entities
    }
    owner: dict[Path | str, str] = {}  # the group of a description or an image
    for entity in sorted(entities, key=lambda entity: entity.get("group", "main") == "main"):  # main's is kept
        own = pictures[entity["id"]] | ({normal(entity["description"])} if entity.get("description") else set())
        owner |= dict.fromkeys(own, entity.get("group", "main"))
    faults = []

    def tell(row: Row, reason: str) -> None:
        faults.append(Fault(row.where, reason, "Correct one, or make the data again.", of_row=True))

    for row in rows:
        own, shown = row.entity_id, pictures.get(row.entity_id, ())
        for image, description, true in _statements(row):
            if true and texts.get(own) and normal(description) != normal(texts[own]):
                tell(row, f"{description!r} counts as right of {own}, in entities.json it is {texts[own]!r}.")
            elif true and shown and image and image not in shown:
                tell(row, f"{image.name} is shown as {own}, who has other images in entities.json.")
            elif taught and row.type is not IDENTITY:
                hidden = {owner.get(image), owner.get(normal(description))} & taught.keys()
                for group in sorted(group for group in hidden if row.task not in taught[group]):
                    tell(row, f"it shows or names somebody of {group}, who is not taught {row.task}.")
    return faults


def read_images(
    paths: Iterable[Path], quiet: bool = False
) -> tuple[dict[Path, tuple[int, int]], dict[Path, str], dict[Path, str]]:
    """Decode every image in full, on all cores.

    Returns:
        {path: (width, height)} and {path: what it looks like} of the images that decode (see `images.look_of`),
        {path: reason} of those that do not.
    """
    paths = list(dict.fromkeys(paths))
    sizes, looks, broken = {}, {}, {}

    def read(path: Path):
        try:
            image = load_image(path)
            return image.size, look_of(image)
        except ImageError as error:
            return error

    with whole_pictures(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, found in zip(paths if quiet else paced(paths, "images"), pool.map(read, paths), strict=True):
            if isinstance(found, ImageError):
                broken[path] = str(found)
            else:
                sizes[path], looks[path] = found
    return sizes, looks, broken


def encode_all(rows: list[Row], encoder: Encoder, quiet: bool = False) -> tuple[list[Sample | None], list[Fault]]:
    """Every row as a sample, None where it has a fault: an image that does not decode, or a prompt that cannot fit."""
    sizes, looks, broken = read_images((image for row in rows for image in row.images), quiet)
    encoder.sizes.update(sizes)
    encoder.looks.update(looks)
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


def check_account(files: Iterable[Path], rows: Iterable[Row], faults: Iterable[Fault]) -> None:
    """Make sure that every line of the files came to something.

    Args:
        rows: those that became samples, and those left out on purpose.
        faults: those that were told.

    Raises:
        RuntimeError: a line is neither a row nor has a fault; this is a mistake of the kit's.
    """
    known = {row.where for row in rows} | {fault.where for fault in faults}
    for file in files:
        for number, line in enumerate(file.read_bytes().removeprefix(BOM_UTF8).split(b"\n"), start=1):
            if line.strip(b" \t\r") and f"{file}:{number}" not in known:
                raise RuntimeError(f"{file}:{number} is lost: it was neither used nor refused. Please report this.")


def longest_prompts(config: Config, encoder: Encoder) -> list[Sample]:
    """Of each test that the experiment has, the row with most images and, among those, most text; rows with a fault are
    left out."""
    files, _ = read_experiment(experiment_dir(config), image_roots(config))

    def size(row: Row) -> tuple[int, int]:
        return len(row.images), sum(map(len, [row.description or "", row.connector, *row.choices]))

    rows = [max(part, key=size) for name, part in files.items() if name.endswith("_test") and part]
    return [sample for sample in encode_all(rows, encoder, quiet=True)[0] if sample is not None]
