"""The parameters of the notebooks, checked, and the configuration that they stand for."""

import ast
import difflib
from dataclasses import fields

from mmrev_kit.config.project import effective_batch
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.training.jobs import count_processes
from mmrev_kit.training.scheduler import warnings_for

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
