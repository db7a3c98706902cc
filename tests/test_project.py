"""The files around the package agree with each other."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmrev_kit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def needed() -> list[Requirement]:
    extra = PROJECT["optional-dependencies"]["dev"]
    return [Requirement(text) for text in PROJECT["dependencies"] + extra]


def test_the_conda_environment_adds_no_dependency_of_its_own():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert [re.split("[=<>]", line)[0] for line in conda] == ["python", "pip"]
    assert pip == {"pip": ["-r torch-v100.txt", "-c constraints.txt", "-e .[dev]"]}
    python = next(line for line in conda if line.startswith("python=")).split("=")[1]
    assert python in PROJECT["requires-python"]


def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows():
    common = pins("constraints.txt")
    assert not {"torch", "torchvision"} & set(common)
    for torch in ("torch.txt", "torch-v100.txt"):
        pinned = common | pins(torch)
        assert set(pins(torch)) == {"torch", "torchvision"}
        for requirement in needed():
            name = canonicalize_name(requirement.name)
            assert name in pinned, f"{name} has no pin"
            assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is not {requirement.specifier}"


def test_the_card_of_packages_is_in_the_list():
    wanted = "jupyterlab ipywidgets torch transformers peft bitsandbytes accelerate matplotlib nbconvert papermill"
    assert set(wanted.split()) <= {requirement.name for requirement in needed()}


def test_the_readme_names_every_room_notebook_and_config_and_nothing_that_is_not_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    rooms = [path.parent.name + "/" for path in PACKAGE.glob("*/__init__.py")]
    files = [
        path.name
        for folder, kind in (("notebooks", "*.ipynb"), ("configs", "*.yaml"))
        for path in (ROOT / folder).glob(kind)
    ]
    for name in [*rooms, *files]:
        assert name in text, f"README.md does not mention {name}"
    for name in re.findall(r"^\| .* \| `([a-z/_.]+)` \|$", text, flags=re.MULTILINE):
        assert (PACKAGE / name).is_file(), f"README.md names {name}, which does not exist"
    tree = text.split("```text")[1].split("```")[0]
    for name in re.findall(r"^[│├└─ ]*([\w.-]+\.(?:py|md|toml|txt|yml|yaml|ipynb))", tree, flags=re.MULTILINE):
        assert list(ROOT.rglob(name)), f"README.md names {name}, which does not exist"


def test_no_file_says_where_it_was_written():
    for path in [*ROOT.glob("*.*"), *(ROOT / "mmrev_kit").rglob("*.py"), *(ROOT / "configs").iterdir()]:
        if path.is_file() and path.suffix != ".lock":
            assert "/root/" not in path.read_text(errors="ignore") and "/home/" not in path.read_text(errors="ignore")


def test_the_readmes_loop_runs_as_it_stands():
    """With two rows of one's own, two general ones, and a model's loss on them."""
    import torch

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) <= 18
    asked = []

    def loss_of(model, row):
        asked.append(row)
        ids = torch.tensor([row])
        return model(input_ids=ids, labels=ids).loss

    with torch.random.fork_rng():
        scope = {"mine": [[5, 6, 7], [8, 9, 10]], "general": [[11, 12], [13, 14]], "loss_of": loss_of}
        exec(code, scope | {"validation_loss": lambda model: 1.0})  # flat: halved four times, below min_lr
    assert {tuple(row) for row in asked} >= {(5, 6, 7), (8, 9, 10)} and len(asked) == 5 * 3


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_can_be_seen_at_once(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
