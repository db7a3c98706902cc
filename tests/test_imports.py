"""What importing the package does: nothing. And which room may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmrev_kit"
# A room may import those on lower floors, and its own modules; pretraining and evaluation know nothing of each other.
FLOORS = {"files": 0, "reporting": 0, "config": 0, "data": 1, "model": 2, "memory": 3, "training": 4, "pretraining": 5}
FLOORS |= {"evaluation": 5, "notebook": 6, "__main__": 7, "__init__": 7}
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
CHECK = """
import sys
assert "bitsandbytes" not in sys.modules, "bitsandbytes was imported"
assert "peft" not in sys.modules, "peft was imported"
assert "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized(), "CUDA was initialised"
"""


def run(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "importing wrote files"


def imported(module: str) -> set[str]:
    """The package's modules that a module imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "mmrev_kit"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module.split(".")[0] == "mmrev_kit":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("mmrev_kit.") for name in found}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} - {""}  # "": the version


IN_TURN = """
import importlib, logging, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert not logging.getLogger().handlers, f"{name} set up logging"
    assert not {"bitsandbytes", "peft"} & set(sys.modules), name
    assert "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized(), f"{name} initialised CUDA"
"""


def test_importing_modules_has_no_side_effect(tmp_path):
    names = [f"mmrev_kit.{module}".removesuffix(".__init__") for module in MODULES if module != "__main__"]
    done = subprocess.run([sys.executable, "-c", IN_TURN, *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "importing wrote files"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_a_notebook_imports_leaves_the_kernel_clean(path, tmp_path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.parse(cell).body]
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    run("\n".join(imports) + CHECK, tmp_path)


def test_readers_load_no_makers(tmp_path):
    makers = {f"mmrev_kit.data.{name}" for name in ("faces", "folder", "make", "objects", "partners", "people", "pools", "shapes")}  # fmt: skip  # noqa: E501
    code = "import sys, mmrev_kit.data.rows, mmrev_kit.data.checks\nassert 'mmrev_kit.data.tasks' in sys.modules\n"
    run(f"{code}assert not {makers} & set(sys.modules)", tmp_path)


def test_at_the_top_stand_the_rooms_and_little_else():
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    rooms = {"config", "data", "model", "memory", "training", "evaluation", "notebook", "pretraining"}
    assert (
        names <= rooms | {"__init__.py", "__main__.py", "errors.py", "files.py", "reporting.py", "assets"}
        and rooms <= names
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    room = module.split(".")[0]
    for name in imported(module):
        other = name.split(".")[0]
        assert other == room or FLOORS[other] < FLOORS[room] or {room, other} == {"config", "files"}, name


def test_no_modules_import_each_other_in_a_circle():
    done: list[str] = []

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " imports ".join([*above[above.index(module) :], module])
        if module not in done:
            for name in imported(module):
                visit(name, (*above, module))
            done.append(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_inside_functions(module):
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "matplotlib", "ipywidgets", "pandas"}
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {(node.module or "").split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    if module.split(".")[0] in ("model", "training", "pretraining") and module != "training.scheduler":
        top -= {"torch"}
    assert not top & heavy


FRONT = """
import sys, time
began = time.perf_counter()
import mmrev_kit
seconds = time.perf_counter() - began
heavy = {"torch", "transformers", "peft", "numpy", "omegaconf", "PIL"} & set(sys.modules)
assert not heavy, heavy
assert set(mmrev_kit.__all__) <= set(dir(mmrev_kit))
rooms = {"config", "data", "model", "memory", "training", "evaluation", "notebook", "pretraining", "files"}
assert 8 <= len(mmrev_kit.__all__) <= 12 and not rooms & set(mmrev_kit.__all__)
for name in [*rooms, *mmrev_kit.__all__]:
    assert f" {name} " in mmrev_kit.__doc__ or f" {name}(" in mmrev_kit.__doc__, name
for name in mmrev_kit.__all__:
    found = getattr(mmrev_kit, name)
    assert callable(found) and found.__name__ == name and found.__doc__
try:
    mmrev_kit.lunch
except AttributeError as error:
    assert "lunch" in str(error)
print(seconds)
"""


def test_the_front_door_is_light_and_every_name_there_is_loaded_when_used(tmp_path):
    done = subprocess.run([sys.executable, "-c", FRONT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5
