"""Executed notebooks, and the pages made of them."""

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from mmrev_kit.config.project import ASSETS, project_root, refuse_secrets, run_dir
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.files import write_text
from mmrev_kit.notebook.parameters import PARAMETERS, make_config, refuse_unknown, written_parameters
from mmrev_kit.notebook.sweeps import read_sweep

DEFAULT = "configs/tiny_cpu.yaml"
# A killed command leaves nothing running: papermill ends with it, its kernel with papermill, and so the run.
PAPERMILL = """
import sys
from mmrev_kit.training.lock import end_with
end_with(int(sys.argv.pop(1)))
from papermill.__main__ import papermill
papermill(prog_name="papermill")
"""
WIDGET = "application/vnd.jupyter.widget-view+json"
BARS = re.compile(r"^.*\r(?!$)", re.MULTILINE)  # of a line that was written over itself, all but the last
HEADING = re.compile(r'<h([23]) id="([^"]+)">(.*?)<a class="anchor-link".*?</h\1>', re.DOTALL)
RELATIVE = re.compile(r"\]\((?!\w+:|[#/])")  # where the target of a Markdown link to a file begins
LINK = re.compile(r'<a href="(?!https?:|#)([^"]*)"[^>]*>(.*?)</a>', re.DOTALL)


def clean(notebook) -> None:
    """Make what was shown in JupyterLab showable in a page, in place: of a widget its picture stays, of a progress bar
    its last state, and what was printed in pieces becomes one text."""
    state = notebook.metadata.pop("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            outputs = []
            for output in (one for found in cell.outputs for one in _without_widget(found, state)):
                if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
                    outputs[-1].text += output.text
                else:
                    outputs.append(output)
            for output in outputs:
                if output.output_type == "stream":
                    output.text = BARS.sub("", output.text)
            cell.outputs = outputs


def _without_widget(output, state: dict) -> list:
    """The output, or in the place of a widget the pictures and texts that it shows."""
    import nbformat

    if WIDGET not in output.get("data", {}):
        return [output]
    model = output.data.pop(WIDGET)["model_id"]
    if {"text/html", "image/png"} & set(output.data):
        return [output]
    found, waiting = [], [model]
    while waiting:
        one = state.get(waiting.pop(0), {}).get("state", {})
        waiting += [child.removeprefix("IPY_MODEL_") for child in one.get("children", [])]
        found += map(nbformat.from_dict, one.get("outputs", []))
        if one.get("_model_name") == "HTMLModel" and one.get("value"):
            found.append(nbformat.v4.new_output("display_data", {"text/html": one["value"]}))
    return found


def to_page(notebook, title: str, pages: Iterable[str] = ()) -> str:
    """A notebook as one HTML page that needs nothing but itself.

    Args:
        notebook: executed; it is cleaned in place.
        pages: names of the pages that lie beside it, with an index: links to their notebooks lead to them.
    """
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    clean(notebook)
    known = {"index", *pages} if pages else set()
    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(ASSETS)])
    dark = HtmlFormatter(style="github-dark", nobackground=True).get_style_defs(".highlight")
    css = HtmlFormatter(style="default", nobackground=True).get_style_defs(".highlight")
    css += f"\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
    text, _ = exporter.from_notebook_node(notebook, {"page": {"title": title, "code_css": css}})
    heads = [f'<li class="level{level}"><a href="#{at}">{name}</a></li>' for level, at, name in HEADING.findall(text)]
    heads = ['<li><a href="index.ipynb">All pages</a></li>'] * bool(heads and known) + heads
    if heads:
        contents = f'<nav aria-label="Contents"><ul>\n{chr(10).join(heads)}\n</ul></nav>\n'
        text = text.replace("<main>", f"{contents}<main>", 1)

    def lead(match: re.Match) -> str:
        name = Path(match[1]).name.removesuffix(".ipynb")
        return f'<a href="{name}.html">{match[2]}</a>' if name in known else match[2]

    return LINK.sub(lead, text).replace(f"{project_root()}/", "")


def render(
    notebook: str | Path, html: str | Path | None = None, pages: Iterable[str] = (), opening: str | None = None
) -> Path:
    """An executed notebook as one HTML page beside it (or at `html`); see `to_page`.

    Args:
        opening: what stands in its first cell instead, its title first.
    """
    import nbformat

    notebook = Path(notebook)
    loaded = nbformat.read(notebook, as_version=4)
    if opening:
        loaded.cells[0].source = opening
    title = loaded.cells[0].source.splitlines()[0].lstrip("# ") if loaded.cells else notebook.stem
    page = to_page(loaded, f"{title} - {notebook.parent.name}", pages)
    return write_text(html or notebook.with_suffix(".html"), page)


def execute(name: str, parameters: list[tuple[str, str]]) -> int:
    """Run notebooks/<name>.ipynb through papermill into its run folder, rendered; returns the exit status: papermill's,
    or 2 where an error's message is all that the user needs.

    The page of a sweep, which is about many runs, goes into a folder of its own.

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
    folder = page_folder(written | dict(parameters))
    kept = folder.parent / f"{name}_{folder.name}.ipynb"
    waiting = kept.with_suffix(f".{os.getpid()}.ipynb")  # another process may run the same notebook
    waiting.parent.mkdir(parents=True, exist_ok=True)
    words = [word for pair in parameters for word in ("-p", *pair)]
    command = [sys.executable, "-c", PAPERMILL, str(os.getpid())]
    command += [str(source), str(waiting), "--no-progress-bar", "--stdout-file", "-"]
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
        relink(kept, source.parent)
    if status == 130:
        print(f"\ninterrupted; run the same command again to go on with {folder}")
        return status
    if status:
        print("\n".join(told), file=sys.stderr)
    print(f"\n{'The run folder is' if status == 0 else 'The run failed; its folder would be'} {folder}")
    if kept.is_file():
        print(f"Open {render(kept)}")
    return 2 if status and error and len(error) == 1 else status


def relink(notebook: Path, folder: Path) -> None:
    """Make the relative links of a notebook that was written in another folder lead where they led from there."""
    import nbformat

    loaded, way = nbformat.read(notebook, as_version=4), os.path.relpath(folder, notebook.parent)
    for cell in loaded.cells:
        if cell.cell_type == "markdown":
            cell.source = RELATIVE.sub(f"]({way}/", cell.source)
    nbformat.write(loaded, notebook)


def notebook_config(values: dict) -> Config:
    """The configuration that a notebook's parameters stand for."""
    values = {"config": DEFAULT} | values
    return make_config(**{key: value for key, value in values.items() if key in (*PARAMETERS, "config", "overrides")})


def page_folder(values: dict) -> Path:
    """Where an executed notebook of these parameters and its page go: its run's folder, or its sweep's."""
    if "sweep" in values:
        return read_sweep(**{key: value for key, value in values.items() if key != "parallel"}).folder
    return run_dir(notebook_config(values))


def failure(notebook: Path) -> list[str] | None:
    """The traceback of the cell that failed in an executed notebook: one line of an error that explains itself."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells if notebook.is_file() else []
    outputs = [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    return outputs[-1].traceback if outputs else None
