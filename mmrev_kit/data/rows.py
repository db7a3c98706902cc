"""Experiment and pool files read into rows, strictly: every fault is collected and told with file and line."""

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from mmrev_kit.data.faults import DataError, Fault
from mmrev_kit.data.images import ImageError, find_image, lie_beside, locate_image
from mmrev_kit.data.records import read_info, read_json, read_jsonl
from mmrev_kit.data.tasks import CHOICE, CW, LETTERS, TASK_TYPES, Row, TaskType

# What the scripts that started this line of work call the same fields.
OLD_NAMES = {"description": "object_name", "image_path": "image"}
NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}
# Every field that some row may have.
FIELDS = {name for task in TASK_TYPES.values() for name in task.fields}
FIELDS |= {"entity_id", "group", "image_choices", "choices", "options", "answer", *NEW_NAMES}


def _modern(record: dict, task: TaskType) -> dict:
    """The record under today's field names; folders of the original scripts are read as they are."""
    record = {new: record[old] for new, old in OLD_NAMES.items() if old in record} | record
    options = record.get("options")
    if isinstance(options, dict) and sorted(options) == list(LETTERS):
        record.setdefault(task.options or "choices", [options[letter] for letter in LETTERS])
        if record.get("answer") in task.answers:
            record.setdefault("correct_index", LETTERS.index(record["answer"]))
    return record


@cache
def _unknown_field(names: tuple[str, ...]) -> str | None:
    """The reason why a record with these fields is none of the kit's: one is nearly called like a field that is not
    there, and would be left unread without a word; or None. Other fields may be there."""
    there = {NEW_NAMES.get(name, name) for name in names}
    for name in names:
        if name not in FIELDS:
            near = get_close_matches(name.strip().casefold(), FIELDS, 1, 0.75)
            same = near and near[0] == name.strip().casefold()
            if near and (same or NEW_NAMES.get(near[0], near[0]) not in there):
                return f"the field {name!r} is not known; {near[0]} is."
    return None


def _wrong_field(record: dict, task: TaskType) -> str | None:
    """The reason why a record is no row of `task`, or None."""
    for name in task.fields:
        value = record.get(name)
        if value is None:
            return f"the field {name} is missing."
        if name == "correct_index":
            if type(value) is not int or not 0 <= value < 4:
                return f"correct_index is {value!r}, not 0, 1, 2 or 3."
        elif name == task.options:
            texts = isinstance(value, list) and len(value) == 4 and all(isinstance(v, str) and v.strip() for v in value)
            if not texts:
                return f"{name} is not a list of four texts."
            if len(set(value)) < 4:
                return f"{name} names the same option twice."
        elif not isinstance(value, str) or not value.strip():
            return f"{name} is {value!r}, not a text."
        elif name == "label" and value not in task.answers:
            return f"label is {value!r}, not {' or '.join(task.answers)}."
    return None


def _image_names(record: dict, task: TaskType) -> list[str]:
    names = record.get("image_choices") if task.options == "image_choices" else [record.get("image_path")]
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _wrong_person(record: dict, groups: dict[str, str]) -> str | None:
    """The reason why a record is about nobody of the experiment, or contradicts its entities.json; or None."""
    entity, said = str(record.get("entity_id", "")), record.get("group")
    if entity not in groups:
        near = [f", which has {known!r}" for known in get_close_matches(entity, groups, 1)]
        return f"entity_id {entity!r} is not in entities.json{''.join(near)}."
    if said not in (None, groups[entity]):
        return f"the group {said!r} is not that of {entity} in entities.json, {groups[entity]}."
    return None


def _miscounted(path: Path, count: int) -> list[Fault]:
    """A fault where a file has not as many lines as the kit noted when it made the folder (see `read_info`)."""
    try:
        counts = read_info(path.parent).get("counts", {})
    except DataError as error:
        return error.faults
    task, _, split = path.stem.rpartition("_")
    said = counts.get(task, {}).get(split, count)
    if count == said:
        return []
    advice = "Restore the file, remove the folder to have it made anew, or correct the counts in its *_info.json."
    return [Fault(str(path), f"it has {count} rows, {said} were written when it was made.", advice)]


def to_row(
    record: dict, task: TaskType, source: str, images: Iterable[Path], where: str = "", group: str | None = None
) -> Row:
    """A record without faults as a row; its arguments are fields of `Row`."""
    told = "label" if task.format == CW else "description"
    return Row(
        task=task.name,
        source=source,
        where=where,
        entity_id=str(record.get("entity_id", "")),
        group=group,
        images=tuple(images),
        description=record.get("description"),
        connector=record["connector"].strip(),
        choices=tuple(record.get("choices") or ()),
        answer=LETTERS[record["correct_index"]] if task.format == CHOICE else record[told],
    )


def read_rows(
    path: Path, task: str, source: str, groups: dict[str, str], roots: tuple[Path, ...] | None = ()
) -> tuple[list[Row], list[Fault]]:
    """The rows of one file and all its faults.

    Args:
        path: a JSONL file; image paths in it start from its folder, see `find_image`.
        task: a name of `TASK_TYPES`.
        source: what the loss of these rows is reported under.
        groups: {entity id: group} of the experiment whose rows these are; empty for a pool's.
        roots: as in `find_image`.
    """
    kind = TASK_TYPES[task]
    records, faults = read_jsonl(path)
    faults += _miscounted(path, len(records) + sum(fault.of_row for fault in faults)) if path.is_file() else []
    modern = [_modern(record, kind) for _, record in records]
    beside = lie_beside(path.parent, (name for record in modern for name in _image_names(record, kind)))
    rows, find = [], cache(lambda name: find_image(path.parent, name, roots, beside))
    for (number, raw), record in zip(records, modern, strict=True):
        where, images = f"{path}:{number}", []
        reasons = [_unknown_field(tuple(raw)) or _wrong_field(record, kind)]
        if reasons == [None]:
            for name in _image_names(record, kind):
                try:
                    images.append(find(name))
                except ImageError as error:
                    reasons.append(str(error))
        reasons += [_wrong_person(record, groups)] if groups else []
        wrong = [Fault(where, reason, "Correct the line or remove it.", of_row=True) for reason in reasons if reason]
        faults += wrong
        if not wrong:
            group = groups.get(str(record.get("entity_id", "")), record.get("group"))
            rows.append(to_row(record, kind, source, images, where, group))
    return rows, faults


def read_entities(folder: Path, roots: tuple[Path, ...] | None = None) -> list[dict]:
    """The entities of an experiment: `id` is text, `images` a list of paths from the folder, empty where none is named.

    Args:
        roots: as in `find_image`, for callers that show the entities' images.

    Raises:
        DataError: entities.json is missing or names nobody, a field has the wrong type, or an image may not be read.
    """
    path = folder / "entities.json"
    entities = read_json(path)
    if not isinstance(entities, list) or not entities:
        raise DataError([Fault(str(path), "not a list of entities.", "Make the data again.")])
    faults, listed = [], [entity.get("images") for entity in entities if isinstance(entity, dict)]
    named = [name for names in listed for name in (names if isinstance(names, list) else [names])]
    beside = lie_beside(folder, (name for name in named if isinstance(name, str)))
    for number, entity in enumerate(entities, start=1):
        where = f"{path}: entity {number}"
        reason = _wrong_entity(entity)
        if reason:
            faults.append(Fault(where, reason, "Correct the entity."))
            continue
        images = entity.get("images") or []
        images = [images] if isinstance(images, str) else images
        entities[number - 1] = entity | {"id": str(entity.get("id", entity.get("entity_id"))), "images": images}
        for name in images:
            try:
                if locate_image(folder, name, beside):
                    find_image(folder, name, roots, beside)
            except ImageError as error:
                faults.append(Fault(where, str(error), "Correct the entity."))
    if faults:
        raise DataError(faults)
    return entities


def _wrong_entity(entity) -> str | None:
    """The reason why an entry of entities.json is no entity, or None."""
    if not isinstance(entity, dict):
        return f"a {type(entity).__name__}, not an object with fields."
    if type(entity.get("id", entity.get("entity_id"))) not in (str, int):
        return "its id is neither text nor a whole number."
    for name in entity:
        if name != (read := name.strip().lower()) and read in ("id", "group", "images", "description"):
            return f"the field {name!r} is not read: names are in lower case, without spaces."
    images = entity.get("images") or []
    if not isinstance(images, str) and not (isinstance(images, list) and all(isinstance(i, str) for i in images)):
        return "images is neither a path nor a list of paths."
    wrong = [name for name in ("description", "group") if not isinstance(entity.get(name), str | None)]
    return f"its {wrong[0]} is not a text." if wrong else None
