"""Executed notebooks, and the pages made of them."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from mmrev_kit.config.project import project_root, refuse_secrets, run_dir
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.files import write_text
from mmrev_kit.notebook.parameters import PARAMETERS, make_config, refuse_unknown, written_parameters


def clean(notebook) -> None:
    """Take out, in place, what a widget leaves in an executed notebook: nbconvert fails on it or shows a blank."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kept = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
            cell.outputs = kept


def render(notebook: str | Path, html: str | Path | None = None) -> Path:
    """An executed notebook as one HTML page beside it (or at `html`)."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = Path(notebook)
    loaded = nbformat.read(notebook, as_version=4)
    clean(loaded)
    text, _ = HTMLExporter().from_notebook_node(loaded, {"metadata": {"name": notebook.stem}})
    return write_text(html or notebook.with_suffix(".html"), text)


def execute(name: str, parameters: list[tuple[str, str]]) -> int:
    """Run notebooks/<name>.ipynb through papermill into its run folder, rendered; returns the exit status: papermill's,
    or 2 where an error's message is all that the user needs.

    The page of `reproduce`, which is about many runs, goes into a folder of its own.

    The notebook of a run that failed stays in the output folder, so that no finished run's notebook is replaced.

    Raises:
        ConfigError: there is no such notebook, it has no such parameter, or a value cannot be used.
    """
    refuse_secrets(str(parameters), "the parameters")  # before papermill writes them into the notebook
    source = project_root() / "notebooks" / f"{name}.ipynb"
    if not source.is_file():
        there = ", ".join(sorted(path.stem for path in source.parent.glob("*.ipynb")))
        raise ConfigError(f"There is no notebook {name}. There are {there}.")
    written = written_parameters(source)
    refuse_unknown(dict(parameters), written)
    values = {"config": "configs/tiny_cpu.yaml"} | written | dict(parameters)
    known = {key: value for key, value in values.items() if key in (*PARAMETERS, "config", "overrides")}
    config = make_config(**known)
    folder = run_dir(config)
    folder = folder.parent / f"{config.experiment.name}_reproduce" if name == "reproduce" else folder
    kept = folder.parent / f"{name}_{folder.name}.ipynb"
    waiting = kept.with_suffix(f".{os.getpid()}.ipynb")  # another process may run the same notebook
    waiting.parent.mkdir(parents=True, exist_ok=True)
    words = [word for pair in parameters for word in ("-p", *pair)]
    command = [sys.executable, "-m", "papermill", str(source), str(waiting), "--no-progress-bar", "--stdout-file", "-"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        process = subprocess.Popen([*command, *words], cwd=project_root(), stdin=subprocess.DEVNULL, stderr=complaints)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal tells papermill too, which ends its kernel, and that the run
            threading.Timer(6, process.kill).start()
            process.wait()
            status = 130
        complaints.seek(0)
        error = failure(waiting) if status not in (0, 130) else None
        told = error or [complaints.read()]
    if status == 0:
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"{name}.ipynb"
    if waiting.is_file():
        os.replace(waiting, kept)
    if status == 130:
        print(f"\ninterrupted; run the same command again to go on with {folder}")
        return status
    if status:
        print("\n".join(told), file=sys.stderr)
    print(f"\n{'The run folder is' if status == 0 else 'The run failed; its folder would be'} {folder}")
    if kept.is_file():
        print(f"Open {render(kept)}")
    return 2 if status and error and len(error) == 1 else status


def failure(notebook: Path) -> list[str] | None:
    """The traceback of the cell that failed in an executed notebook: one line of an error that explains itself."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells if notebook.is_file() else []
    outputs = [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    return outputs[-1].traceback if outputs else None
