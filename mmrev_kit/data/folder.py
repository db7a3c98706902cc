"""The `folder` source: an experiment from your own people and pictures."""

import csv
import io
import json
import os
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from mmrev_kit.config.project import resolve
from mmrev_kit.config.sections import DataConfig
from mmrev_kit.data.checks import repeated, same_words
from mmrev_kit.data.faults import DataError, Fault
from mmrev_kit.data.images import ImageError, load_image
from mmrev_kit.data.partners import connector_split, experiment_rows
from mmrev_kit.data.people import ENTITY_FIELDS, entity_record, write_experiment
from mmrev_kit.data.tasks import GROUPS, MIN_GROUP

COLUMNS = ("description", "image")


def _stop(*faults: Fault) -> NoReturn:
    raise DataError(list(faults), "your people and pictures")


def _read_csv(path: Path) -> list[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
    if missing:
        _stop(Fault(f"{path}:1", f"no column {', '.join(missing)}.", "The first line names the columns."))
    return [(f"{path}:{reader.line_num}", {k: v.strip() for k, v in row.items() if k and v}) for row in reader]


def _read_json(path: Path) -> list[tuple[str, dict]]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        _stop(Fault(f"{path}:{error.lineno}", f"not JSON ({error.msg}).", "Correct it."))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        _stop(Fault(str(path), "not a list of objects.", "Write one object a person."))
    return [(f"{path}: entry {number}", record) for number, record in enumerate(records, start=1)]


def _read_list(path: Path) -> list[tuple[str, dict]]:
    """(where, record) of each person in a CSV or JSON file."""
    if not path.is_file():
        _stop(Fault(str(path), "there is no such file.", "Set data.entities_file to a CSV or JSON file."))
    try:
        records = _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)
    except UnicodeDecodeError as error:
        _stop(Fault(str(path), f"byte {error.start} is not UTF-8.", "Save the file as UTF-8."))
    if not records:
        _stop(Fault(str(path), "the file names nobody.", "Write one line a person."))
    return records


def _check_images(where: str, names: list[str], folder: Path, anywhere: bool) -> list[Fault]:
    faults = []
    for name in names:
        path = (folder / name).resolve()
        if not anywhere and not path.is_relative_to(folder):
            reason = f"the image {name} is not inside {folder}: it leads to {path}."
            faults.append(Fault(where, reason, "Put it there, or allow it with data.allow_outside=true."))
            continue
        try:
            load_image(folder / name)
        except ImageError as error:
            faults.append(Fault(where, str(error), "Correct the name or replace the file."))
    return faults


def _check_shared(people: list[tuple[str, dict]]) -> list[Fault]:
    """A fault for each person whose description, id, name or picture is another's, too."""

    def digests(person: dict) -> list[str]:
        return [sha256(image.read_bytes()).hexdigest() for image in person["source_images"]]

    keys = {
        "the description": lambda person: [same_words(person["description"])],
        "the id": lambda person: [person["id"]],
        "the name": lambda person: [person["name"]] if person["name"] else [],
        "a picture": digests,
    }
    return [
        Fault(where, f"{what} is also that of {first}.", "Each person needs their own.")
        for what, key in keys.items()
        for where, first in repeated((where, value) for where, person in people for value in key(person))
    ]


def _check_sizes(people: list[dict], folder: Path, data: DataConfig) -> list[Fault]:
    faults, where = [], str(data.entities_file)
    for person in people:
        have = len(person["source_images"])
        if have and have != data.images_per_entity:
            reason = f"{person['id']} has {have} images, data.images_per_entity is {data.images_per_entity}."
            faults.append(Fault(where, reason, "Give everybody equally many."))
    files = sum(file.is_file() for file in folder.rglob("*"))
    if len(people) > files:
        faults.append(Fault(where, f"{len(people)} people but {files} images in {folder}.", "Add the missing ones."))
    for group, size in Counter(person["group"] for person in people).items():
        if group in GROUPS and size < MIN_GROUP:
            reason = f"group {group} has {size}: wrong partners and the options of a question come from it."
            faults.append(Fault(where, reason, f"It needs {MIN_GROUP} or more."))
    return faults


def read_people(data: DataConfig) -> list[dict]:
    """The people of data.entities_file as entities, with `source_images`: paths of their pictures.

    A CSV has a header line with `description`, `image` and any field of an entity; several images are separated by
    `;` (in JSON: a list). Image names start from data.images_dir and stay in it, unless data.allow_outside is set.
    Nothing of yours is changed.

    Raises:
        DataError: with every fault: file:line, reason, what to do.
    """
    path, folder = resolve(data.entities_file), resolve(data.images_dir)
    records = _read_list(path)
    if not folder.is_dir() or not any(file.is_file() for file in folder.rglob("*")):
        _stop(Fault(str(folder), "the images folder is missing or empty.", "Set data.images_dir."))
    faults, people = [], []
    for number, (where, record) in enumerate(records):
        names = record.get("image") or []
        names = [part.strip() for part in names.split(";")] if isinstance(names, str) else list(names)
        description = str(record.get("description") or "").strip()
        group = record.get("group") or "main"
        if not description:
            faults.append(Fault(where, "no description.", "Write what the picture's person is."))
        if not names:
            faults.append(Fault(where, "no image.", f"Name a file of {folder}."))
        if group not in GROUPS:
            faults.append(Fault(where, f"the group {group!r} is neither main nor control.", "Correct the group."))
        wrong = _check_images(where, names, folder, data.allow_outside)
        faults += wrong
        known = {name: record[name] for name in ENTITY_FIELDS if record.get(name)}
        known |= {"id": str(record.get("id") or f"entity_{number:03d}"), "description": description, "group": group}
        people.append((where, entity_record(**known) | {"source_images": [] if wrong else [folder / n for n in names]}))
    faults += _check_shared(people) + _check_sizes([person for _, person in people], folder, data)
    if faults:
        _stop(*faults)
    return [person for _, person in people]


def make_folder_experiment(folder: str | Path, data: DataConfig, seed: int) -> Path:
    """An experiment's files from your own people: the pictures copied, or linked with data.link_images.

    Raises:
        FileExistsError: the folder exists; it is not touched.
        DataError: see `read_people`.
    """
    people, connectors, sources = read_people(data), connector_split(seed), {}
    for number, person in enumerate(people):
        own = person.pop("source_images")
        person["source_image"] = [os.path.relpath(source, resolve(data.images_dir)) for source in own]
        person["images"] = [f"images/{number:03d}_{view:02d}{path.suffix.lower()}" for view, path in enumerate(own)]
        sources |= zip(person["images"], own, strict=True)

    def draw(building: Path) -> None:
        for name, source in sources.items():
            if data.link_images:
                (building / name).symlink_to(source.resolve())
            else:
                shutil.copyfile(source, building / name)

    info = {"source": "folder", "seed": seed, "images_per_entity": data.images_per_entity, "connectors": connectors}
    return write_experiment(folder, people, experiment_rows(people, connectors, seed), draw, **info)
