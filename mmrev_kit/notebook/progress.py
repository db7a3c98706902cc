"""Progress of a run, read from its history file: a live figure in JupyterLab, a few plain lines elsewhere."""

from pathlib import Path

from mmrev_kit.notebook import plots
from mmrev_kit.notebook.parameters import is_interactive
from mmrev_kit.training.history import read_history

LINES_PER_RUN = 10  # lines between the epochs' own, so that a rendered notebook stays short


def loss_text(loss: float | None) -> str:
    """A loss in four digits; None, which stands for NaN in a history, in words."""
    return "not finite" if loss is None else f"{loss:.4g}"


def epoch_line(record: dict, num_epochs: int | None) -> str:
    """One epoch in one line of text."""
    decision = record["decision"]
    losses = ", ".join(f"{source} {loss_text(loss)}" for source, loss in record["val_loss"].items())
    if decision["improved"]:
        verdict = "improved, saved as best"
    elif decision["reduced"]:
        verdict = f"no improvement, rate reduced to {decision['lr']:g}"
    else:
        verdict = f"no improvement ({decision['bad_epochs']} in a row)"
    of = f"/{num_epochs}" if num_epochs else ""
    end = f"; ends: {decision['stop']}" if decision["stop"] else ""
    return (
        f"epoch {record['epoch']}{of}: train {loss_text(record['train_loss'])}, validation {losses}, "
        f"lr {record['lr']:g}, {verdict}, {record['seconds']:.0f} s{end}"
    )


class Progress:
    """Shows what a history file has gained since the last look."""

    def __init__(self, path: Path):
        self.path = path
        self._changed = path.stat().st_mtime if path.is_file() else 0.0  # what is there may be to be replaced
        self._epochs = 0
        self._tenth = 0
        self._display = None

    def show(self, last: bool = False) -> None:
        """Look once; `last` closes the live figure, whose place the notebook's own figure takes."""
        try:
            changed = self.path.stat().st_mtime
        except FileNotFoundError:
            return
        if changed == self._changed and not last:
            return
        self._changed = changed
        history = read_history(self.path)
        self._print_new(history)
        if is_interactive() and history["steps"]:
            self._draw(history)

    def _print_new(self, history: dict) -> None:
        total, per_epoch = history.get("total_steps"), history.get("steps_per_epoch")
        for record in history["epochs"][self._epochs :]:
            print(epoch_line(record, total // per_epoch if total else None), flush=True)
        fresh_epoch = len(history["epochs"]) > self._epochs
        self._epochs = len(history["epochs"])
        if not history["steps"] or not total:
            return
        step = history["steps"][-1]
        tenth = LINES_PER_RUN * step["global_step"] // total
        if tenth > self._tenth and not fresh_epoch and step["global_step"] % per_epoch:
            loss = loss_text(step["loss"])
            rate = f"{step['samples_per_second']:.1f} samples/s"
            print(f"step {step['global_step']}/{total}: loss {loss}, {rate}", flush=True)
        self._tenth = max(self._tenth, tenth)

    def _draw(self, history: dict) -> None:
        from IPython.display import display

        figure = plots.history_figure({self.path.parent.name: history})
        if self._display is None:
            self._display = display(figure, display_id=True)
        else:
            self._display.update(figure)


class LogLines:
    """Shows the lines of a log that begin with `progress: `, each once."""

    def __init__(self, path: Path):
        self.path = path
        self._read = path.stat().st_size if path.is_file() else 0

    def show(self) -> None:
        """Print what has come since the last look."""
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._read)
            text = log.read()
            whole = text[: text.rfind("\n") + 1]
            self._read += len(whole.encode())
        for line in whole.splitlines():
            if line.startswith("progress: "):
                print(line.removeprefix("progress: "), flush=True)
