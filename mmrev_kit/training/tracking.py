"""Trackers: what a run's history gains is shown in TensorBoard, Trackio or Weights & Biases, too, by accelerate's own.

Without a network they write to this machine. Who logs in does so as the tracker says: no token is a setting here.
"""

import netrc
import os
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from urllib.parse import urlsplit
from uuid import uuid4

from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.tasks import GROUPS
from mmrev_kit.training.zero import refuse_mode

PROJECT = "mmrev_kit"


def refuse_missing(config: Config) -> None:
    """Raises ConfigError where a training lacks its tracker's package, or cannot run in its mode: see `refuse_mode`."""
    refuse_mode(config)
    name = config.launch.tracking
    if name and find_spec(name) is None:
        raise ConfigError(
            f"launch.tracking = {name!r}: {name} is not installed. Run pip install {name}, or leave it out."
        )


def start_tracker(run):
    """The configured tracker, an `accelerate.tracking.GeneralTracker`, or None. A run that goes on goes on in it.

    TensorBoard's files lie in the run folder's `tensorboard/`, those of Weights & Biases in its `wandb/`, and Trackio's
    where `TRACKIO_DIR` says.
    """
    name = run.config.launch.tracking
    if name is None:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind, step, facts = LOGGER_TYPE_TO_CLASS[name], run.progress["global_step"], run.history.data
    own = facts.setdefault("tracking", uuid4().hex[:8])  # of this run; another one under its name is another one there
    if name == "tensorboard":
        if step == 0:
            shutil.rmtree(run.folder / name, ignore_errors=True)  # of a run that this one replaces
        tracker = kind(name, run.folder, purge_step=step + 1)
    elif name == "wandb":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        tracker = kind(PROJECT, name=run.folder.name, id=own, resume="allow", dir=str(run.folder), mode=mode)
    else:
        tracker = kind(PROJECT, name=f"{run.folder.name}-{own}", resume="allow")
    tracker.start()
    if step == 0:
        sections = asdict(run.config).items()
        tracker.store_init_configuration(
            {f"{s}.{key}": str(value) for s, part in sections for key, value in part.items()}
        )
    return tracker


def has_key() -> bool:
    """Whether this machine is logged in to Weights & Biases, as its own documentation says that one logs in."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def step_numbers(record: dict) -> dict[str, float]:
    """What a tracker is told of an update."""
    names = ("loss", "lr", "grad_norm", "samples_per_second", "peak_memory_gib")
    return {f"training/{name}": record[name] for name in names if record.get(name) is not None}


def epoch_numbers(record: dict) -> dict[str, float]:
    """What a tracker is told of an epoch: losses, and of the tests each group's accuracy."""
    found = {"epoch/training loss": record["train_loss"]}
    found |= {f"epoch/validation loss/{source}": loss for source, loss in record["val_loss"].items()}
    for test, groups in group_shares(record).items():
        found |= {f"tests/{test}/{group}": share for group, share in groups.items()}
    return found


def group_shares(record: dict) -> dict[str, dict[str, float]]:
    """{test: {group: accuracy}} of an epoch's tests, over rows; empty without `evaluation.by_epoch`."""
    found: dict[str, dict[str, float]] = {}
    for test, people in record.get("tests", {}).items():
        totals: dict[str, list[int]] = {}
        for person in people.values():
            total = totals.setdefault(person["group"], [0, 0])
            total[0], total[1] = total[0] + person["right"], total[1] + person["asked"]
        found[test] = {group: totals[group][0] / totals[group][1] for group in GROUPS if group in totals}
    return found
