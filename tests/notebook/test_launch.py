"""Launching: the run folder, processes, and errors that reach the caller."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmrev_kit
from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.files import write_json, write_text
from mmrev_kit.model import features
from mmrev_kit.notebook.launch import evaluate, launch
from mmrev_kit.notebook.progress import LogLines
from mmrev_kit.training import checkpoints, loop, preflight
from mmrev_kit.training.history import History, begin_run, epoch_line, prepare_folder, read_history
from mmrev_kit.training.jobs import count_processes, job_environment
from mmrev_kit.training.update import TrainingError

ROOT = Path(__file__).parents[2]
HALF = "experiment.task=reverse training.num_epochs=1 training.batch_size=16 lora.dropout=0"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_mode_auto_is_one_process(small_config):
    auto = "quantization.bits=16 launch.mode=auto"
    assert count_processes(small_config(auto)) == 1
    with pytest.raises(ConfigError, match=r"set launch\.num_processes=1"):
        count_processes(small_config(f"{auto} launch.num_processes=2"))


def test_one_process_ends_finished(small_config, capsys):
    config = small_config(HALF)
    history = launch(config)
    assert history["status"] == "finished" and len(history["epochs"]) == 1
    told = capsys.readouterr().out
    assert "epoch 1/1: train " in told and ": 1 process\n" in told
    assert "bitsandbytes" not in Path(run_dir(config) / "training_history.json").read_text()
    log = (run_dir(config) / "train.log").read_text().splitlines()
    assert [line for line in log if not line.startswith("progress: ")] == []  # no library's chatter
    assert [line.removeprefix("progress: ") for line in log] == told.splitlines()[-len(log) :]
    saved = load_config(run_dir(config) / "config.yaml")
    assert saved.launch.num_processes == 1 and saved.experiment.task == "reverse"

    launch(config)  # finished: told, and not trained again
    assert "is finished (last epoch)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"another configuration: training.learning_rate \(0.002 there, 0.001 now\)"):
        launch(small_config(HALF + " training.learning_rate=1e-3"))
    assert read_history(run_dir(config) / "training_history.json") == history


@pytest.mark.long
def test_what_the_kernel_has_imported_or_computed_does_not_matter(small_overrides, tmp_path):
    """Two processes from a clean kernel, twice, and from one that imported peft and ran threads: the same run."""
    code = """
import sys
from mmrev_kit.config.reading import load_config
from mmrev_kit.notebook.launch import evaluate, launch
{first}
for number in range({times}):
    config = load_config("configs/tiny_cpu.yaml", {overrides!r} + f" launch.output_dir={folder}/{{number}}")
    history = launch(config)
    assert history["status"] == "finished"
print("bitsandbytes here:", "bitsandbytes" in sys.modules)
"""
    used = "import peft, torch\ntorch.ones(999, 999) @ torch.ones(999, 999)\n"
    used += "from accelerate import PartialState\nPartialState(cpu=True)"
    overrides = f"{small_overrides} {HALF} training.batch_size=8 launch.num_processes=2"
    found = {}
    for name, first, times in (("clean", "", 2), ("used", used, 1)):
        folder = tmp_path / name
        done = python(code.format(first=first, times=times, overrides=overrides, folder=folder))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"bitsandbytes here: {name == 'used'}" in done.stdout
        for number in range(times):
            history = read_history(folder / str(number) / "small_reverse" / "training_history.json")
            manifest = json.loads((folder / str(number) / "small_reverse" / "manifest.json").read_text())
            assert manifest["num_processes"] == 2 and manifest["effective_batch"] == 16
            assert len(history["steps"]) == 27  # 420 rows in updates of 16
            peaks = history["steps"][-1]["peak_memory_gib_by_process"]
            assert len(peaks) == 2 and 0.1 < min(peaks) and max(peaks) == history["steps"][-1]["peak_memory_gib"]
            found[name, number] = [step["loss"] for step in history["steps"]]
    assert found["clean", 0] == found["clean", 1] == found["used", 0]


def test_a_workers_error_reaches_the_caller_and_the_history(small_config, small_data):
    config = small_config("experiment.name=small training.max_length=20")
    with pytest.raises(TrainingError, match=r"forward_train.jsonl:1: .*max_length = 20"):
        launch(config)
    (error,) = run_dir(config).glob("error_rank*.txt")
    assert error.name == "error_rank0.txt"


def test_the_cores_are_dealt_out_among_the_workers(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert job_environment(4)["OMP_NUM_THREADS"] == "16" and job_environment(100)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in job_environment(1)  # one process may have them all
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert job_environment(4)["OMP_NUM_THREADS"] == "16"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert job_environment(4)["OMP_NUM_THREADS"] == "3"  # the user's


def test_a_rank_that_another_launcher_left_is_no_business_of_a_job(monkeypatch):
    left = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMPI_COMM_WORLD_SIZE PMI_RANK".split()
    for name in (*left, "TORCHELASTIC_RUN_ID", "RANKING", "OMP_PROC_BIND"):
        monkeypatch.setenv(name, "2")
    assert job_environment(1).keys() & {*left, "TORCHELASTIC_RUN_ID"} == set()
    assert job_environment(1).keys() >= {"RANKING", "OMP_PROC_BIND"}


def test_the_kit_runs_from_its_folder_without_being_installed(small_config, monkeypatch):
    """No metadata of it is asked for, neither before the weights are loaded nor in the manifest."""

    def version(name: str) -> str:
        if name.startswith("mmrev"):
            raise PackageNotFoundError(name)
        return metadata.version(name)

    for module in (checkpoints, preflight, features):
        monkeypatch.setattr(module, "version", version)
    config = small_config("training.num_epochs=1 training.batch_size=64 retention.retention_ratio=0")
    preflight.preflight(config)
    state = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))
    loop.train(config, state)
    manifest = json.loads((run_dir(config) / "manifest.json").read_text())
    assert manifest["versions"]["mmrev-kit"] == mmrev_kit.__version__ == metadata.version("mmrev-kit")


@pytest.mark.long
def test_runs_of_two_names_share_one_data_set(small_config, small_data, tmp_path):
    before = sorted(path.name for path in small_data.rglob("*"))
    config = small_config(f"experiment.name=other data.folder={small_data}/small {HALF} training.batch_size=64")
    assert ensure_data(config)[1] == f"found {small_data}/small"
    assert launch(config)["status"] == "finished" and run_dir(config) == tmp_path / "outputs" / "other_reverse"
    assert evaluate(config) == tmp_path / "outputs" / "other_reverse" / "eval" / "small"
    assert sorted(path.name for path in small_data.rglob("*")) == before


@pytest.fixture
def finished(small_config):
    """The folder of a finished run with an evaluation, as its files' names go, and notes of the user's beside them."""
    folder = run_dir(small_config())
    begin_run(small_config())
    write_json(folder / "training_history.json", {"status": "finished", "reason": "x", "steps": [], "epochs": []})
    names = ["best/adapter_config.json", "final/README.md", "last/state.json", "eval/small/facts.json"]
    for name in ["manifest.json", "train.log", "notes.txt", "eval/small/predictions.jsonl", *names]:
        write_text(folder / name, "old")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_replaced_goes_after_the_checks_and_only_what_a_run_wrote(finished, small_config):
    before, other = contents(finished), small_config("launch.overwrite=true lora.r=4")
    assert prepare_folder(small_config())["status"] == "finished"
    assert prepare_folder(other) is None and contents(finished) == before
    begin_run(other)
    left = {"config.yaml", "train.log", "notes.txt", "eval/small/predictions.jsonl"}
    assert contents(finished).keys() == left and not list(finished.glob(".*"))
    assert load_config(finished / "config.yaml").lora.r == 4
    assert [path.name for path in sorted(finished.iterdir()) if path.is_dir()] == ["eval"]


def test_a_configuration_that_the_check_refuses_replaces_nothing(finished, small_config):
    before = contents(finished)
    with pytest.raises(TrainingError, match=r"max_length = 20"):
        launch(small_config("launch.overwrite=true training.max_length=20"))
    after = contents(finished)
    assert after.pop("error_rank0.txt") and after.pop("train.log") and before.pop("train.log")
    assert after == before


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("best/thesis.txt", lambda path: path.write_text("mine")),
        ("last/mine", lambda path: path.mkdir()),
        ("best", lambda path: (shutil.rmtree(path), path.symlink_to(path.parent.parent))),
        ("final", lambda path: (shutil.rmtree(path), path.write_text("mine"))),
        ("manifest.json", lambda path: (path.unlink(), path.symlink_to("notes.txt"))),
    ],
)
def test_what_a_run_did_not_write_is_named_and_left_as_it_is(finished, small_config, name, make):
    make(finished / name)
    before = contents(finished)
    with pytest.raises(ConfigError, match=rf"small_forward/{name}: not written by a run"):
        launch(small_config("launch.overwrite=true lora.r=4"))
    assert contents(finished) == before and (finished / name).exists()


def test_more_processes_than_a_machine_without_gpus_can_use_are_refused(small_config, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(ConfigError, match=r"num_processes = 4096, but this machine has no GPU and 2 cores"):
        launch(small_config("launch.num_processes=4096"))
    assert preflight.preflight(small_config("launch.num_processes=8")).problems == []
    assert len(preflight.preflight(small_config("launch.num_processes=9")).problems) == 1


def test_more_processes_than_gpus_are_refused(small_config, monkeypatch):
    monkeypatch.setattr("mmrev_kit.training.jobs.read_cards", lambda: ["one", "another"])
    assert count_processes(small_config("launch.num_processes=null")) == 2
    with pytest.raises(ConfigError, match=r"num_processes = 3, but this machine has 2 GPUs"):
        count_processes(small_config("launch.num_processes=3"))
    monkeypatch.setattr("mmrev_kit.training.jobs.read_cards", lambda: [])
    assert count_processes(small_config("launch.num_processes=3")) == 3
    assert count_processes(small_config("launch.num_processes=null")) == 1


def test_progress_is_a_few_plain_lines_that_say_the_rest(tmp_path, capsys, monkeypatch):
    """50 updates of 2 s each: 5 of 50 are 10 %, after 10 s, and 45 updates of 2 s remain."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("mmrev_kit.config.reporting.time.monotonic", lambda: clock.now)
    history = History(tmp_path / "training_history.json")
    history.data |= {"total_steps": 50, "steps_per_epoch": 25}
    history.begin()
    for number in range(1, 51):
        clock.now += 2.0
        epoch = (number + 24) // 25
        record = {"global_step": number, "epoch": epoch, "loss": 1.0, "samples": 8, "samples_per_second": 4.0}
        history.add_step(record)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == (
        "progress: 10%, epoch 1/2, update 5/50: loss 1, 4.0 samples/s, 10 s elapsed, about 1 min 30 s remaining"
    )
    assert lines[-1] == "progress: 100%, epoch 2/2, update 50/50: loss 1, 4.0 samples/s, 1 min 40 s elapsed"
    assert read_history(history.path)["steps"][4]["seconds"] == 10.0

    gone_on = History(history.path)
    gone_on.data |= {"total_steps": 100, "steps_per_epoch": 25, "steps": history.data["steps"]}
    gone_on.begin()  # an hour later: the time between does not count
    clock.now += 40.0
    gone_on.add_step({"global_step": 51, "epoch": 3, "loss": None, "samples": 8, "samples_per_second": 0.2})
    (line,) = capsys.readouterr().out.splitlines()  # after twenty seconds without a line
    assert line.startswith("progress: 51%, epoch 3/4, update 51/100: loss not finite, ")
    assert line.endswith("2 min 20 s elapsed, about 2 min 15 s remaining")  # 140 s / 51 * 49


def test_the_notebook_shows_the_logs_lines_and_in_jupyterlab_one_that_follows(
    tmp_path, capsys, monkeypatch, open_in_jupyterlab
):
    log = tmp_path / "train.log"
    log.write_text("progress: of an earlier run\n")
    for person in (False, True):
        # which a command in a cell, and a sweep's run, inherit from their notebook
        monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
        if person:
            open_in_jupyterlab()
        lines = LogLines(log)
        with log.open("a") as file:
            file.write("a library says\nprogress: loading embedded\nprogress: 10%, epoch 1/2, update 5/50: loss 1")
        lines.show()
        assert capsys.readouterr().out == "loading embedded\n"  # the other line is not whole yet
        with log.open("a") as file:
            file.write(", 4.0 samples/s\nprogress: epoch 1/2: train 1\nprogress: 40%, 4 of 10 prompts\n")
        lines.show()
        told = ["10%, epoch 1/2, update 5/50: loss 1, 4.0 samples/s", "epoch 1/2: train 1"] * (not person)
        assert capsys.readouterr().out.splitlines() == [*told, "40%, 4 of 10 prompts"]


def test_no_line_is_lost_behind_bytes_that_are_no_text(tmp_path, capsys):
    log = tmp_path / "train.log"
    lines = LogLines(log)
    for number in (1, 2):
        with log.open("ab") as file:
            file.write(b"\xff" * 40 + b" of a library\r\nprogress: line %d\n" % number)
        lines.show()
    assert capsys.readouterr().out == "line 1\nline 2\n"


def decision(improved: bool, reduced: bool, bad_epochs: int, lr: float, stop: str | None) -> dict:
    return {"improved": improved, "reduced": reduced, "bad_epochs": bad_epochs, "lr": lr, "stop": stop}


@pytest.mark.parametrize(
    ("decided", "text"),
    [
        (decision(True, False, 0, 0.1, None), "improved, saved as best, 3 s"),
        (decision(False, True, 0, 0.05, "x"), "no improvement, rate reduced to 0.05, 3 s; ends: x"),
        (decision(False, False, 1, 0.1, None), "no improvement (1 in a row), 3 s"),
    ],
)
def test_an_epoch_in_one_line(decided, text):
    record = {"epoch": 2, "train_loss": 1.5, "val_loss": {"forward": 1.25}, "lr": 0.1, "seconds": 3.2}
    line = epoch_line(record | {"decision": decided}, 4)
    assert line == f"epoch 2/4: train 1.5, validation forward 1.25, lr 0.1, {text}"


def test_an_output_folder_that_cannot_be_written_is_told_before_anything_starts(small_config, tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(
        ConfigError, match=r"taken/small_forward cannot be written \(.*\)\. Choose another launch\.output"
    ):
        launch(small_config(f"launch.output_dir={tmp_path}/taken"))
    assert (tmp_path / "taken").read_text() == "a file, not a folder"
