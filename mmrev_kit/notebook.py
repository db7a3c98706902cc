"""What the notebooks share: parameters that are checked, the knobs, and executed notebooks rendered to HTML."""

from __future__ import annotations

import argparse
import ast
import difflib
import shutil
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

from mmrev_kit import gallery, plots, runs
from mmrev_kit.ask import Asker, example, form
from mmrev_kit.config import (
    Config,
    ConfigError,
    effective_batch,
    load_config,
    project_root,
    refuse_secrets,
    resolve,
    run_dir,
    warnings_for,
)
from mmrev_kit.launch import count_processes
from mmrev_kit.progress import is_interactive
from mmrev_kit.prompts import Encoder, Sample
from mmrev_kit.scheduler import simulate

# Parameters of notebooks and the configuration keys they stand for; None leaves a key as configured.
PARAMETERS = {
    "task": "experiment.task",
    "name": "experiment.name",
    "seed": "experiment.seed",
    "num_main": "data.num_main",
    "num_control": "data.num_control",
    "learning_rate": "training.learning_rate",
    "num_epochs": "training.num_epochs",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "num_processes": "launch.num_processes",
    "output_dir": "launch.output_dir",
    "overwrite": "launch.overwrite",
}
EVALUATION = ("task", "name", "output_dir")
TRAINING = tuple(name for name in PARAMETERS if name not in ("num_main", "num_control"))
INJECTED = "# Parameters"  # papermill's first line in the cell of values that it was given


def _assigned(source: str) -> list[str]:
    """The names that a cell assigns if it does nothing else, else none: only such a cell holds parameters."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    simple = all(isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) for node in body)
    return [node.targets[0].id for node in body] if simple else []


def check_names(known: list[str], cells: list[str]) -> None:
    """Stop a notebook that was given a parameter which it does not have.

    Papermill only warns about such a name and the notebook would run with the default.

    Args:
        known: the notebook's parameters.
        cells: the sources of the cells executed so far (IPython's `In`).

    Raises:
        ConfigError: naming the unknown parameter and the nearest known one.
    """
    latest = {}
    for source in cells:
        names = _assigned(source)
        if source.startswith(INJECTED):
            latest["injected"] = names
        elif set(names) & set(known):
            latest["written"] = names
    for name in [name for names in latest.values() for name in names]:
        if name not in known and not name.startswith("PAPERMILL_"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The parameters are {', '.join(known)}."
            raise ConfigError(f"This notebook has no parameter {name}. {hint}")


def read_parameters(scope: dict, known: list[str]) -> dict:
    """The notebook's parameters as {name: value}, after `check_names`.

    Args:
        scope: the notebook's `globals()`.

    Raises:
        ConfigError: an unknown parameter was given, or a known one is not set.
    """
    check_names(known, list(scope.get("In", [])))
    missing = [name for name in known if name not in scope]
    if missing:
        raise ConfigError(f"The parameter {missing[0]} is not set. Run the cell of parameters first.")
    return {name: scope[name] for name in known}


def make_config(config: str | None = None, overrides: str | None = None, **parameters) -> Config:
    """The configuration of a notebook's parameters; a value of the wrong type is refused by its parameter's name."""
    values = {PARAMETERS[name]: value for name, value in parameters.items()}
    return load_config(config, overrides or "", values)


def configure(scope: dict, names: tuple[str, ...] = TRAINING, more: tuple[str, ...] = ()) -> Config:
    """The configuration of a notebook, from its parameters; printed a line a section, with what to know.

    Args:
        scope: the notebook's `globals()`.
        names: its parameters that stand for configuration keys, beside `config` and `overrides`.
        more: parameters that the notebook reads itself.
    """
    given = read_parameters(scope, ["config", *names, *more, "overrides"])
    config = make_config(**{name: value for name, value in given.items() if name not in more})
    for section in fields(Config):
        values = vars(getattr(config, section.name))
        print(f"{section.name}: " + ", ".join(f"{name} {_plain(value)}" for name, value in values.items()))
    training, number = config.training, config.launch.num_processes or count_processes(config)
    print(
        f"effective batch: {training.batch_size} x {training.gradient_accumulation_steps} accumulated x {number} "
        f"{'process' if number == 1 else 'processes'} = {effective_batch(config, number)}"
    )
    for warning in warnings_for(config):
        print(f"NOTE: {warning}")
    return config


def _plain(value) -> str:
    if hasattr(value, "__dataclass_fields__"):
        return "(" + ", ".join(f"{name} {_plain(item)}" for name, item in vars(value).items()) + ")"
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def assumed_losses(num_epochs: int, first: float = 2.0, floor: float = 0.3, half_life: float = 1.0) -> list[float]:
    """Validation losses that fall towards a floor, for trying a schedule before any training."""
    return [floor + (first - floor) * 0.5 ** (epoch / half_life) for epoch in range(num_epochs)]


def schedule_simulator(config: Config):
    """What the schedule does with assumed losses: sliders in JupyterLab, one figure elsewhere."""

    def draw(**knobs):
        losses = {name: knobs.pop(name) for name in ("first", "floor", "half_life") if name in knobs}
        training = replace(config.training, **knobs)
        records = simulate(assumed_losses(training.num_epochs, **losses), training)
        return plots.schedule_figure(records, training.min_lr, training.min_val_loss)

    if not is_interactive():
        return draw()
    from ipywidgets import FloatLogSlider, FloatSlider, IntSlider, interactive

    training, wide = config.training, {"description_width": "160px"}
    knobs = {
        "first": FloatSlider(value=2.0, min=0.5, max=6.0, step=0.1, description="first loss"),
        "floor": FloatSlider(value=0.3, min=0.0, max=1.0, step=0.02, description="lowest loss"),
        "half_life": FloatSlider(value=1.0, min=0.2, max=5.0, step=0.1, description="epochs to halve"),
        "learning_rate": FloatLogSlider(value=training.learning_rate, min=-6, max=-1, step=0.1),
        "min_lr": FloatLogSlider(value=training.min_lr, min=-7, max=-2, step=0.1),
        "lr_reduction_factor": FloatSlider(value=training.lr_reduction_factor, min=0.1, max=0.9, step=0.05),
        "lr_patience": IntSlider(value=training.lr_patience, min=1, max=5),
        "improvement_threshold": FloatSlider(value=training.improvement_threshold, min=0.0, max=0.5, step=0.01),
    }
    for name, knob in knobs.items():
        knob.description = knob.description or name
        knob.style, knob.layout.width = wide, "480px"
    simulator = interactive(draw, **knobs)
    simulator.update()  # draw now: later cells may keep the kernel busy for hours
    return simulator


def browse(samples: list[Sample], encoder: Encoder):
    """A browser over rows in JupyterLab; elsewhere, where nothing can be turned, the first pool row of each task."""
    if is_interactive():
        return gallery.browser(samples, encoder)
    from IPython.display import HTML

    pools = [sample for sample in samples if sample.row.source.startswith(("face_", "object_"))]
    return HTML(gallery.prompts_html(pools, encoder))


def ask_form(asker: Asker, image: str | None, text: str | None):
    """A form to ask the model in JupyterLab; elsewhere one question and its answer, printed.

    Args:
        image, text: as in `Asker.__call__`; None for those of `ask.example`.
    """
    shown = example(asker.config)
    image, text = image or shown[0], text or shown[1]
    if is_interactive():
        return form(asker, image, text)
    print(f"{image}\n{text}\n-> {asker(image, text)}")


def epoch_table(history: dict):
    """A pandas DataFrame with one row an epoch: training loss, validation loss by source, rate, decision."""
    import pandas

    rows = []
    for record in history["epochs"]:
        decision = record["decision"] or {}
        verdict = "improved" if decision.get("improved") else "no improvement" if decision else ""
        if decision.get("reduced"):
            verdict += f", rate to {decision['lr']:g}"
        losses = {f"validation {source}": loss for source, loss in record["val_loss"].items()}
        start = {"epoch": record["epoch"], "training": record["train_loss"]}
        rows.append(start | losses | {"lr": record["lr"], "decision": verdict})
    return pandas.DataFrame(rows).set_index("epoch") if rows else pandas.DataFrame()


def summary(history: dict) -> str:
    """The result of a run in one sentence."""
    losses = [(next(iter(record["val_loss"].values())), record["epoch"]) for record in history["epochs"]]
    finite = [pair for pair in losses if pair[0] is not None]
    if not finite:
        return f"The run has no validation loss yet ({history['status']})."
    source = next(iter(history["epochs"][0]["val_loss"]))
    loss, epoch = min(finite)
    how = {"finished": "ended", "failed": "failed", "interrupted": "was interrupted"}.get(history["status"], "is")
    reason = f" ({history['reason']})" if history["reason"] else ""
    return (
        f"The run {how} after epoch {history['epochs'][-1]['epoch']}{reason}; "
        f"its lowest validation loss on {source} rows is {loss:.4g}, after epoch {epoch}."
    )


def find_histories(paths: str | None, output_dir: str) -> dict[str, dict]:
    """{run name: history} of the given run folders or history files, or of every run in `output_dir`.

    Args:
        paths: names separated by spaces, relative to the project root; None for all.

    Raises:
        ConfigError: a path without a history, or no run at all.
    """
    if paths:
        files = [resolve(path) for path in paths.split()]
        files = [file / "training_history.json" if file.is_dir() else file for file in files]
    else:
        files = sorted(resolve(output_dir).glob("*/training_history.json"))
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        where = ", ".join(missing) if missing else f"No run in {resolve(output_dir)}."
        raise ConfigError(f"There is no training history: {where} Train first with notebooks/train.ipynb.")
    return {file.parent.name: runs.read_history(file) for file in files}


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
    return runs.write_text(html or notebook.with_suffix(".html"), text)


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


def main() -> None:
    """`python -m mmrev_kit.notebook train -p task reverse`: papermill, then HTML, both into the run folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", help="a notebook in notebooks/, without .ipynb")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters")
    given = parser.parse_args()
    sys.exit(execute(given.name, [tuple(pair) for pair in given.parameters]))


if __name__ == "__main__":
    main()
