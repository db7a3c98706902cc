"""Experiment and pool files read into rows, strictly: every fault is collected and told with file and line."""

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

from mmrev_kit.config.project import experiment_dir, resolve
from mmrev_kit.config.sections import CONTROL_IS_TAUGHT, Config, RetentionConfig
from mmrev_kit.data.faults import DataError, Fault
from mmrev_kit.data.images import ImageError, find_image, image_roots, locate_image
from mmrev_kit.data.tasks import CHOICE, CW, EXPERIMENT_FILES, LETTERS, POOL_TASKS, TASK_TYPES, Row, TaskType

# What the scripts that started this line of work call the same fields.
OLD_NAMES = {"description": "object_name", "image_path": "image"}


def read_jsonl(path: Path) -> tuple[list[tuple[int, dict]], list[Fault]]:
    """(line number, object) pairs of a JSONL file, and the faults of the lines that are none.

    Blank lines, a byte-order mark and Windows line ends are accepted. Lines end at a line feed only: U+2028 and its
    like may stand inside strings.
    """
    rows, faults = [], []
    if not path.is_file():
        return rows, [Fault(str(path), "there is no such file.", "Make the data again or correct the folder's name.")]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return rows, [Fault(str(path), f"byte {error.start} is not UTF-8.", "Save the file as UTF-8.")]
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            reason, advice = f"not JSON ({error.msg}).", "Correct the line or remove it."
            faults.append(Fault(f"{path}:{number}", reason, advice, of_row=True))
            continue
        if isinstance(value, dict):
            rows.append((number, value))
        else:
            reason = f"a {type(value).__name__}, not an object with fields."
            faults.append(Fault(f"{path}:{number}", reason, "Write one JSON object a line.", of_row=True))
    if not rows and not faults:
        faults.append(Fault(str(path), "the file has no rows.", "Make the data again."))
    return rows, faults


def _modern(record: dict, task: TaskType) -> dict:
    """The record under today's field names; folders of the original scripts are read as they are."""
    record = dict(record)
    for new, old in OLD_NAMES.items():
        if new not in record and old in record:
            record[new] = record[old]
    options = record.get("options")
    if isinstance(options, dict) and sorted(options) == list(LETTERS):
        record.setdefault(task.options or "choices", [options[letter] for letter in LETTERS])
        if record.get("answer") in task.answers:
            record.setdefault("correct_index", LETTERS.index(record["answer"]))
    return record


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


def _answer(record: dict, task: TaskType) -> str:
    if task.format == CHOICE:
        return LETTERS[record["correct_index"]]
    return record["label" if task.format == CW else "description"]


def read_rows(
    path: Path, task: str, source: str, groups: dict[str, str], roots: tuple[Path, ...] | None = ()
) -> tuple[list[Row], list[Fault]]:
    """The rows of one file and all its faults.

    Args:
        path: a JSONL file; image paths in it start from its folder, see `find_image`.
        task: a name of `TASK_TYPES`.
        source: what the loss of these rows is reported under.
        groups: entity id -> group, for files whose rows do not say it.
        roots: as in `find_image`.
    """
    kind = TASK_TYPES[task]
    records, faults = read_jsonl(path)
    rows, find = [], cache(lambda name: find_image(path.parent, name, roots))
    for number, raw in records:
        where, record = f"{path}:{number}", _modern(raw, kind)
        reasons, images = [_wrong_field(record, kind)], []
        if reasons == [None]:
            names = record["image_choices"] if kind.options == "image_choices" else [record["image_path"]]
            for name in names:
                try:
                    images.append(find(name))
                except ImageError as error:
                    reasons.append(str(error))
        wrong = [Fault(where, reason, "Correct the line or remove it.", of_row=True) for reason in reasons if reason]
        faults += wrong
        if wrong:
            continue
        entity = str(record.get("entity_id", ""))
        row = Row(
            task=task,
            source=source,
            where=where,
            entity_id=entity,
            group=groups.get(entity, record.get("group")),
            images=tuple(images),
            description=record.get("description"),
            connector=record["connector"].strip(),
            choices=tuple(record.get("choices") or ()),
            answer=_answer(record, kind),
        )
        rows.append(row)
    return rows, faults


def read_entities(folder: Path, roots: tuple[Path, ...] | None = None) -> list[dict]:
    """The entities of an experiment; ids become text.

    Args:
        roots: as in `find_image`, for callers that show the entities' images.

    Raises:
        DataError: entities.json is missing or is no list of objects with an id, or an image may not be read.
    """
    path = folder / "entities.json"
    where = str(path)
    try:
        entities = json.loads(path.read_text(encoding="utf-8-sig"))
        entities = [entity | {"id": str(entity.get("id", entity.get("entity_id")))} for entity in entities]
        for number, entity in enumerate(entities, start=1):
            where = f"{path}: entity {number}"
            for name in entity.get("images") or ():
                if locate_image(folder, name):
                    find_image(folder, name, roots)
        return entities
    except FileNotFoundError:
        fault = Fault(where, "there is no such file.", "Name an experiment that exists in experiment.name.")
    except ImageError as error:
        fault = Fault(where, str(error), "Correct the entity.")
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        fault = Fault(where, f"not a list of entities ({error}).", "Make the data again.")
    raise DataError([fault])


def _read_groups(folder: Path, roots: tuple[Path, ...] | None) -> dict[str, str]:
    """{entity id: group} of an experiment."""
    return {entity["id"]: entity.get("group", "main") for entity in read_entities(folder, roots)}


@dataclass
class RunData:
    """What one run reads: rows by source. `pools` and the retention part of `val` are empty without retention."""

    train: dict[str, list[Row]]
    val: dict[str, list[Row]]
    pools: dict[str, list[Row]]
    files: list[Path]
    notes: list[str] = field(default_factory=list)  # what is not in the files as it is used, and rows left out

    def sources(self) -> list[tuple[str, str, list[Row]]]:
        """(part, source, rows) of everything in it."""
        return [
            (part, source, rows) for part in ("train", "pools", "val") for source, rows in getattr(self, part).items()
        ]


def _image_first(statements: list[Row], judged: list[Row], source: str) -> list[Row]:
    """cw_image rows for a folder without any, such as the original scripts': what its forward rows say as Correct, and
    beside each, as Wrong, a description that a reverse row calls wrong of the same image.

    A forward row whose image no reverse row calls wrong gives none, so that the answers stay balanced.
    """
    wrong = defaultdict(list)
    for row in judged:
        if row.answer == "Wrong":
            wrong[row.images[0]].append(row.description)
    rows = []
    for row in statements:
        if texts := wrong[row.images[0]]:
            texts.append(texts.pop(0))  # the partners take turns
            for answer, text in (("Correct", row.description), ("Wrong", texts[-1])):
                made = {"source": source, "where": f"{row.where} as cw_image, {answer}", "answer": answer}
                rows.append(replace(row, task="cw_image", description=text, **made))
    return rows


class ExperimentFiles:
    """The row files of one experiment, each read once.

    Args:
        roots: as in `find_image`.

    Attributes:
        groups: {entity id: group}.
        rows: from a file's name without ending, such as forward_train, to its rows; a folder without cw_image files
            gets those rows in memory, see `_image_first`.
        paths, faults: the files that were read, and what is wrong with them.

    Raises:
        DataError: there is no list of entities, without which no row can be judged.
    """

    def __init__(self, folder: Path, roots: tuple[Path, ...] | None):
        self.folder, self.roots, self.groups = folder, roots, _read_groups(folder, roots)
        self.paths: list[Path] = []
        self.faults: list[Fault] = []
        self.rows = cache(self._rows)

    def sources(self, name: str) -> list[str]:
        """The files that rows come from: `name` itself, or the two that cw_image rows are made from in memory."""
        if name.startswith("cw_image") and not (self.folder / f"{name}.jsonl").is_file():
            return [name.replace("cw_image", task) for task in ("forward", "reverse")]
        return [name]

    def has(self, name: str) -> bool:
        return all((self.folder / f"{source}.jsonl").is_file() for source in self.sources(name))

    def _rows(self, name: str) -> list[Row]:
        sources = self.sources(name)
        if sources != [name]:
            if self.has(name):
                return _image_first(*map(self.rows, sources), source=name)
            reason = f"there is no such file, nor {' and '.join(sources)} to make its rows from."
            advice = "Add one, or teach main by generation only: experiment.taught=generation."
            self.faults.append(Fault(str(self.folder / f"{name}.jsonl"), reason, advice))
            return []
        self.paths.append(self.folder / f"{name}.jsonl")
        rows, faults = read_rows(self.paths[-1], EXPERIMENT_FILES[name].name, name, self.groups, self.roots)
        self.faults += faults
        return rows

    def test_connectors(self) -> set[str]:
        """The connectors that the experiment's test asks with."""
        tests = [self.folder / f"{name}.jsonl" for name in EXPERIMENT_FILES if name.endswith("_test")]
        records = [record for path in tests if path.is_file() for _, record in read_jsonl(path)[0]]
        return {str(record.get("connector", "")).strip() for record in records}


def read_experiment(folder: Path, roots: tuple[Path, ...] | None = ()) -> tuple[dict[str, list[Row]], list[Fault]]:
    """All rows of an experiment, as {file name without its end: rows}, and the faults, see `ExperimentFiles`."""
    files = ExperimentFiles(folder, roots)
    return {name: files.rows(name) for name in EXPERIMENT_FILES if files.has(name)}, files.faults


def uses_retention(config: Config) -> bool:
    """Whether this run's task is mixed with retention rows."""
    return config.experiment.task in config.retention.tasks and config.retention.retention_ratio > 0


def _pool_shares(retention: RetentionConfig) -> dict[str, float]:
    """The share of each kind of pool; a pool whose share is 0 is not needed."""
    shares = {"face": retention.face_share, "object": float(1 - Fraction(str(retention.face_share)))}
    return {kind: share for kind, share in shares.items() if share}


def source_weights(retention: RetentionConfig) -> dict[str, float]:
    """The share of each retention source, such as face_cw, before it is turned into rows."""
    shares, weights = _pool_shares(retention), vars(retention.weights)
    return {f"{kind}_{task}": share * weight for kind, share in shares.items() for task, weight in weights.items()}


def _file_of_pool(folder: Path, task: str, split: str) -> Path:
    """A pool's file; the original scripts put `retention_` before its name."""
    old = folder / f"retention_{task}_{split}.jsonl"
    return old if old.is_file() else folder / f"{task}_{split}.jsonl"


def read_run_data(config: Config) -> tuple[RunData, list[Fault]]:
    """All rows that a training run of `config` uses, and the faults of all their files.

    Main takes part in what `experiment.taught` says, control entities in all of `CONTROL_IS_TAUGHT`. Rows of a pool
    of the kit's own that ask with a connector of the experiment's test are left out, and counted in the notes.

    Raises:
        DataError: there is no list of entities, without which no row can be judged.
    """
    roots = image_roots(config)
    files, faults = ExperimentFiles(experiment_dir(config), roots), []
    taught, groups = config.experiment.main_is_taught, set(files.groups.values())
    data = RunData({}, {}, {}, files.paths)
    for split, target in (("train", data.train), ("val", data.val)):
        for task in dict.fromkeys(taught + CONTROL_IS_TAUGHT if "control" in groups else taught):
            rows = files.rows(f"{task}_{split}")
            target[task] = [replace(row, source=task) for row in rows if task in taught or row.group == "control"]
            if len(files.sources(f"{task}_{split}")) > 1:
                data.notes.append(f"{len(rows):,} {task} rows of {split} are made in memory: the folder has none")
    for kind, pool in pool_folders(config).items() if uses_retention(config) else ():
        if not pool.is_dir():
            advice = "Open notebooks/data.ipynb, which makes it, or set retention.retention_ratio=0."
            faults.append(Fault(str(pool), f"there is no {kind} pool.", advice))
            continue
        asked = files.test_connectors() if (pool / "pool_info.json").is_file() else set()
        for name, task in POOL_TASKS.items():
            source = f"{kind}_{name}"
            for split, target in (("train", data.pools), ("val", data.val)):
                files.paths.append(_file_of_pool(pool, name, split))
                rows, more = read_rows(files.paths[-1], task.name, source, files.groups, roots)
                faults += more
                target[source] = [row for row in rows if row.connector not in asked]
                if left := len(rows) - len(target[source]):
                    data.notes.append(f"{left:,} of {len(rows):,} {source} rows of {split} ask with a test's connector")
    return data, files.faults + faults


def pool_folders(config: Config) -> dict[str, Path]:
    """The pools this run draws from, by kind."""
    folders = {"face": config.retention.face_pool, "object": config.retention.object_pool}
    return {kind: resolve(folders[kind]) for kind in _pool_shares(config.retention)}
