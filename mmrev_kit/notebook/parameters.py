"""The parameters of the notebooks, checked, and the configuration that they stand for."""

import ast
import difflib
import os
from collections.abc import Iterable
from dataclasses import fields
from html import escape
from pathlib import Path

from mmrev_kit.config.flags import PARAMETERS
from mmrev_kit.config.project import effective_batch
from mmrev_kit.config.reading import NONE_WORDS, differences, load_config
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.training.jobs import count_processes
from mmrev_kit.training.scheduler import warnings_for
from mmrev_kit.training.tracking import refuse_missing

EVALUATION = ("task", "name", "output_dir")
TRAINING = tuple(name for name in PARAMETERS if name not in ("num_main", "num_control"))
INJECTED = "# Parameters"  # papermill's first line in the cell of values that it was given


def is_interactive() -> bool:
    """Whether this is the kernel of a notebook that a person has open. JupyterLab and Notebook name the session in the
    kernel's environment, which every process that a kernel starts inherits."""
    if "JPY_SESSION_NAME" not in os.environ:
        return False  # nor is IPython needed there
    from IPython.core.getipython import get_ipython

    return get_ipython() is not None


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with IPython's own commands
        return []


def _names(node: ast.AST, kind: type = ast.Store) -> set[str]:
    """The names that a statement assigns (`ast.Store`) or reads (`ast.Load`)."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, kind)}


def _assigned(source: str) -> list[str]:
    """The names that a cell assigns if it does nothing else, else none: only such a cell holds parameters."""
    body = _statements(source)
    simple = all(isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) for node in body)
    return [node.targets[0].id for node in body] if simple else []


def check_names(known: list[str], cells: list[str]) -> None:
    """Stop a notebook that was given a parameter which it does not have, or that is not in force.

    Papermill only warns about such a name and the notebook would run with the default.

    Args:
        known: the notebook's parameters.
        cells: the sources of the cells executed so far (IPython's `In`).

    Raises:
        ConfigError: naming the unknown parameter and the nearest known one; see also `_check_injected`.
    """
    latest = {}
    for source in cells:
        names = _assigned(source)
        if source.startswith(INJECTED):
            latest["injected"] = names
        elif set(names) & set(known):
            latest["written"] = names
    refuse_unknown([name for names in latest.values() for name in names], known)
    places = [index for index, source in enumerate(cells) if source.startswith(INJECTED)]
    if places:
        _check_injected(set(known), cells[: places[-1]], cells[places[-1]], cells[places[-1] + 1 :])


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """See `check_names`; papermill's own names are no parameters."""
    for name in names:
        if name not in known and not name.startswith("PAPERMILL_"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The parameters are {', '.join(known)}."
            raise ConfigError(f"This notebook has no parameter {name}. {hint}")


def _literals(source: str) -> dict:
    """The plain values that a cell assigns, as {name: value}."""
    nodes = [node for node in _statements(source) if isinstance(node, ast.Assign)]
    return {name: n.value.value for n in nodes if isinstance(n.value, ast.Constant) for name in _names(n)}


def _check_injected(known: set[str], before: list[str], cell: str, after: list[str]) -> None:
    """Papermill puts the values that it was given behind the cell with the tag `parameters`, and first of all where no
    cell has it: a later cell may replace them, and what an earlier one computed does not follow them. It reads `false`
    as text, which Python takes for true.

    Args:
        known: the notebook's parameters.
        before, cell, after: the cells executed before the cell of the values given, that cell, and those after it.

    Raises:
        ConfigError: a value given is not the one in force, another one was computed from the value that it replaces,
            or it is a text in the place of True or False, or of a number.
    """
    given = set(_assigned(cell)) & known
    replaced = {name for source in after for node in _statements(source) for name in _names(node) & given}
    tagged = any(_names(node) & known for source in before for node in _statements(source))
    if replaced and not (tagged and is_interactive()):  # a person may change the cell of parameters and run it again
        raise ConfigError(
            f"The values given are not in force: a later cell assigns {', '.join(sorted(replaced))} anew. "
            "Give the notebook's cell of parameters the tag `parameters`, and assign them nowhere else."
        )
    stale, written = set(given), {}
    for source in before:
        written |= _literals(source)
        for node in _statements(source):
            stale |= _names(node) if _names(node, ast.Load) & stale else set()
    if derived := sorted(stale & known - given):
        raise ConfigError(
            f"{', '.join(derived)}: computed from a value that was given, but before it was set. "
            f"Write a plain value there, or give {', '.join(derived)} too."
        )
    for name, value in _literals(cell).items():
        text = isinstance(value, str) and value.lower() not in NONE_WORDS
        if text and name in known and isinstance(written.get(name), bool | int | float):
            wanted = "True or False" if isinstance(written[name], bool) else "a number"
            raise ConfigError(f"{name} = {value!r}: must be {wanted}.")


def written_parameters(notebook: Path) -> dict:
    """The parameters of a notebook's file as {name: value}; a value that is computed there is None.

    Raises:
        ConfigError: no cell has the tag `parameters`.
    """
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise ConfigError(f"{notebook}: no cell has the tag `parameters`. Give it to the cell of parameters.")
    names = [name for node in _statements(tagged[0]) for name in _names(node)]
    return dict.fromkeys(names) | _literals(tagged[0])


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
    """The configuration of a notebook, from its parameters; shown (see `settings_html`), with what to know of it.

    Args:
        scope: the notebook's `globals()`.
        names: its parameters that stand for configuration keys, beside `config` and `overrides`.
        more: parameters that the notebook reads itself.
    """
    from IPython.display import HTML, display

    given = read_parameters(scope, ["config", *names, *more, "overrides"])
    config = make_config(**{name: value for name, value in given.items() if name not in more})
    if names == TRAINING:
        refuse_missing(config)
    display(HTML(settings_html(config)))
    training, number = config.training, config.launch.num_processes or count_processes(config)
    print(
        f"effective batch: {training.batch_size} x {training.gradient_accumulation_steps} accumulated x {number} "
        f"{'process' if number == 1 else 'processes'} = {effective_batch(config, number)}"
    )
    for warning in warnings_for(config):
        print(f"NOTE: {warning}")
    return config


def settings_html(config: Config) -> str:
    """A table of the settings that differ from the kit's defaults, and all others, a line a section, folded."""
    changed = differences(Config(), config)
    rows = ""
    for key, (old, new) in changed.items():
        cells = (f'<td style="text-align:left">{escape(text)}</td>' for text in (key, _plain(new), _plain(old)))
        rows += f"<tr>{''.join(cells)}</tr>"
    others = []
    for section in fields(Config):
        values = vars(getattr(config, section.name)).items()
        same = [f"{name} {_plain(value)}" for name, value in values if f"{section.name}.{name}" not in changed]
        others.append(f"<li><b>{section.name}</b>: {escape(', '.join(same) or 'none')}</li>")
    head = "".join(f'<th scope="col" style="text-align:left">{name}</th>' for name in ("setting", "here", "default"))
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<details><summary>settings as by default</summary><ul>{''.join(others)}</ul></details>"
    )


def _plain(value) -> str:
    if hasattr(value, "__dataclass_fields__"):
        return "(" + ", ".join(f"{name} {_plain(item)}" for name, item in vars(value).items()) + ")"
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
