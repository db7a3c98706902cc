"""The `folder` source: an experiment from your own people and pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

from mmrev_kit.config.project import resolve
from mmrev_kit.config.sections import DataConfig
from mmrev_kit.data.images import ImageError, load_image
from mmrev_kit.data.partners import connector_split, experiment_rows
from mmrev_kit.data.people import ENTITY_FIELDS, entity_record, write_experiment
from mmrev_kit.data.tasks import GROUPS, MIN_GROUP
from mmrev_kit.files import fresh_folder

COLUMNS = ("description", "image")


class FolderError(ValueError):
    """Your list of people cannot be used; `faults` holds every reason, with its place."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("\n".join([f"{len(faults)} fault(s) in your people and pictures:", *faults]))


def _read_csv(path: Path) -> list[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
    if missing:
        raise FolderError([f"{path}:1: no column {', '.join(missing)}. The first line names the columns."])
    return [(f"{path}:{reader.line_num}", {k: v.strip() for k, v in row.items() if k and v}) for row in reader]


def _read_json(path: Path) -> list[tuple[str, dict]]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise FolderError([f"{path}:{error.lineno}: not JSON ({error.msg})."]) from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise FolderError([f"{path}: not a list of objects."])
    return [(f"{path}: entry {number}", record) for number, record in enumerate(records, start=1)]


def _read_list(path: Path) -> list[tuple[str, dict]]:
    """(place, record) of each person in a CSV or JSON file."""
    if not path.is_file():
        raise FolderError([f"{path}: there is no such file. Set data.entities_file to a CSV or JSON file."])
    try:
        records = _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)
    except UnicodeDecodeError as error:
        raise FolderError([f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8."]) from None
    if not records:
        raise FolderError([f"{path}: the file names nobody."])
    return records


def _check_images(where: str, names: list[str], folder: Path, anywhere: bool) -> list[str]:
    faults = []
    for name in names:
        if not anywhere and not (folder / name).resolve().is_relative_to(folder):
            reason = f"the image {name} is not inside {folder}: it leads to {(folder / name).resolve()}."
            faults.append(f"{where}: {reason} Put it there, or allow it with data.allow_outside=true.")
            continue
        try:
            load_image(folder / name)
        except ImageError as error:
            faults.append(f"{where}: {error} Correct the name or replace the file.")
    return faults


def _shared(people: list[tuple[str, dict]], key, what: str) -> list[str]:
    """A fault for each person whose `key` is another's, too."""
    first: dict[str, str] = {}
    faults = []
    for where, person in people:
        for value in key(person):
            if value in first and first[value] != where:
                faults.append(f"{where}: {what} is also that of {first[value]}. Each person needs their own.")
            first.setdefault(value, where)
    return faults


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def read_people(data: DataConfig) -> list[dict]:
    """The people of data.entities_file as entities, with `source_images`: paths of their pictures.

    A CSV has a header line with `description`, `image` and any field of an entity; several images are separated by
    `;` (in JSON: a list). Image names start from data.images_dir and stay in it, unless data.allow_outside is set.
    Nothing of yours is changed.

    Raises:
        FolderError: with every fault: file:line, reason, what to do.
    """
    path, folder = resolve(data.entities_file), resolve(data.images_dir)
    records = _read_list(path)
    if not folder.is_dir() or not any(file.is_file() for file in folder.rglob("*")):
        raise FolderError([f"{folder}: the images folder is missing or empty. Set data.images_dir."])
    faults, people = [], []
    for number, (where, record) in enumerate(records):
        names = record.get("image") or []
        names = [part.strip() for part in names.split(";")] if isinstance(names, str) else list(names)
        description = str(record.get("description") or "").strip()
        group = record.get("group") or "main"
        if not description:
            faults.append(f"{where}: no description. Write what the picture's person is.")
        if not names:
            faults.append(f"{where}: no image. Name a file of {folder}.")
        if group not in GROUPS:
            faults.append(f"{where}: the group {group!r} is neither main nor control.")
        wrong = _check_images(where, names, folder, data.allow_outside)
        faults += wrong
        known = {name: record[name] for name in ENTITY_FIELDS if record.get(name)}
        known |= {"id": str(record.get("id") or f"entity_{number:03d}"), "description": description, "group": group}
        people.append((where, entity_record(**known) | {"source_images": [] if wrong else [folder / n for n in names]}))
    faults += _shared(people, lambda person: [_plain(person["description"])], "the description")
    faults += _shared(people, lambda person: [person["id"]], "the id")
    faults += _shared(people, lambda person: [person["name"]] if person["name"] else [], "the name")
    faults += _shared(people, _digests, "a picture")
    faults += _check_sizes([person for _, person in people], folder, data)
    if faults:
        raise FolderError(faults)
    return [person for _, person in people]


def _digests(person: dict) -> list[str]:
    return [sha256(image.read_bytes()).hexdigest() for image in person["source_images"]]


def _check_sizes(people: list[dict], folder: Path, data: DataConfig) -> list[str]:
    faults, sizes = [], defaultdict(int)
    for person in people:
        sizes[person["group"]] += 1
        have = len(person["source_images"])
        if have and have != data.images_per_entity:
            reason = f"{person['id']} has {have} images, data.images_per_entity is {data.images_per_entity}."
            faults.append(f"{data.entities_file}: {reason} Give everybody equally many.")
    files = sum(file.is_file() for file in folder.rglob("*"))
    if len(people) > files:
        faults.append(f"{data.entities_file}: {len(people)} people but {files} images in {folder}.")
    for group, size in sizes.items():
        if group in GROUPS and size < MIN_GROUP:
            reason = f"group {group} has {size}: wrong partners and the options of a question come from it."
            faults.append(f"{data.entities_file}: {reason} It needs {MIN_GROUP} or more.")
    return faults


def make_folder_experiment(folder: str | Path, data: DataConfig, seed: int) -> Path:
    """An experiment's files from your own people: the pictures copied, or linked with data.link_images.

    Raises:
        FileExistsError: the folder exists; it is not touched.
        FolderError: see `read_people`.
    """
    people = read_people(data)
    connectors = connector_split(seed)
    with fresh_folder(folder) as building:
        (building / "images").mkdir()
        for number, person in enumerate(people):
            sources = person.pop("source_images")
            person["source_image"] = [os.path.relpath(source, resolve(data.images_dir)) for source in sources]
            person["images"] = [
                f"images/{number:03d}_{view:02d}{source.suffix.lower()}" for view, source in enumerate(sources)
            ]
            for source, name in zip(sources, person["images"], strict=True):
                if data.link_images:
                    (building / name).symlink_to(source.resolve())
                else:
                    shutil.copyfile(source, building / name)
        info = {"source": "folder", "seed": seed, "images_per_entity": data.images_per_entity, "connectors": connectors}
        write_experiment(building, people, experiment_rows(people, connectors, seed), **info)
    return Path(folder)
