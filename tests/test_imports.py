"""What importing the package does: nothing. And which module may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
# Each module may import those before it.
ORDER = (
    "sections config runs images entities folder pools objects shapes data prompts checks mixing scheduler answers "
    "stats verdict results plots sizes layers memory gallery preflight vision dropout head fused bases loading "
    "checkpoints packing features batches planning speed steps processes train rehearse tiny pretrain_text "
    "pretrain_images pretrain_data pretrain_plan pretrain_model pretrain_accuracy pretrain_state pretrain_steps "
    "evaluate ask progress budget launch reproduce notebook pretrain"
).split()
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


@pytest.mark.parametrize("module", ORDER)
def test_importing_a_module_has_no_side_effect(module, tmp_path):
    run(f"import mmrev_kit.{module}\nimport logging\nassert not logging.getLogger().handlers\n" + CHECK, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_a_notebook_imports_leaves_the_kernel_clean(path, tmp_path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.parse(cell).body]
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    run("\n".join(imports) + CHECK, tmp_path)


def test_the_order_names_every_module():
    assert sorted(ORDER) == sorted(path.stem for path in (ROOT / "mmrev_kit").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down_only(module):
    tree = ast.parse((ROOT / "mmrev_kit" / f"{module}.py").read_text())
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "mmrev_kit":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmrev_kit."):
            used.add(node.module.split(".")[1])
    assert used <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", ORDER)
def test_heavy_libraries_are_imported_inside_functions(module):
    tree = ast.parse((ROOT / "mmrev_kit" / f"{module}.py").read_text())
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "matplotlib", "ipywidgets", "pandas"}
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {(node.module or "").split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not top & heavy
