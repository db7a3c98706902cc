"""A run's folder and its history, in strict JSON."""

import json
import math
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmrev_kit.config.project import experiment_dir, hide_secrets, run_dir
from mmrev_kit.config.reading import differences, load_config, to_yaml
from mmrev_kit.config.reporting import MARK, Pace, decimal, duration, loss_text, timing
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.tasks import TASK_TYPES
from mmrev_kit.files import DiskFull, write_json, write_text
from mmrev_kit.training.tracking import epoch_numbers, group_shares, step_numbers

ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors")
# What a run writes, in the order in which another run that replaces it takes it away: no part of it looks whole.
OWN_FILES = ("training_history.json", "manifest.json", "config.yaml")
STATE = ("adapter.safetensors", "optimizer.safetensors", "state.json")
OWN_FOLDERS = {"last": STATE, "final": ADAPTER, "best": ADAPTER}
JOB = "job.yaml"  # the configuration of the job that is under way in a folder
SECONDS_BETWEEN_WRITES = 2.0
# How the keys begin that may differ between the parts of one run.
NOT_TRAINING = (
    "adapter.", "evaluation.", "memory.", "launch.overwrite", "launch.output_dir", "launch.cpu_gib", "launch.tracking",
    "training.save_steps",
)  # fmt: skip


class History:
    """The record of a run, written to training_history.json as it grows.

    `data` holds status ("running", "finished", "interrupted", "failed"), reason, task, total_steps, steps_per_epoch,
    `steps` (one record an optimizer step, see `update.update`) and `epochs` (one record a validation, with
    `evaluation.by_epoch` also `tests`, see `by_epoch.ask`, and `tests_seconds`, part of `seconds`).
    """

    def __init__(self, path: Path):
        self.path = path
        self.data = {"status": "running", "reason": None, "steps": [], "epochs": []}
        self._written, self._pace = 0.0, None
        self.tracker: Any = None  # see `tracking.start_tracker`

    def begin(self) -> None:
        """Write the file; from now on each step has `seconds`, those of training so far, and lines tell of it."""
        steps = self.data["steps"]
        spent = steps[-1].get("seconds", 0.0) if steps else 0.0
        self._pace = Pace(self.data["total_steps"], "updates", len(steps), spent)
        self.write()

    def add_step(self, record: dict) -> None:
        """Add a step; the file follows at most every `SECONDS_BETWEEN_WRITES`."""
        self.data["steps"].append(record | ({"seconds": self._pace.elapsed} if self._pace else {}))
        if self.tracker:
            self.tracker.log(finite_only(step_numbers(record)), step=record["global_step"])
        if self._pace and self._pace.due(record["global_step"]):
            print(f"{MARK}{step_line(self.data)}", flush=True)
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.write()

    def add_epoch(self, record: dict) -> None:
        """Add an epoch and write the file."""
        self.data["epochs"].append(record)
        self.write()
        if self.tracker:
            self.tracker.log(finite_only(epoch_numbers(record)), step=len(self.data["steps"]))
        if self._pace:
            num_epochs = self.data["total_steps"] // self.data["steps_per_epoch"]
            print(f"{MARK}{epoch_line(record, num_epochs)}", flush=True)
            if "tests" in record:
                print(f"{MARK}{asked_line(record)}", flush=True)

    def end(self, status: str, reason: str | None) -> None:
        """Record how the run ended and write the file."""
        self.data |= {"status": status, "reason": reason and hide_secrets(reason)}
        if self.tracker:
            self.tracker.finish()
        self.write()

    def write(self) -> None:
        """Write the file now."""
        write_json(self.path, self.data)
        self._written = time.monotonic()


def finite_only(numbers: dict[str, float]) -> dict[str, float]:
    """Those that a tracker can draw."""
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def step_line(history: dict) -> str:
    """Where a run stands after its latest step: share, epoch, update, loss, speed, elapsed and remaining time."""
    step, total, per_epoch = history["steps"][-1], history["total_steps"], history["steps_per_epoch"]
    done, spent = step["global_step"], step.get("seconds")
    speeds = [one["samples_per_second"] for one in history["steps"][-10:]]
    speed = len(speeds) / sum(1 / one for one in speeds)
    line = f"{done / total:.0%}, epoch {step['epoch']}/{total // per_epoch}, update {done:,}/{total:,}: "
    line += f"loss {loss_text(step['loss'])}, {decimal(speed, 1)} samples/s"
    return line if spent is None else f"{line}, {timing(spent, spent / done * (total - done))}"


def epoch_line(record: dict, num_epochs: int) -> str:
    """One epoch in one line of text."""
    decision = record["decision"]
    losses = ", ".join(f"{source} {loss_text(loss)}" for source, loss in record["val_loss"].items())
    if decision["improved"]:
        verdict = "improved, saved as best"
    elif decision["reduced"]:
        verdict = f"no improvement, rate reduced to {decision['lr']:g}"
    else:
        verdict = f"no improvement ({decision['bad_epochs']} in a row)"
    end = f"; ends: {decision['stop']}" if decision["stop"] else ""
    return (
        f"epoch {record['epoch']}/{num_epochs}: train {loss_text(record['train_loss'])}, validation {losses}, "
        f"lr {record['lr']:g}, {verdict}, {duration(record['seconds'])}{end}"
    )


def asked_line(record: dict) -> str:
    """An epoch's tests in one line of text: accuracy by test, main / control."""
    shares = {TASK_TYPES[test].title: groups for test, groups in group_shares(record).items()}
    parts = [f"{title} {' / '.join(map(decimal, groups.values()))}" for title, groups in shares.items()]
    groups = " / ".join(next(iter(shares.values())))
    return f"tests after epoch {record['epoch']} ({groups}): {', '.join(parts)}, {record['tests_seconds']:.1f} s"


def mark_ended(path: Path, status: str) -> None:
    """Say in a history that its run was interrupted, or has failed, where it had no time left to say so itself."""
    if path.is_file() and (history := read_history(path))["status"] == "running":
        try:
            write_json(path, history | {"status": status, "reason": "ended before it could save once more"})
        except DiskFull:
            overwrite_status(path)


def overwrite_status(path: Path) -> None:
    """Turn a history's status from running to failed where no disk space is left: the bytes are replaced in place."""
    with suppress(OSError), path.open("r+b") as file:
        place = file.read(100).find(b'"running"')
        if place >= 0:
            file.seek(place)
            file.write(b'"failed" ')


def _number(value):
    """A number, or None for what is none (NaN was written into such files as NaN, null or text)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_history(path: str | Path) -> dict:
    """A run's history; the original scripts' files (`train_loss`, `val_loss`, `epochs`, `step_logs`) too.

    Returns:
        The kit's own form (see `History`); what an old file does not say is None.

    Raises:
        ConfigError: the file is no JSON object with a history in it.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ConfigError(f"{path}: not JSON ({error}).") from None
    if not isinstance(data, dict) or not {"steps", "train_loss", "val_loss", "step_logs"} & set(data):
        raise ConfigError(f"{path}: no training history (neither `steps` nor `train_loss` in it).")
    for name in ("steps", "train_loss", "val_loss", "step_logs", "epochs"):
        if not isinstance(data.get(name) or [], list):
            raise ConfigError(f"{path}: {name} is not a list.")
    for name in ("steps", "step_logs"):
        if not all(isinstance(record, dict) for record in data.get(name) or []):
            raise ConfigError(f"{path}: {name} is not a list of records.")
    for record in data.get("steps") or []:
        if "matrix_share" in record:  # as the first version called it
            record["mfu"] = record.pop("matrix_share")
    return data if "steps" in data and "status" in data else _from_original_scripts(data)


def _from_original_scripts(data: dict) -> dict:
    steps = []
    for number, log in enumerate(data.get("step_logs") or [], start=1):
        step = log.get("global_step", log.get("step"))
        steps.append(
            {
                "global_step": number if step is None else step,
                "epoch": log.get("epoch"),
                "loss": _number(log.get("loss", log.get("train_loss"))),
                "lr": _number(log.get("lr", log.get("learning_rate"))),
                "grad_norm": _number(log.get("grad_norm")),
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


def clear_errors(folder: Path) -> None:
    """Forget the errors of an earlier try."""
    for error in folder.glob("error_rank[0-9]*.txt"):
        error.unlink()


def changed_settings(config: Config, saved: Path) -> str:
    """What training depends on and is set otherwise in a saved configuration: each key with its values there and now.

    How the work is split (`memory`), how a run is asked afterwards (`evaluation`) and where it lies do not count. An
    empty text: nothing is, or there is no such file.
    """
    if not saved.is_file():
        return ""
    before = load_config(saved)
    changed = {key: pair for key, pair in differences(before, config).items() if not key.startswith(NOT_TRAINING)}
    if before.experiment.main_is_taught == config.experiment.main_is_taught:
        changed.pop("experiment.taught", None)
    if experiment_dir(before) == experiment_dir(config):
        changed = {key: pair for key, pair in changed.items() if key not in ("data.dir", "data.folder")}
    return ", ".join(f"{key} ({old!r} there, {new!r} now)" for key, (old, new) in changed.items())


def not_of_a_run(folder: Path) -> list[Path]:
    """What lies in a run folder in the place of a run's own files, or among them, and was not written by a run."""
    found = [folder / name for name in OWN_FILES if (folder / name).is_symlink() or (folder / name).is_dir()]
    for name, own in OWN_FOLDERS.items():
        inner = folder / name
        if inner.is_symlink() or inner.is_file():
            found.append(inner)
        elif inner.is_dir():
            found += [path for path in sorted(inner.iterdir()) if path.name not in own or not path.is_file()]
    return found


def prepare_folder(config: Config) -> dict | None:
    """Look whether a run may go into its folder, whose lock is held; nothing in it is changed but errors forgotten.

    Returns:
        The history of a run that is finished and not to be replaced, else None.

    Raises:
        ConfigError: the folder holds a run with another configuration, or something that a run did not write where its
            files would be replaced.
    """
    folder = run_dir(config)
    history = folder / "training_history.json"
    if not config.launch.overwrite:
        if changed := changed_settings(config, folder / "config.yaml"):
            raise ConfigError(
                f"{folder} holds a run with another configuration: {changed}. "
                "Choose another experiment.name, or set launch.overwrite=true to replace that run."
            )
        if history.is_file() and (found := read_history(history))["status"] == "finished":
            return found
    if others := not_of_a_run(folder):
        named = ", ".join(map(str, others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ConfigError(f"{named}: not written by a run, which would replace it. Move it, or choose another name.")
    clear_errors(folder)
    return None


def begin_run(config: Config) -> None:
    """Make the folder that of this run, whose checks are done: with `launch.overwrite` the run that is there goes.

    It goes by renaming into one folder, which `tidy` removes where a kill has left it. Its evaluations are no longer
    found: they go without the file that is written last.
    """
    folder = run_dir(config)
    folder.mkdir(parents=True, exist_ok=True)
    if config.launch.overwrite:
        gone = Path(tempfile.mkdtemp(dir=folder, prefix=".replaced.new."))
        facts = [path.relative_to(folder) for path in folder.glob("eval/*/facts.json")]
        for number, name in enumerate([*OWN_FILES, *OWN_FOLDERS, *facts]):
            if (folder / name).exists():
                os.replace(folder / name, gone / str(number))
        shutil.rmtree(gone)
    write_text(folder / "config.yaml", to_yaml(config))
