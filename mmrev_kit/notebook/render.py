"""Executed notebooks, and the pages made of them."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

from mmrev_kit.config.project import project_root, refuse_secrets, run_dir
from mmrev_kit.files import write_text
from mmrev_kit.notebook.parameters import PARAMETERS, make_config


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
    """Run notebooks/<name>.ipynb through papermill into its run folder, rendered; returns papermill's exit status.

    The page of `reproduce`, which is about many runs, goes into a folder of its own.

    The notebook of a run that failed stays in the output folder, so that no finished run's notebook is replaced.
    """
    refuse_secrets(str(parameters), "the parameters")  # before papermill writes them into the notebook
    known = {key: value for key, value in parameters if key in (*PARAMETERS, "config", "overrides")}
    config = make_config(**{"config": "configs/tiny_cpu.yaml"} | known)
    folder = run_dir(config)
    folder = folder.parent / f"{config.experiment.name}_reproduce" if name == "reproduce" else folder
    waiting = folder.parent / f"{name}_{config.experiment.task}.ipynb"
    waiting.parent.mkdir(parents=True, exist_ok=True)
    words = [word for pair in parameters for word in ("-p", *pair)]
    source = project_root() / "notebooks" / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(waiting), "--no-progress-bar", "--stdout-file", "-"]
    process = subprocess.Popen([*command, *words], cwd=project_root(), stdin=subprocess.DEVNULL)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal tells papermill too, which ends its kernel, and that the run
        threading.Timer(6, process.kill).start()
        process.wait()
        print(f"\ninterrupted; run the same command again to go on with {folder}")
        return 130
    page = render(waiting)
    if status == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(waiting, folder / f"{name}.ipynb")
        page = Path(shutil.move(page, folder / f"{name}.html"))
    print(f"\n{'The run folder is' if status == 0 else 'The run failed; its folder would be'} {folder}")
    print(f"Open {page}")
    return status
