"""The notebooks as their users run them: papermill in both forms, parameters checked, rendered to HTML."""

import ast
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from families import FAMILIES

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.files import write_json
from mmrev_kit.notebook.parameters import check_names, is_interactive, make_config, read_parameters, settings_html
from mmrev_kit.notebook.render import clean, render
from mmrev_kit.notebook.sweeps import read_sweep
from mmrev_kit.notebook.tables import find_histories, summary
from mmrev_kit.training.history import read_history

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN_FILES = {"best", "final", "last", "config.yaml", "manifest.json", "training_history.json"}
ONE_EPOCH = "experiment.task=reverse training.num_epochs=1"


def papermill(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", *words]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, text=True, timeout=900, **options)


def under_pty(command: list[str]) -> tuple[int, str]:
    """Exit status and output of a command that sees a terminal on all three streams."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(command[0], command)
    output = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the terminal is gone with its last process
            break
        if not part:
            break
        output += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode(errors="replace")


def printed(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_define_nothing_and_hold_one_cell_of_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        assert len([line for line in cell.source.splitlines() if line.strip()]) <= 15
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source)))
        assert not cell.outputs and cell.execution_count is None
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    body = ast.parse(parameters.source).body
    assert 0 < len(body) <= 12
    for node in body:
        ast.literal_eval(node.value)
    assert notebook.cells[0].source.startswith("# ") and "Question:" in notebook.cells[0].source
    assert notebook.cells[-1].source.startswith("## Next")


def links(source: str) -> set[str]:
    return set(re.findall(r"\]\(([a-z_]+)\.ipynb\)", source))


def test_the_index_leads_to_every_notebook_with_a_picture_and_every_next_leads_on():
    cells = {path.stem: nbformat.read(path, as_version=4).cells for path in NOTEBOOKS}
    (table,) = [cell.source for cell in cells["index"] if "| question |" in cell.source]
    assert links(table) == set(cells) - {"index"}
    for name in links(table):
        assert f'<img src="pictures/{name}.png" alt="' in table
        assert (ROOT / "notebooks" / "pictures" / f"{name}.png").stat().st_size < 60_000
    following = {name: links(book[-1].source) for name, book in cells.items()}
    assert all(found and found <= set(cells) - {name} for name, found in following.items()), following
    assert "evaluate" in following["train"] and "train" in following["data"]


def test_the_memory_notebook_shows_the_budget_of_its_parameters(tmp_path):
    executed = tmp_path / "memory.ipynb"
    words = ["notebooks/memory.ipynb", str(executed), "-p", "model", "8b", "-p", "card", "RTX 4090 24", "-p", "r", "16"]
    done = papermill(*words, "-p", "micro_batch", "4", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "passes of" in printed(executed)
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    page = render(executed).read_text()
    assert "deepspeed ZeRO-2" in page and "guide (GB)" in page and "19,922,944" in page
    wrong = papermill(*words, "-p", "crad", "V100 32", capture_output=True)
    assert wrong.returncode and "Did you mean card?" in wrong.stderr


@pytest.mark.long
def test_the_memory_notebook_says_that_it_does_not_know_a_family_and_measures_it(
    family_folder, small_overrides, tmp_path
):
    family, executed = FAMILIES["qwen3_5"], tmp_path / "memory.ipynb"
    words = f"{small_overrides} model.name={family_folder(family)} {family.settings} retention.retention_ratio=0"
    command = [
        "notebooks/memory.ipynb",
        str(executed),
        "-p",
        "config",
        "configs/tiny_cpu.yaml",
        "-p",
        "overrides",
        words,
    ]
    done = papermill(*command, "-p", "rehearse", "True", capture_output=True)
    assert done.returncode == 0, done.stderr
    text, cells = printed(executed), nbformat.read(executed, as_version=4).cells
    assert f"{family_folder(family)}: the memory estimate knows Qwen3-VL only" in text and "CPU: built in" in text
    unknown = [cell for cell in cells if "print(budget.UNKNOWN)" in cell.source]
    assert len(unknown) == 4
    for cell in unknown:
        (output,) = cell.outputs
        assert "knows Qwen3-VL only. mmrev_kit.training.rehearse.rehearse(cfg) measures" in output.text
    assert "rehearse = True" in cells[0].source


def test_the_long_form_under_a_terminal_then_html_and_history(small_overrides, tmp_path):
    executed = tmp_path / "train_reverse.ipynb"
    # 4 + 4 people: 240 reverse rows and 60 forward rows of the control group make 50 steps of 6
    words = ["notebooks/train.ipynb", str(executed), "-p", "task", "reverse", "-p", "num_epochs", "1"]
    words += ["-p", "batch_size", "6"]
    status, output = under_pty([sys.executable, "-m", "papermill", *words, "-p", "overrides", small_overrides])
    assert status == 0, output
    folder = tmp_path / "outputs" / "small_reverse"
    assert {path.name for path in folder.iterdir()} >= RUN_FILES
    assert read_history(folder / "training_history.json")["status"] == "finished"
    text = printed(executed)
    assert "effective batch: 6 x 1 accumulated x 1 process = 6" in text
    assert len(read_history(folder / "training_history.json")["steps"]) == 70
    assert "epoch 1/1: train " in text and "\r" not in text
    notebook = nbformat.read(executed, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "launch.launch(cfg)" in cell.source]
    assert len("".join(output.get("text", "") for output in cell.outputs).splitlines()) <= 16
    assert "widgets" not in notebook.metadata

    page = render(executed).read_text()
    assert page.count("data:image/png") >= 3  # the mix, the schedule and the history
    assert "widget-view" not in page and "Traceback (most" not in page

    histories = tmp_path / "history.ipynb"
    done = papermill("notebooks/history.ipynb", str(histories), "-p", "histories", str(folder), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "small_reverse: The run ended after epoch 1 (last epoch)" in printed(histories)

    evaluated = tmp_path / "evaluate.ipynb"
    words = ["-p", "task", "reverse", "-p", "drops", "none text", "-p", "ask_text", "Who is [image]?"]
    words += ["-p", "overrides", small_overrides]
    done = papermill("notebooks/evaluate.ipynb", str(evaluated), *words, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = printed(evaluated)
    assert "VERDICT (CW image first): inconclusive" in text and "Who is [image]?\n-> " in text
    assert {path.name for path in (folder / "eval" / "small").iterdir()} >= {
        "predictions.jsonl", "metrics.json", "verdict.json", "facts.json",
    }  # fmt: skip
    page = render(evaluated).read_text()
    assert "McNemar p" in page and "drop text" in page and "Traceback (most" not in page
    assert page.count("data:image/png") >= 2 + 16  # two figures, and right or wrong answers with their pictures


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_reproduce_runs_its_five_conditions_and_goes_on(small_overrides, tmp_path):
    executed = tmp_path / "reproduce.ipynb"
    overrides = small_overrides.replace("experiment.name=small experiment.taught=generation", "")  # the grid's matter
    words = ["-p", "name", "small", "-p", "seeds", "7", "-p", "num_epochs", "1", "-p", "overrides", overrides]
    done = papermill("notebooks/reproduce.ipynb", str(executed), *words, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = printed(executed)
    assert text.count("VERDICT (CW): ") == 3 and text.count("VERDICT (CW image first): ") == 2
    runs = {path.name for path in (tmp_path / "outputs").glob("small_seed7_*")}
    small = "small_seed7_embedded"
    assert runs == {
        f"{small}-forward_forward", f"{small}-reverse_reverse", f"{small}-one-order-forward_forward",
        f"{small}-one-order-reverse_reverse", f"{small}-forward-taught-by-generation_forward",
    }  # fmt: skip
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    page = "".join(output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    expected = read_sweep("configs/sweeps/reproduce.yaml").file.expected
    assert len(expected) == 5 and all(name in page and claim in page for name, claim in expected.items())
    done = papermill("notebooks/reproduce.ipynb", str(executed), *words, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 runs are there; 0 to do" in printed(executed)
    assert (tmp_path / "outputs" / "small_sweep" / "sweep.csv").is_file()
    render(executed)


def test_the_data_notebook_shows_people_prompts_lengths_and_mix(small_overrides, tmp_path):
    executed = tmp_path / "data.ipynb"
    done = papermill("notebooks/data.ipynb", str(executed), "-p", "overrides", small_overrides, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "0 faults" in printed(executed)
    assert re.search("small: 4 main, 4 control; an epoch|small: 4 control, 4 main; an epoch", printed(executed))
    page = render(executed).read_text()
    for text in ("forward_train.jsonl:1", "reverse_train.jsonl:1", "mcq_i2d_test.jsonl:1", "mcq_d2i_test.jsonl:1"):
        assert text in page
    assert "#ffe08a" in page  # the tokens that carry loss
    assert page.count("data:image/png") >= 4 + 7 and "widget-view" not in page


@pytest.mark.long
def test_the_helpers_train_in_a_plain_loop(small_overrides, tmp_path):
    """120 forward, 120 cw_image and 120 reverse rows, and 154 retention rows: 33 updates of 16."""
    executed = tmp_path / "helpers.ipynb"
    words = ["-p", "num_epochs", "1", "-p", "overrides", small_overrides]
    done = papermill("notebooks/helpers.ipynb", str(executed), *words, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = printed(executed)
    assert "epoch 1: lowest validation loss" in text
    first, last = re.search(r"33 updates: mean loss of five from (\S+) to (\S+); last epoch", text).groups()
    assert float(last) < 0.8 * float(first)
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.mark.long
def test_the_embedded_model_is_pretrained_tested_and_written(tmp_path):
    executed, folder = tmp_path / "pretrain_tiny.ipynb", tmp_path / "tiny" / "model"
    small = {"steps": 2, "prompts": 16, "num_faces": 24, "eval_prompts": 8, "workers": 0, "out": tmp_path / "tiny"}
    small |= {"orders": "one", "overrides": "muon=false looks=1 log_every=1"}
    words = [word for name, value in small.items() for word in ("-p", name, str(value))]
    done = papermill("notebooks/pretrain_tiny.ipynb", str(executed), *words, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = printed(executed)
    assert "step 2: loss" in text and "orders='one'" in text and f"The model is in {folder}" in text
    assert (folder / "model.safetensors").is_file() and (tmp_path / "tiny" / "state" / "state.json").is_file()
    page = render(executed).read_text()
    assert page.count("data:image/png") >= 2 and "mcq_d2i" in page  # pictures, and the shares that were right

    wrong = papermill("notebooks/pretrain_tiny.ipynb", str(executed), *words[:-1], "lookz=1", capture_output=True)
    assert wrong.returncode != 0 and "lookz" in wrong.stderr


@pytest.mark.long
def test_the_short_form_writes_the_executed_notebook_to_standard_output(small_overrides, tmp_path):
    before = (ROOT / "notebooks" / "train.ipynb").read_bytes()
    with open(tmp_path / "out.ipynb", "w") as file:
        words = ("-p", "overrides", f"{small_overrides} {ONE_EPOCH}")
        done = papermill("notebooks/train.ipynb", *words, stdout=file, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1: train " in printed(tmp_path / "out.ipynb")
    assert {path.name for path in (tmp_path / "outputs" / "small_reverse").iterdir()} >= RUN_FILES
    assert (ROOT / "notebooks" / "train.ipynb").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "lerning_rate", "1e-4"], "no parameter lerning_rate. Did you mean learning_rate?"),
        (["-p", "learning_rate", "fast"], "learning_rate = 'fast'"),
        (["-p", "overrides", "training.lr_patiense=2"], "Did you mean: 'lr_patience'?"),
    ],
)
def test_a_wrong_parameter_ends_the_notebook_before_anything_is_trained(words, message, tmp_path):
    words = [*words, "-p", "output_dir", str(tmp_path / "outputs")]
    done = papermill("notebooks/train.ipynb", str(tmp_path / "o.ipynb"), *words, capture_output=True)
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "outputs").exists()
    (error,) = errors(tmp_path / "o.ipynb")  # a cell that fails says no more than the message
    assert error.ename == "ConfigError" and len(error.traceback) == 1 and message in error.traceback[0]


def errors(notebook: Path) -> list:
    cells = nbformat.read(notebook, as_version=4).cells
    return [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]


def edited(folder: Path, change) -> str:
    """The training notebook with its cell of parameters changed."""
    notebook = nbformat.read(ROOT / "notebooks" / "train.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    change(cell)
    nbformat.write(notebook, folder / "train.ipynb")
    return str(folder / "train.ipynb")


def lose_tag(cell) -> None:
    cell.metadata.tags = []
    cell.source = cell.source.replace("num_epochs = None", "num_epochs = 4")


def derive(cell) -> None:
    cell.source = cell.source.replace(
        "learning_rate = None\nnum_epochs = None", "num_epochs = 4\nlearning_rate = 1e-3 / num_epochs"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_tag, "not in force: a later cell assigns num_epochs, output_dir anew"),
        (derive, "learning_rate: computed from a value that was given"),
    ],
)
def test_a_given_value_that_would_not_count_ends_the_notebook(change, message, tmp_path):
    words = ["-p", "num_epochs", "2", "-p", "output_dir", str(tmp_path / "outputs")]
    done = papermill(edited(tmp_path, change), str(tmp_path / "o.ipynb"), *words, capture_output=True)
    assert done.returncode != 0 and message in done.stderr and not (tmp_path / "outputs").exists()


def test_a_headless_machine_needs_no_ipython(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.setitem(sys.modules, "IPython.core.getipython", None)  # importing it is an error
    assert not is_interactive()
    monkeypatch.setenv("JPY_SESSION_NAME", "one.ipynb")
    with pytest.raises(ImportError):
        is_interactive()


def command(*words: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "mmrev_kit", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("notebook trian", "There is no notebook trian. There are data, evaluate, "),
        ("trian", "invalid choice: 'trian' (choose from "),
        ("notebook train -p lerning_rate 1", "no parameter lerning_rate. Did you mean learning_rate?"),
        ("notebook memory -p x 1", "no parameter x. The parameters are config, model, card, "),
        ("notebook train -p task foo", "experiment.task = 'foo': must be one of forward, reverse."),
        ("notebook train -p num_epochs x", "num_epochs = 'x': training.num_epochs"),
        ("train --config nope.yaml", "nope.yaml: there is no such configuration file."),
        ("train --config configs/tiny_cpu.yaml --overrides data.dir=/proc/x", "/proc/x/faces20x13 cannot be written"),
        (
            "train --config configs/tiny_cpu.yaml --overrides 'data.num_main=2 data.folder=data/none'",
            "data.num_main = 2",
        ),
    ],
)
def test_a_fault_of_the_users_ends_a_command_with_its_message_and_status_2(words, told):
    done = command(*shlex.split(words))
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2 and not done.stdout


def test_a_fault_that_a_cell_meets_is_the_commands_message(tmp_path):
    done = command("notebook", "history", "-p", "histories", "nope", "-p", "output_dir", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("ConfigError: There is no training history: ")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "history_faces20x13_forward.html").is_file()


@pytest.mark.long
def test_the_same_notebook_started_twice_at_once_goes_into_each_runs_own_folder(small_overrides, small_data, tmp_path):
    words = [sys.executable, "-m", "mmrev_kit", "notebook", "data", "-p", "overrides"]
    words += [f"{small_overrides} data.folder={small_data}/small", "-p", "name"]
    started = [subprocess.Popen([*words, name], cwd=ROOT, stdout=subprocess.DEVNULL) for name in ("one", "two")]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    for name in ("one", "two"):
        folder = tmp_path / "outputs" / f"{name}_forward"
        assert re.search(rf">experiment\.name</td><td[^>]*>{name}</td>", (folder / "data.html").read_text())
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["one_forward", "two_forward"]


def test_the_cell_of_parameters_and_the_package_agree():
    """The training notebook's parameters are those that `configure` reads."""
    from mmrev_kit.notebook.parameters import TRAINING

    cells = nbformat.read(ROOT / "notebooks" / "train.ipynb", as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    names = [node.targets[0].id for node in ast.parse(cell.source).body]
    assert sorted(names) == sorted(["config", *TRAINING, "overrides"])


def test_set_up_shows_what_differs_from_the_defaults_and_folds_the_rest():
    page = settings_html(make_config("configs/tiny_cpu.yaml", "data.dir=<b>x training.lr_patience=3"))
    table, folded = page.split("<details>")
    assert "&lt;b&gt;x" in table and "<b>x" not in page
    assert re.search(r"training\.lr_patience</td><td[^>]*>3</td><td[^>]*>1</td>", table)
    assert "weight_decay" in folded and "weight_decay" not in table
    assert "lr_patience" not in folded


KNOWN = ["task", "learning_rate"]


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (["task = None\nlearning_rate = None", "# Parameters\nlerning_rate = 0.1"], "lerning_rate"),
        (["task = None\nlerning_rate = 0.1"], "lerning_rate"),  # misspelt in the cell itself
        (["task = None\nlearning_rate = None", "# Parameters\nlearning_rate = float('nan')"], None),
        (["task = None\nlerning_rate = 1", "task = None\nlearning_rate = 1"], None),  # mended and run again
        (["task = None\nlearning_rate = 1", "x = 3", "import os", "%matplotlib inline"], None),
        (["# Parameters\nPAPERMILL_INPUT_PATH = 'a'"], None),  # papermill's own, on request
    ],
)
def test_unknown_names_are_found_in_the_cells_that_set_parameters(cells, told):
    if told is None:
        check_names(KNOWN, cells)
        return
    with pytest.raises(ConfigError, match=f"no parameter {told}. Did you mean learning_rate"):
        check_names(KNOWN, cells)


GIVEN, FIRST = "# Parameters\nlearning_rate = 0.1", "task = None\nlearning_rate = 1"


@pytest.mark.parametrize(
    ("cells", "person", "told"),
    [
        ([GIVEN, FIRST], False, "a later cell assigns learning_rate anew"),  # no tag
        ([GIVEN, FIRST], True, "a later cell assigns learning_rate anew"),
        ([FIRST, GIVEN, "learning_rate = 0.2"], False, "a later cell assigns learning_rate anew"),
        ([FIRST, GIVEN, "learning_rate = 0.2"], True, None),  # changed and run again
        ([FIRST, GIVEN, "if True:\n    learning_rate *= 2"], False, "a later cell assigns learning_rate anew"),
        (["learning_rate = 1\ntask = learning_rate", GIVEN], True, "task: computed from a value"),
        (["learning_rate = 1", "half = learning_rate / 2", "task = half", GIVEN], False, "task: computed from a value"),
        (["learning_rate = 1\ntask = learning_rate", f"{GIVEN}\ntask = 3"], False, None),
        (["task = False", "# Parameters\ntask = 'false'"], False, "task = 'false': must be True or False"),
        (["learning_rate = 1", "# Parameters\nlearning_rate = 'fast'"], False, "'fast': must be a number"),
        (["learning_rate = 1", "# Parameters\nlearning_rate = 'none'"], False, None),
    ],
)
def test_the_values_given_are_those_in_force_or_refused(cells, person, told, open_in_jupyterlab):
    if person:
        open_in_jupyterlab()
    if told is None:
        check_names(KNOWN, ["", *cells])
        return
    with pytest.raises(ConfigError, match=told):
        check_names(KNOWN, ["", *cells])


def test_a_parameter_that_is_not_set_is_told():
    with pytest.raises(ConfigError, match="The parameter learning_rate is not set"):
        read_parameters({"task": None, "In": []}, KNOWN)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("overwrite", "false", False),
        ("overwrite", "true", True),
        ("overwrite", True, True),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("num_epochs", 7, 7),  # papermill has read 007
        ("learning_rate", "none", 2e-3),
        ("learning_rate", None, 2e-3),
        ("num_processes", "null", 1),
    ],
)
def test_papermills_values_arrive_as_the_fields_type(name, value, read):
    config = make_config("configs/tiny_cpu.yaml", "", **{name: value})
    section = {"overwrite": config.launch, "num_processes": config.launch}.get(name, config.training)
    assert getattr(section, name) == read and type(getattr(section, name)) is type(read)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "[1,2]"),
        ("learning_rate", float("nan")),
        ("num_epochs", 1.5),
        ("num_epochs", True),
        ("overwrite", "perhaps"),
        ("overwrite", 7),  # papermill has read 007
        ("task", "forwards"),
    ],
)
def test_other_values_are_refused_naming_parameter_and_value(name, value):
    with pytest.raises(ConfigError, match=re.escape(name)) as error:
        make_config("configs/tiny_cpu.yaml", "", **{name: value})
    assert str(value) in str(error.value)


def widget_notebook() -> nbformat.NotebookNode:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "IntSlider(value=0)"}
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", data=view)])
    cell.outputs.append(nbformat.v4.new_output("stream", text="kept"))
    return nbformat.v4.new_notebook(
        cells=[cell], metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {}}}
    )


def test_what_widgets_leave_does_not_break_the_page(tmp_path):
    path = tmp_path / "w.ipynb"
    nbformat.write(widget_notebook(), path)
    page = render(path).read_text()
    assert "kept" in page and "IntSlider" not in page and "widget-view" not in page
    notebook = widget_notebook()
    clean(notebook)
    assert "widgets" not in notebook.metadata and len(notebook.cells[0].outputs) == 1


def test_histories_are_found_or_told(tmp_path):
    with pytest.raises(ConfigError, match="no training history"):
        find_histories(None, str(tmp_path))
    old = {"train_loss": [2.0, 1.0], "val_loss": [1.5, 1.2], "epochs": [1, 2], "step_logs": [{"step": 1, "loss": 2.0}]}
    write_json(tmp_path / "old" / "history.json", old)
    (history,) = find_histories(str(tmp_path / "old" / "history.json"), "outputs").values()
    assert [record["val_loss"] for record in history["epochs"]] == [{"validation": 1.5}, {"validation": 1.2}]
    write_json(tmp_path / "other runs" / "old" / "history.json", old | {"val_loss": [3.0, 2.0]})
    paths = f"{tmp_path}/old '{tmp_path}/other runs/old/history.json' {tmp_path}/old/history.json"
    write_json(tmp_path / "old" / "training_history.json", history)
    assert [one["epochs"][-1]["val_loss"]["validation"] for one in find_histories(paths, "outputs").values()] == [
        1.2, 2.0, 1.2
    ]  # fmt: skip
    assert summary(history) == (
        "The run ended after epoch 2; its lowest validation loss on validation rows is 1.2, after epoch 2."
    )


def test_the_default_configuration_is_the_notebooks_own():
    cells = nbformat.read(ROOT / "notebooks" / "train.ipynb", as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert make_config(**values) == load_config("configs/tiny_cpu.yaml")
