"""Progress of a run: its log's lines in a rendered notebook, a line and a live figure in JupyterLab."""

import re
from html import escape
from pathlib import Path

from mmrev_kit.config.reporting import MARK
from mmrev_kit.notebook import plots
from mmrev_kit.notebook.parameters import is_interactive
from mmrev_kit.training.history import read_history, step_line

OF_TRAINING = re.compile(r"\d+%, epoch |epoch \d")  # what `step_line` and `epoch_line` write


class Progress:
    """In JupyterLab, what a history file has gained since the last look: one line, and a figure under it."""

    def __init__(self, path: Path):
        self.path = path
        self._changed = path.stat().st_mtime if path.is_file() else 0.0  # what is there may be to be replaced
        self._displays: list = []

    def show(self, last: bool = False) -> None:
        """Look once; `last` looks even where nothing has changed."""
        if not is_interactive() or not self.path.is_file():
            return
        changed = self.path.stat().st_mtime
        if changed == self._changed and not last:
            return
        self._changed = changed
        history = read_history(self.path)
        if history["steps"] and "total_steps" in history:
            self._draw(history)

    def _draw(self, history: dict) -> None:
        from IPython.display import HTML, display

        line = HTML(f"<div style='font-family:monospace'>{escape(step_line(history))}</div>")
        shown = [line, plots.history_figure({self.path.parent.name: history})]
        for index, one in enumerate(shown):
            if index < len(self._displays):
                self._displays[index].update(one)
            else:  # one by one: an interrupt may come between them
                self._displays.append(display(one, display_id=True))


class LogLines:
    """Shows the lines of a log that begin with `MARK`, each once; in JupyterLab not those that `Progress` shows.

    Args:
        from_start: those too that are there already.
    """

    def __init__(self, path: Path, from_start: bool = False):
        self.path, self._all = path, from_start
        self._read = path.stat().st_size if path.is_file() and not from_start else 0

    def show(self) -> None:
        """Print what has come since the last look."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as log:
            log.seek(self._read)
            content = log.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            told = line.removeprefix(MARK)
            if told != line and (self._all or not (is_interactive() and OF_TRAINING.match(told))):
                print(told, flush=True)
