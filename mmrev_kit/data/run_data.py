"""What a run reads: an experiment's files and the pools, and which of their rows teach whom."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from hashlib import sha256
from pathlib import Path

from mmrev_kit.config.project import experiment_dir, resolve
from mmrev_kit.config.sections import Config, ConfigError, RetentionConfig
from mmrev_kit.data.faults import Fault
from mmrev_kit.data.images import find_image, image_roots, locate_image
from mmrev_kit.data.records import read_info, read_jsonl
from mmrev_kit.data.rows import read_entities, read_rows
from mmrev_kit.data.tasks import EXPERIMENT_FILES, GROUPS, IDENTITY, POOL_TASKS, Row


@dataclass
class RunData:
    """What one run reads: rows by source. `pools`, of whose rows an epoch draws a share, and their part of `val` are
    empty without retention and identity rows.

    `left_out` are the rows that were read and that the run has no use for.
    """

    train: dict[str, list[Row]]
    val: dict[str, list[Row]]
    pools: dict[str, list[Row]]
    files: list[Path]
    left_out: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is not used as it stands in the files

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
        paths, read, faults: the files that were read, all their rows, and what is wrong with them.

    Raises:
        DataError: there is no list of entities, without which no row can be judged.
    """

    def __init__(self, folder: Path, roots: tuple[Path, ...] | None):
        self.folder, self.roots = folder, roots
        self.groups = {entity["id"]: entity.get("group", "main") for entity in read_entities(folder, roots)}
        self.paths: list[Path] = []
        self.read: list[Row] = []
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
        self.read += rows
        return rows


def read_experiment(folder: Path, roots: tuple[Path, ...] | None = ()) -> tuple[dict[str, list[Row]], list[Fault]]:
    """All rows of an experiment, as {file name without its end: rows}, and the faults, see `ExperimentFiles`."""
    files = ExperimentFiles(folder, roots)
    return {name: files.rows(name) for name in EXPERIMENT_FILES if files.has(name)}, files.faults


def read_connectors(folder: Path, split: str) -> dict[str, Counter]:
    """{file name without its end: {connector: rows that ask with it}} of an experiment's files of one split."""
    paths = {name: folder / f"{name}.jsonl" for name in EXPERIMENT_FILES if name.endswith(f"_{split}")}
    records = {name: read_jsonl(path)[0] for name, path in paths.items() if path.is_file()}
    return {name: Counter(str(one.get("connector", "")).strip() for _, one in part) for name, part in records.items()}


def trained_connectors(folder: Path) -> tuple[list[str], list[Fault]]:
    """Tests that ask with a connector of the training files' rows of their direction: a note each, or, in a folder for
    which the kit has split the connectors, a fault.

    Raises:
        DataError: what the kit noted cannot be read.
    """
    trained, notes, faults = defaultdict(set), [], []
    for name, words in read_connectors(folder, "train").items():
        trained[EXPERIMENT_FILES[name].connectors] |= words.keys()
    for name, words in read_connectors(folder, "test").items():
        if shared := sorted(words.keys() & trained[EXPERIMENT_FILES[name].connectors]):
            named = ", ".join(map(repr, shared[:3])) + (", …" if len(shared) > 3 else "")
            count = sum(words[word] for word in shared)
            notes.append(
                f"{count:,} of {words.total():,} {name} rows ask with a connector of the training rows: {named}"
            )
            faults.append(Fault(str(folder / f"{name}.jsonl"), f"{notes[-1]}.", "Restore it, or make the data again."))
    return ([], faults) if "connectors" in read_info(folder) else (notes, [])


def people_digest(config: Config) -> str:
    """A SHA-256 of who a configuration's people are: entities.json, and the bytes of the pictures that it names."""
    folder, roots = experiment_dir(config), image_roots(config)
    digest = sha256((folder / "entities.json").read_bytes())
    for name in (name for entity in read_entities(folder, roots) for name in entity["images"]):
        if locate_image(folder, name):
            digest.update(sha256(find_image(folder, name, roots).read_bytes()).digest())
    return digest.hexdigest()


def check_bridge(config: Config, sizes: Counter) -> None:
    """Make sure that what is set of the group bridge is so.

    Args:
        sizes: people by group.

    Raises:
        ConfigError: nobody, or not the share of `data.share_both`, is in it.
    """
    share, found = config.data.share_both, sizes["bridge"]
    if config.mitigation.format_bridge and not (share or found):
        advice = "Set data.share_both=0.5, too, or write the group bridge into a list of your own"
        raise ConfigError(f"mitigation.format_bridge = true: nobody is in the group bridge. {advice}.")
    people = sizes["main"] + found
    wanted = replace(config.data, num_main=people).group_sizes["bridge"]
    if share and found != wanted:
        reason = f"{found} of the {people} people besides control are in the group bridge, not {wanted}"
        raise ConfigError(f"data.share_both = {share:g}: {reason}. Choose another data.folder, or leave this out.")


def _identity_rows(files: ExperimentFiles, split: str) -> list[Row]:
    """Identity rows: a description is answered with itself, and no picture is there (configs/README.md, Conditions).

    Each forward row of the split gives two, with its own connector and those of the split's reverse rows in turn: one
    in plain words, `description connector`, one on the way there and back, `description reverse-connector a picture
    that connector`. So both speak of all people, and with no connector of the test.
    """
    statements, back = files.rows(f"forward_{split}"), [row.connector for row in files.rows(f"reverse_{split}")]
    back, rows = list(dict.fromkeys(back)), []
    for number, row in enumerate(statements if back else []):
        composed = f"{back[number % len(back)]} a picture that {row.connector}"
        for kind, words in (("plain", row.connector), ("composed", composed)):
            where, source = f"{row.where} as identity, {kind}", IDENTITY.name
            rows.append(replace(row, task=source, source=source, images=(), connector=words, where=where))
    return rows


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

    Each group takes part in what `Config.taught` says. Rows of a pool of the kit's own that ask with a connector of the
    experiment's test are left out, and counted in the notes; see also `trained_connectors`.

    Raises:
        DataError: there is no list of entities, without which no row can be judged.
        ConfigError: see `check_bridge`.
    """
    roots = image_roots(config)
    files, read = ExperimentFiles(experiment_dir(config), roots), []
    taught, sizes = config.taught, Counter(files.groups.values())
    check_bridge(config, sizes)
    present = ["main", *(group for group in ("control", "bridge") if sizes[group])]
    tasks = dict.fromkeys(task for group in present for task in taught[group])
    data = RunData({}, {}, {}, files.paths)
    data.notes, faults = trained_connectors(files.folder)
    for split, target in (("train", data.train), ("val", data.val)):
        for task in tasks:
            rows = files.rows(f"{task}_{split}")
            target[task] = [replace(row, source=task) for row in rows if task in taught.get(row.group, taught["main"])]
            if len(files.sources(f"{task}_{split}")) > 1:
                data.notes.append(f"{len(rows):,} {task} rows of {split} are made in memory: the folder has none")
    if config.mitigation.identity:
        for split, target in (("train", data.pools), ("val", data.val)):
            target[IDENTITY.name] = _identity_rows(files, split)
        shown = Counter({row.entity_id: row.group for row in data.pools[IDENTITY.name]}.values())
        told = ", ".join(f"{shown[group]} {group}" for group in GROUPS if shown[group])
        data.notes.append(f"identity rows name the descriptions of {told} people, without a picture")
    tested = set().union(*read_connectors(files.folder, "test").values())
    for kind, pool in pool_folders(config).items() if uses_retention(config) else ():
        if not pool.is_dir():
            advice = "Open notebooks/data.ipynb, which makes it, or set retention.retention_ratio=0."
            faults.append(Fault(str(pool), f"there is no {kind} pool.", advice))
            continue
        asked = tested if (pool / "pool_info.json").is_file() else set()
        for name, task in POOL_TASKS.items():
            source = f"{kind}_{name}"
            for split, target in (("train", data.pools), ("val", data.val)):
                files.paths.append(_file_of_pool(pool, name, split))
                rows, more = read_rows(files.paths[-1], task.name, source, {}, roots)
                faults, read = faults + more, read + rows
                target[source] = [row for row in rows if row.connector not in asked]
                if left := len(rows) - len(target[source]):
                    told = f"rows of {split} are left out: they ask with a test's connector"
                    data.notes.append(f"{left:,} of {len(rows):,} {source} {told}")
    used = {row.where for _, _, rows in data.sources() for row in rows}
    data.left_out = [row for row in files.read + read if row.where not in used]
    return data, files.faults + faults


def pool_folder(config: Config, kind: str) -> Path:
    """Where the face or the object pool lies."""
    return resolve({"face": config.retention.face_pool, "object": config.retention.object_pool}[kind])


def pool_folders(config: Config) -> dict[str, Path]:
    """The pools this run draws from, by kind."""
    return {kind: pool_folder(config, kind) for kind in _pool_shares(config.retention)}
