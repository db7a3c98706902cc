"""The `folder` source: an experiment from your own people and pictures."""

import os
import reprlib
import shutil
from collections import Counter
from difflib import get_close_matches
from filecmp import cmp
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from mmrev_kit.config.project import resolve
from mmrev_kit.config.sections import DataConfig
from mmrev_kit.data.checks import repeated
from mmrev_kit.data.faults import DataError, Fault
from mmrev_kit.data.images import ImageError, load_image, look_of, why_missing
from mmrev_kit.data.partners import connector_split, experiment_rows
from mmrev_kit.data.people import ENTITY_FIELDS, entity_record, write_experiment
from mmrev_kit.data.records import Records, read_list
from mmrev_kit.data.rows import read_entities
from mmrev_kit.data.tasks import GROUPS, MIN_GROUP
from mmrev_kit.data.texts import normal

# Under which names a list may hold what is needed: the kit's own, then those of image folders on the hub and of the
# original scripts. The first that a list has is read.
COLUMNS = {
    "description": ("description", "text", "caption", "object_name"),
    "image": ("image", "images", "file_name", "image_path"),
}
MISSING = ("", "nan", "none", "null")  # what programs write where there is no description
# Chat layouts, by the field that gives them away: who writes them so, and where they hold the description.
CHATS = {
    "conversations": ("LLaVA or ShareGPT", 'row["conversations"][-1]["value"]'),
    "messages": ("ShareGPT or LLaMA-Factory", 'row["messages"][-1]["content"]'),
    "output": ("Alpaca", 'row["output"]'),
}
CONVERSION = """\
import json
rows = {rows}
people = [{{"image": row[{image!r}], "description": {description}}} for row in rows]
open({target!r}, "w", encoding="utf-8").write(json.dumps(people, ensure_ascii=False))"""


def _stop(*faults: Fault) -> NoReturn:
    raise DataError(list(faults), "your people and pictures")


def _name_columns(path: Path, records: Records) -> dict[str, str]:
    """{"description" | "image": the column that holds it}; says which columns are not read, and which by another name.

    Raises:
        DataError: one is missing, or a column is nearly called like one that is read.
    """
    found = list(dict.fromkeys(name for _, record in records for name in record))
    columns = {wanted: next((name for name in names if name in found), None) for wanted, names in COLUMNS.items()}
    missing, listed = [wanted for wanted, name in columns.items() if name is None], ", ".join(found)
    chat = next((name for name in CHATS if name in found), None)
    if "description" in missing and chat and columns["image"]:
        layout, description = CHATS[chat]
        target, opened = path.with_name(f"{path.stem}_people.json"), f'open({str(path)!r}, encoding="utf-8-sig")'
        by_line = f"[json.loads(line) for line in {opened} if line.strip()]"
        rows = f"json.load({opened})" if ": entry " in records[0][0] else by_line
        values = {"rows": rows, "target": str(target), "image": columns["image"], "description": description}
        code = CONVERSION.format(**values)
        advice = f"These lines turn it into {target.name}, to be given as data.entities_file:\n{code}"
        _stop(Fault(str(path), f"the chat layout of {layout} (fields {listed}), no list of people.", advice))
    if missing:
        reason = f"no column {', '.join(missing)}; there are {listed or 'none'}."
        advice = "Name one so: " + "; ".join(f"{name} (or {', '.join(COLUMNS[name][1:])})" for name in missing) + "."
        _stop(Fault(f"{path}:1", reason, advice))
    known = [*columns.values(), *(name for name in ENTITY_FIELDS if name != "images")]
    unread = [name for name in found if name not in known]
    for name in unread:
        near = get_close_matches(name, known, 1, 0.75)
        if near and near[0] not in found:
            _stop(Fault(f"{path}:1", f"the column {name} is not known; {near[0]} is.", "Rename or remove it."))
    told = [f"{name} is read as the {wanted}" for wanted, name in columns.items() if name != wanted]
    told += [f"{', '.join(unread)}: not read"] if unread else []
    if told:
        print(f"{path}: {'; '.join(told)}.")
    return columns


def _image_names(value) -> list[str] | None:
    """File names from a cell, a list, or objects with a `path`, as data sets of the hub have them; None: neither."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    values = value if isinstance(value, list) else [value]
    names = [item.get("path") if isinstance(item, dict) else item for item in values]
    return names if all(isinstance(name, str) and name.strip() for name in names) else None


def _person(where: str, record: dict, columns: dict[str, str], number: int) -> tuple[dict, list[str], list[Fault]]:
    """An entity, the names of its images, and the faults of its record."""
    record = {name: value for name, value in record.items() if value not in (None, "", [])}
    faults = []

    def wrong(reason: str, advice: str) -> None:
        faults.append(Fault(where, reason, advice))

    description, name = record.get(columns["description"], ""), record.get("name", "")
    group, entity = record.get("group", "main"), record.get("id", f"entity_{number:03d}")
    for what, value in (("description", description), ("name", name)):
        if not isinstance(value, str) or "\0" in value:
            wrong(f"the {what} is {reprlib.repr(value)}, not a text.", "Write a text.")
    if isinstance(description, str) and normal(description) in MISSING:
        wrong("no description.", "Write what the picture's person is.")
    if type(entity) not in (str, int):
        wrong(f"the id is {reprlib.repr(entity)}, neither text nor a whole number.", "Correct the id.")
    if group not in GROUPS:
        wrong(f"the group {reprlib.repr(group)} is none of {', '.join(GROUPS)}.", "Correct the group.")
    images = _image_names(record.get(columns["image"], ""))
    if images is None:
        reason = f"the image is {reprlib.repr(record[columns['image']])}, no file name."
        wrong(reason, "Write a file name, a list of them, or an object with a path.")
    elif not images:
        wrong("no image.", "Name a file of data.images_dir.")
    known = {field: record[field] for field in ENTITY_FIELDS if field in record}
    known |= {"id": str(entity).strip(), "description": str(description).strip()}
    known |= {"name": name if name and isinstance(name, str) else None, "group": group if group in GROUPS else None}
    return entity_record(**known), images or [], faults


def _check_images(where: str, names: list[str], folder: Path, anywhere: bool) -> tuple[list[str], list[Fault]]:
    """What the pictures look like, see `look_of`, and the faults of those that cannot be used."""
    looks, faults = [], []
    for name in names:
        path = folder / name
        if not os.path.isfile(path):
            faults.append(Fault(where, why_missing(folder, name), "Correct the name or add the file."))
            continue
        if not anywhere and not path.resolve().is_relative_to(folder):
            reason = f"the image {name} is not inside {folder}: it leads to {path.resolve()}."
            faults.append(Fault(where, reason, "Put it there, or allow it with data.allow_outside=true."))
            continue
        try:
            looks.append(look_of(load_image(path)))
        except ImageError as error:
            faults.append(Fault(where, str(error), "Correct the name or replace the file."))
    return looks, faults


def _check_shared(people: list[tuple[str, dict]], pictures: dict[str, list[str]]) -> list[Fault]:
    """A fault for each person whose description, id, name or picture is another's, too, or who has a picture twice.

    Args:
        pictures: what each person's pictures look like: the same one may have been saved twice.
    """
    keys = {
        "the description, as answers are judged,": lambda where, person: [normal(person["description"])],
        "the id": lambda where, person: [person["id"]],
        "the name": lambda where, person: [person["name"]],
        "a picture": lambda where, person: pictures[where],
    }
    faults = []
    for what, key in keys.items():
        values = ((where, value) for where, person in people for value in key(where, person) if value)
        for where, first in repeated(values):
            faults.append(Fault(where, f"{what} is also that of {first}.", "Each person needs their own."))
    advice = "Name each once: the last one is held out for the test."
    twice = (where for where, own in pictures.items() if len(set(own)) < len(own))
    return faults + [Fault(where, "it names a picture twice.", advice) for where in twice]


def _check_sizes(people: list[dict], folder: Path, data: DataConfig) -> list[Fault]:
    faults, where = [], str(data.entities_file)
    for person in people:
        have = len(person["source_images"])
        if have and have != data.images_per_entity:
            reason = f"{person['id']} has {have} images, data.images_per_entity is {data.images_per_entity}."
            faults.append(Fault(where, reason, "Give everybody equally many."))
    files = sum(file.is_file() and file != resolve(data.entities_file) for file in folder.rglob("*"))
    if len(people) > files:
        faults.append(Fault(where, f"{len(people)} people but {files} images in {folder}.", "Add the missing ones."))
    for group, size in Counter(person["group"] for person in people).items():
        if group in GROUPS and size < MIN_GROUP:
            reason = f"group {group} has {size}: wrong partners and the options of a question come from it."
            faults.append(Fault(where, reason, f"It needs {MIN_GROUP} or more."))
    return faults


def read_people(data: DataConfig) -> list[dict]:
    """The people of data.entities_file as entities, with `source_images`: paths of their pictures.

    The list (see `records.read_list`) has `description`, `image` (see `COLUMNS`) and any field of an entity; several
    images are separated by `;` (in JSON: a list). Image names start from data.images_dir and stay in it, unless
    data.allow_outside is set. Nothing of yours is changed.

    Raises:
        DataError: with every fault: file:line, reason, what to do.
    """
    path, folder = resolve(data.entities_file), resolve(data.images_dir)
    records, faults = read_list(path)
    if not records:
        _stop(*faults)
    if not folder.is_dir() or not any(file.is_file() for file in folder.rglob("*")):
        _stop(Fault(str(folder), "the images folder is missing or empty.", "Set data.images_dir."))
    columns, people, pictures = _name_columns(path, records), [], {}
    for number, (where, record) in enumerate(records):
        person, names, wrong = _person(where, record, columns, number)
        pictures[where], unusable = _check_images(where, names, folder, data.allow_outside)
        faults += wrong + unusable
        people.append((where, person | {"source_images": [] if unusable else [folder / name for name in names]}))
    faults += _check_shared(people, pictures) + _check_sizes([person for _, person in people], folder, data)
    if faults:
        _stop(*faults)
    return [person for _, person in people]


def changed_pictures(folder: Path, data: DataConfig) -> list[Path]:
    """The pictures of data.images_dir that are others than those which the experiment in `folder` was made from; one
    that is no longer there is not compared, nor is an experiment of another source.

    Raises:
        DataError: see `rows.read_entities`; or an entity does not say of each of its images what it was made from.
    """
    now, pairs = resolve(data.images_dir), []
    for entity in read_entities(folder):
        if "source_image" not in entity:
            continue
        sources, images = entity["source_image"], entity["images"]
        texts = isinstance(sources, list) and all(isinstance(source, str) for source in sources)
        if not texts or len(sources) != len(images):
            reason = f"{entity['id']}: source_image does not name a picture for each of its images."
            raise DataError([Fault(str(folder / "entities.json"), reason, "Restore the file, or make the data again.")])
        pairs += zip(sources, images, strict=True)
    there = [(now / source, folder / own) for source, own in pairs if (now / source).is_file()]
    return [source for source, own in there if own.is_file() and not cmp(source, own, shallow=False)]


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
    info["entities_file_sha256"] = sha256(resolve(data.entities_file).read_bytes()).hexdigest()
    return write_experiment(folder, people, experiment_rows(people, connectors, seed), draw, **info)
