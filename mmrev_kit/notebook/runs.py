"""The runs of an output folder: how each stands, and those under way shown while they go on."""

import json
import time
from pathlib import Path

from mmrev_kit.config.project import resolve
from mmrev_kit.config.reading import split_paths
from mmrev_kit.notebook.parameters import is_interactive
from mmrev_kit.notebook.progress import LogLines, Progress
from mmrev_kit.training.history import read_history
from mmrev_kit.training.lock import describe, read_holder

HISTORY, LOG = "training_history.json", "train.log"


class Watch:
    """What a run's history and log have gained, shown at each call."""

    def __init__(self, folder: Path):
        self.progress, self.log = Progress(folder / HISTORY), LogLines(folder / LOG)

    def __call__(self, last: bool = False) -> None:
        self.log.show()
        self.progress.show(last)


def watch(folders: list[Path]) -> None:
    """Show runs that somebody else started, until the last of them has ended.

    Raises:
        KeyboardInterrupt: the showing was ended; the runs go on.
    """
    shows = [Watch(folder) for folder in folders]
    try:
        while any([read_holder(folder) for folder in folders]):
            for show in shows:
                show()
            time.sleep(1)
    except KeyboardInterrupt:
        print("no longer shown; the run goes on" if len(folders) == 1 else "no longer shown; the runs go on")
        raise KeyboardInterrupt from None
    for show in shows:
        show(last=True)


def follow(paths: str | None, output_dir: str) -> None:
    """Show the runs that are under way until their end, in JupyterLab; elsewhere only say which they are.

    An interrupt ends the showing and is no error: what comes next shows the runs as they stand.

    Args:
        paths: run folders or files in them, see `find_histories`; None: all of `output_dir`.
    """
    given = (
        [resolve(path) for path in split_paths(paths, "histories")] if paths else sorted(resolve(output_dir).glob("*"))
    )
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in given)
    holders = {folder: holder for folder in folders if (holder := read_holder(folder))}
    for folder, holder in holders.items():
        print(f"{folder.name} is under way: {describe(holder)}", flush=True)
    if not holders:
        print("No run is under way.")
    elif is_interactive():
        print("Shown here until the end; an interrupt ends the showing, not the run.", flush=True)
        try:
            watch(list(holders))
        except KeyboardInterrupt:
            return


def run_table(output_dir: str):
    """A pandas DataFrame, one row a run: its task, how it stands, its epochs, lowest validation loss and verdict."""
    import pandas

    records = {}
    for file in sorted(resolve(output_dir).glob(f"*/{HISTORY}")):
        history, folder = read_history(file), file.parent
        losses = [next(iter(record["val_loss"].values()), None) for record in history["epochs"]]
        planned = (history.get("total_steps") or 0) // (history.get("steps_per_epoch") or 1)
        status = history["status"] if history["status"] != "running" else "killed; run it again to go on"
        verdicts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("eval/*/verdict.json"))]
        records[folder.name] = {
            "task": history.get("task") or "",
            "state": "under way" if read_holder(folder) else status,
            "epochs": f"{len(losses)} of {planned}" if planned else str(len(losses)),
            "lowest validation loss": min((loss for loss in losses if loss is not None), default=None),
            "verdict": "; ".join(verdict["claim"] for verdict in verdicts) or "not evaluated",
        }
    return pandas.DataFrame.from_dict(records, orient="index").rename_axis("run")
