"""Run folders: files that are whole or absent, and a history in strict JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mmrev_kit.config import Config, ConfigError, differences, hide_secrets, load_config, run_dir, to_yaml

OWN_FILES = ("config.yaml", "manifest.json", "training_history.json", "train.log")
OWN_FOLDERS = ("best", "final", "last")
FULL = (errno.ENOSPC, errno.EDQUOT)
UNFINISHED = re.compile(r"\.(.+)\.(aside|(new|part)\.[a-z0-9_]{8})")  # names that only a kill leaves behind


class DiskFull(OSError):
    """No space left for a file or folder; the message says which, how much it needs and how much is free."""

    def __str__(self) -> str:
        return self.strerror


@contextmanager
def needing(path: Path, size: int | None = None):
    """Within it `path` is written, which takes `size` bytes (None: not known).

    Raises:
        DiskFull: in place of the system's error, which names neither.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter, of a file written by safetensors, has no errno
        numbers = re.findall(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else [error.errno]
        if not any(int(number or 0) in FULL for number in numbers):
            raise
        free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
        needs = f"it needs at least {size:,} bytes; " if size else ""
        raise DiskFull(
            errno.ENOSPC,
            f"No space left for {path}: {needs}{free:,} bytes are free there, or a quota is used up. "
            "What was saved before is whole. Free some space and start again.",
        ) from error


def finite(value):
    """`value` with every NaN and infinity replaced by None, so that strict JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def to_json(value, indent: int | None = 1) -> str:
    """Strict JSON text (RFC 8259): a non-finite number becomes null."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def write_bytes(path: str | Path, content: bytes, sync: bool = True) -> Path:
    """Write beside `path` and rename, so that a crash or a full disk leaves the previous file whole.

    Args:
        sync: wait until the disk has it; needless where a reader can tell a broken file.

    Raises:
        DiskFull: there is no room for it.
    """
    path = Path(path)
    with needing(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.part.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of the text in UTF-8."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value) -> Path:
    """`write_text` of `to_json(value)`."""
    return write_text(path, to_json(value) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> Path:
    """One JSON object a line, written whole or not at all."""
    return write_text(path, "".join(to_json(row, indent=None) + "\n" for row in rows))


@contextmanager
def new_folder(target: str | Path, size: int | None = None):
    """Yield an empty folder beside `target`; on success it takes target's place, on failure it is removed.

    The old folder, if any, is moved aside first and removed last: at every moment one whole version exists. A kill
    between the two renames leaves it as `.NAME.aside`; the next `new_folder` or `tidy` gives it its name back.

    Args:
        size: bytes of what will be written, for the message of a full disk.

    Raises:
        DiskFull: there is no room for it.
    """
    target = Path(target)
    old = target.with_name(f".{target.name}.aside")
    with needing(target, size):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.new."))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            for file in temporary.iterdir():
                os.chmod(file, 0o644)  # safetensors lets nobody else read its files
                _sync(file)
            if target.exists():
                remove_folder(old)
                os.replace(target, old)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _settle(target, old)


def _sync(path: Path) -> None:
    """Wait until the disk has a file; a full disk may show only here. Folders are left to the system."""
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _settle(target: Path, old: Path) -> None:
    """Remove the folder that was moved aside, or give it its name back where nothing has taken it."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Put right what a kill left in a run folder: a version moved aside gets its name back, unfinished ones go.

    No other process may be writing there.
    """
    for path in list(Path(folder).glob(".*")):
        found = UNFINISHED.fullmatch(path.name)
        if found and found[2] == "aside":
            _settle(path.with_name(found[1]), path)
        elif found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class History:
    """The record of a run, written to training_history.json as it grows.

    `data` holds status ("running", "finished", "interrupted", "failed"), reason, task, total_steps, steps_per_epoch,
    `steps` (one record an optimizer step, see `steps.update`) and `epochs` (one record a validation).
    """

    def __init__(self, path: str | Path, data: dict | None = None, seconds_between_writes: float = 2.0):
        self.path = Path(path)
        self.data = data or {"status": "running", "reason": None, "steps": [], "epochs": []}
        self.seconds_between_writes = seconds_between_writes
        self._written = 0.0

    def add_step(self, record: dict) -> None:
        """Add a step; the file follows at most every `seconds_between_writes`."""
        self.data["steps"].append(record)
        if time.monotonic() - self._written >= self.seconds_between_writes:
            self.write()

    def add_epoch(self, record: dict) -> None:
        """Add an epoch and write the file."""
        self.data["epochs"].append(record)
        self.write()

    def end(self, status: str, reason: str | None) -> None:
        """Record how the run ended and write the file."""
        self.data |= {"status": status, "reason": reason and hide_secrets(reason)}
        self.write()

    def write(self) -> None:
        """Write the file now."""
        write_json(self.path, self.data)
        self._written = time.monotonic()


def mark_ended(path: Path, status: str) -> None:
    """Say in a history that its run was interrupted, or has failed, where it had no time left to say so itself."""
    if path.is_file() and (history := read_history(path))["status"] == "running":
        write_json(path, history | {"status": status, "reason": "ended before it could save once more"})


def _number(value):
    """A number, or None for what is none (NaN was written into such files as NaN, null or text)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _first(record: dict, *names):
    return next((record[name] for name in names if name in record), None)


def read_history(path: str | Path) -> dict:
    """A run's history; the original scripts' files (`train_loss`, `val_loss`, `epochs`, `step_logs`) too.

    Returns:
        The kit's own form (see `History`); what an old file does not say is None.

    Raises:
        ValueError: the file is no JSON object with a history in it.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if not isinstance(data, dict) or not {"steps", "train_loss", "val_loss", "step_logs"} & set(data):
        raise ValueError(f"{path}: no training history (neither `steps` nor `train_loss` in it).")
    for name in ("steps", "train_loss", "val_loss", "step_logs", "epochs"):
        if not isinstance(data.get(name) or [], list):
            raise ValueError(f"{path}: {name} is not a list.")
    for name in ("steps", "step_logs"):
        if not all(isinstance(record, dict) for record in data.get(name) or []):
            raise ValueError(f"{path}: {name} is not a list of records.")
    return data if "steps" in data and "status" in data else _from_original_scripts(data)


def _from_original_scripts(data: dict) -> dict:
    steps = []
    for number, log in enumerate(data.get("step_logs") or [], start=1):
        step = _first(log, "global_step", "step")
        steps.append(
            {
                "global_step": number if step is None else step,
                "epoch": _first(log, "epoch"),
                "loss": _number(_first(log, "loss", "train_loss")),
                "lr": _number(_first(log, "lr", "learning_rate")),
                "grad_norm": _number(_first(log, "grad_norm")),
            }
        )
    train, val = data.get("train_loss") or [], data.get("val_loss") or []
    numbers = data.get("epochs") or range(1, max(len(train), len(val)) + 1)
    epochs = []
    for index, number in enumerate(numbers):
        loss = _number(val[index]) if index < len(val) else None
        record = {"epoch": number, "train_loss": _number(train[index]) if index < len(train) else None}
        epochs.append(record | {"val_loss": {"validation": loss}, "lr": None, "decision": None})
    return {"status": "finished", "reason": None, "task": data.get("task"), "steps": steps, "epochs": epochs}


def remove_folder(folder: Path) -> None:
    """Remove a folder that the kit wrote; no folder is no error."""
    shutil.rmtree(folder, ignore_errors=not Path(folder).exists())


def clear_errors(folder: Path) -> None:
    """Forget the errors of an earlier try."""
    for error in folder.glob("error_rank*.txt"):
        error.unlink()


def prepare_folder(config: Config) -> dict | None:
    """Make the run folder ready; returns the history of a run that is already finished, else None.

    Raises:
        ConfigError: the folder holds a run with another configuration, or cannot be written.
    """
    folder = run_dir(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = folder / "config.yaml"
        if config.launch.overwrite:
            tidy(folder)  # or a version moved aside would come back
            for file in [folder / name for name in OWN_FILES]:  # first: no folder that is half gone counts as finished
                file.unlink(missing_ok=True)
            for name in OWN_FOLDERS:
                remove_folder(folder / name)
        elif before.is_file():
            changed = differences(load_config(before), config)
            changed.pop("launch.overwrite", None)
            if changed:
                listed = ", ".join(f"{key} ({old!r} there, {new!r} now)" for key, (old, new) in changed.items())
                raise ConfigError(
                    f"{folder} holds a run with another configuration: {listed}. "
                    "Choose another experiment.name, or set launch.overwrite=true to replace that run."
                )
        clear_errors(folder)
        write_text(before, to_yaml(config))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}). Choose another launch.output_dir.") from None
    history = folder / "training_history.json"
    if history.is_file() and read_history(history)["status"] == "finished":
        return read_history(history)
    return None
