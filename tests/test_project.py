"""The files around the package agree with each other."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
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


def test_the_readme_names_every_module_notebook_and_config_and_nothing_that_is_not_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    for folder, pattern in (("mmrev_kit", "*.py"), ("notebooks", "*.ipynb"), ("configs", "*.yaml")):
        for path in (ROOT / folder).glob(pattern):
            if path.name != "__init__.py":
                assert path.name in text, f"README.md does not mention {path.name}"
    tree = text.split("```text")[1].split("```")[0]
    for name in re.findall(r"^[│├└─ ]*([\w.-]+\.(?:py|md|toml|txt|yml|yaml|ipynb))", tree, flags=re.MULTILINE):
        assert list(ROOT.rglob(name)), f"README.md names {name}, which does not exist"


def test_no_file_says_where_it_was_written():
    for path in [*ROOT.glob("*.*"), *(ROOT / "mmrev_kit").rglob("*.py"), *(ROOT / "configs").iterdir()]:
        if path.is_file() and path.suffix != ".lock":
            assert "/root/" not in path.read_text(errors="ignore") and "/home/" not in path.read_text(errors="ignore")
