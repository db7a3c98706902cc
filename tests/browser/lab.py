"""Driving JupyterLab: what a notebook is given, its tab, its cells and pictures."""

import re
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
FEW = "data.num_main=4 data.num_control=4 data.image_size=32 retention.retention_ratio=0 evaluation.max_samples=8"
RUN = {"name": "small", "overrides": f"{FEW} experiment.taught=generation training.batch_size=32"}
SWEEP = {"sweep": "configs/sweeps/one.yaml", "num_epochs": 1, "overrides": f"{FEW} training.batch_size=64"}
# What is typed into each notebook's cell of parameters, so that it ends within seconds.
GIVEN = {
    "data": RUN,
    "memory": {"model": "8b", "card": "A100 80", "micro_batch": 4},
    "train": RUN | {"num_epochs": 1},
    "evaluate": RUN | {"drops": "none", "base": False},
    "reproduce": SWEEP,
    "sweep": SWEEP,  # finds what `reproduce` has finished
    "helpers": {"num_epochs": 1, "batch_size": 32, "overrides": "data.num_main=4 data.image_size=32"},
    "pretrain_tiny": {
        "steps": 2, "prompts": 16, "num_faces": 16, "eval_prompts": 4, "workers": 0, "orders": "one",
        "overrides": "muon=false looks=1 log_every=1",
    },
}  # fmt: skip
APART = "data", "helpers", "pretrain_tiny"  # in the other file, so that two processes have as much to do
ONE = "seeds: [0]\ngrid: {experiment.taught: [cw]}\n"  # a sweep of one run

SECONDS = 200  # for all cells of one notebook on a busy machine of two cores

BOOK = "jupyterapp.shell.currentWidget"
CELLS = f"""() => {BOOK}.content.widgets.map((cell, place) => ({{
    place, kind: cell.model.type, source: cell.model.sharedModel.getSource(),
    count: cell.model.executionCount ?? null, outputs: cell.model.outputs?.toJSON() ?? []}}))"""
STATUS = f"() => {BOOK}?.sessionContext?.session?.kernel?.status ?? 'none'"


def give(path: Path, values: dict) -> None:
    """Write values into a notebook's cell of parameters, as a user would type them."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, count = re.subn(rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", cell.source)
        assert count == 1, f"{path.name} has no parameter {name}"
    nbformat.write(notebook, path)


class Tab:
    """One notebook in one page of the browser."""

    def __init__(self, context, address: str, name: str, wait: bool = True):
        base, token = address.split("?")
        self.page, self.name = context.new_page(), name
        self.page.set_default_timeout(60_000)
        self.page.goto(f"{base}/workspaces/{name}/tree/notebooks/{name}.ipynb?{token}")
        self.page.wait_for_function(f"() => window.jupyterapp && {BOOK}?.content?.widgets?.length > 1")
        # Before it is connected cells would ask which kernel to run in. One that is busy since before may not say so.
        self.until(lambda: (status := self.page.evaluate(STATUS)) == "idle" or (not wait and status != "none"))

    def until(self, condition, seconds: float = SECONDS, what: str = "timed out") -> None:
        """Wait until `condition()` holds.

        Raises:
            AssertionError: it did not; a picture of the tab is left by the fixture.
        """
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.name}: {what}, at {self.page.evaluate(STATUS)}"
            self.page.wait_for_timeout(200)

    def command(self, name: str) -> None:
        """A command of JupyterLab, as its menus and keys give it; its end is not waited for."""
        self.page.evaluate(f"() => {{ jupyterapp.commands.execute('{name}'); }}")

    def cells(self) -> list[dict]:
        """The cells of code: place, source, count (None while one has not run), outputs."""
        return [cell for cell in self.page.evaluate(CELLS) if cell["kind"] == "code"]

    def find(self, source: str) -> dict:
        """The one cell of code that holds this text."""
        (cell,) = [cell for cell in self.cells() if source in cell["source"]]
        return cell

    def text(self, source: str) -> str:
        """What the cell that holds this text has printed."""
        return "".join(output.get("text", "") for output in self.find(source)["outputs"])

    def pictures(self, source: str) -> list[str]:
        """The pictures among the outputs of the cell that holds this text."""
        data = [output.get("data", {}) for output in self.find(source)["outputs"]]
        return [one["image/png"] for one in data if "image/png" in one]

    def errors(self) -> list[str]:
        """The errors that cells ended with."""
        outputs = [output for cell in self.cells() for output in cell["outputs"]]
        return [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]

    def has_run(self) -> bool:
        """Whether every cell of code has run, or one has failed."""
        idle = self.page.evaluate(STATUS) == "idle"
        return idle and (bool(self.errors()) or all(cell["count"] for cell in self.cells()))

    def run(self, source: str, command: str = "notebook:run-cell") -> None:
        """Run the cell that holds this text, or by another command the cells above it; the end is not waited for."""
        self.page.evaluate(f"() => {{ {BOOK}.content.activeCellIndex = {self.find(source)['place']}; }}")
        self.command(command)

    def start_above(self, source: str) -> None:
        """Run the cells above the one that holds this text; `wait_above` waits for their end."""
        self.page.evaluate(f"() => {BOOK}.content.widgets.forEach(cell => cell.model.clearExecution?.())")
        self.run(source, "notebook:run-all-above")

    def wait_above(self, source: str) -> None:
        """Wait until the cells above the one that holds this text have run; none ends with an error."""
        place = self.find(source)["place"]
        self.until(lambda: all(cell["count"] for cell in self.cells() if cell["place"] < place))
        self.until(lambda: self.page.evaluate(STATUS) == "idle")
        assert not self.errors(), f"{self.name}: {self.errors()[0]}"

    def type(self, old: str, new: str) -> None:
        """Replace a text in the one cell that holds it."""
        cell = self.find(old)
        self.page.evaluate(
            f"text => {BOOK}.content.widgets[{cell['place']}].model.sharedModel.setSource(text)",
            cell["source"].replace(old, new),
        )

    def run_all(self, restart: bool = False) -> None:
        """Run all cells, in a new kernel if asked, and wait for their end.

        Raises:
            AssertionError: a cell ended with an error.
        """
        self.command("notebook:restart-run-all" if restart else "notebook:run-all-cells")
        if restart:
            self.page.locator(".jp-Dialog .jp-mod-accept").click()
            self.until(lambda: not self.has_run(), 30)
        self.until(self.has_run)
        assert not self.errors(), f"{self.name}: {self.errors()[0]}"

    def run_whole(self) -> None:
        """Run all cells; none ends with an error or writes to stderr."""
        self.run_all()
        assert not [o for cell in self.cells() for o in cell["outputs"] if o.get("name") == "stderr"]

    def show(self, source: str):
        """The cell that holds this text, scrolled into view, as a Playwright locator."""
        place = self.find(source)["place"]
        self.page.evaluate(
            f"""async () => {{ const book = {BOOK}.content;
            book.activeCellIndex = {place}; await book.scrollToItem({place}, 'start'); }}"""
        )
        return self.page.locator(f".jp-NotebookPanel:not(.lm-mod-hidden) [data-windowed-list-index='{place}']")

    def close(self) -> None:
        """End the kernel and the page."""
        self.page.evaluate(f"() => {BOOK}.sessionContext.shutdown()")
        self.page.close()
