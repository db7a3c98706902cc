"""One process or two: the same rows, losses, decisions and adapter; and runs that go on after an interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmrev_kit.config.project import run_dir
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training import loop
from mmrev_kit.training.history import read_history

ROOT = Path(__file__).parents[2]


def adapter(config) -> dict[str, torch.Tensor]:
    return load_file(run_dir(config) / "final" / "adapter_model.safetensors")


@pytest.mark.long
def test_two_processes_accumulating_four_equal_one_accumulating_eight(small_config, tmp_path):
    """511 rows: the last window holds 7, an uneven 4 + 3. Two of three epochs are no improvement: the rate is halved.

    The two-process run has checkpointing on: the combination that other trainers refuse. Packed rows lie otherwise in
    one process than in two.
    """
    common = (
        "lora.dropout=0 training.batch_size=1 training.num_epochs=3 training.improvement_threshold=0.99 "
        "training.lr_patience=1 training.learning_rate=5e-4 retention.retention_ratio=0.295"
    )
    one = small_config(f"{common} training.gradient_accumulation_steps=8 launch.output_dir={tmp_path}/one")
    two = small_config(
        f"{common} training.gradient_accumulation_steps=4 launch.num_processes=2 launch.output_dir={tmp_path}/two "
        "memory.gradient_checkpointing=true"
    )
    a, b = launch(one), launch(two)
    assert a["steps_per_epoch"] == b["steps_per_epoch"] == 64  # 511 / 8, rounded up
    for left, right in zip(a["steps"][:5], b["steps"][:5], strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
    for left, right in zip(a["epochs"], b["epochs"], strict=True):
        assert right["train_loss"] == pytest.approx(left["train_loss"], rel=1e-4)
        assert right["val_loss"] == pytest.approx(left["val_loss"], rel=1e-4)
    for history in (a, b):
        assert [record["lr"] for record in history["epochs"]] == [5e-4, 5e-4, 2.5e-4]
        assert history["epochs"][-1]["decision"]["lr"] == 1.25e-4
        assert [record["decision"]["improved"] for record in history["epochs"]] == [True, False, False]
    weights = adapter(one), adapter(two)
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) < 1e-4


@pytest.mark.long
def test_two_launches_from_a_notebook_after_it_has_processed_a_large_image(small_overrides, tmp_path):
    """The resize runs threads in the kernel: a worker forked from it would hang in its first threaded region."""
    Image.effect_noise((512, 512), 50).convert("RGB").save(tmp_path / "large.png")
    overrides = f"{small_overrides} experiment.task=reverse training.num_epochs=1 training.batch_size=16"
    cells = [
        "import sys\nfrom pathlib import Path\nfrom mmrev_kit.config.reading import load_config\n"
        "from mmrev_kit.notebook.launch import launch\nfrom mmrev_kit.model.processor import make_encoder",
        f"config = load_config('configs/tiny_cpu.yaml', {overrides!r} + ' launch.num_processes=2')\n"
        f"pixels, grid = make_encoder(config).pixels(Path({str(tmp_path / 'large.png')!r}), 16384)\n"
        "import torch\ntorch.ones(2048, 2048) @ torch.ones(2048, 2048)\nassert torch.get_num_threads() > 1",
        "first = launch(config)",
        "config.launch.overwrite = True\nsecond = launch(config)",
        "assert [s['loss'] for s in first['steps']] == [s['loss'] for s in second['steps']]\n"
        "print('clean:', 'bitsandbytes' not in sys.modules)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "n.ipynb")
    command = [sys.executable, "-m", "papermill", str(tmp_path / "n.ipynb"), str(tmp_path / "o.ipynb")]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    outputs = [cell.outputs for cell in nbformat.read(tmp_path / "o.ipynb", as_version=4).cells]
    text = ["".join(output.get("text", "") for output in cell) for cell in outputs]
    assert "clean: True" in text[-1]
    for launched in text[2:4]:
        assert "2 processes" in launched and "epoch 1/1: train" in launched


SCRIPT = """
import sys
from mmrev_kit.config.reading import load_config
from mmrev_kit.notebook.launch import launch
launch(load_config("configs/tiny_cpu.yaml", sys.argv[1]))
"""


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def children(folder: Path) -> list[int]:
    """Processes whose command line names the run folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.long
def test_an_interrupted_launch_goes_on_and_equals_the_uninterrupted_run(small_config, small_overrides, tmp_path):
    more = "training.save_steps=10 lora.dropout=0.1 training.num_epochs=3"  # long enough to be caught in the middle
    whole = small_config(f"{more} launch.output_dir={tmp_path}/whole")
    expected = launch(whole)
    again = small_config(f"{more} launch.output_dir={tmp_path}/again")
    folder = run_dir(again)
    words = f"{small_overrides} {more} launch.output_dir={tmp_path}/again"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    history = folder / "training_history.json"
    wait_for(lambda: history.is_file() and len(read_history(history)["steps"]) > 55, 120)  # in the second epoch
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0 and f"go on from {folder / 'last'}" in output
    assert not children(folder)
    stopped = read_history(history)
    assert stopped["status"] == "interrupted" and len(stopped["steps"]) < stopped["total_steps"]
    found = launch(again)
    assert [step["loss"] for step in found["steps"]] == [step["loss"] for step in expected["steps"]]
    assert [step["lr"] for step in found["steps"]] == [step["lr"] for step in expected["steps"]]
    for left, right in zip(found["epochs"], expected["epochs"], strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}
    assert found["status"] == "finished" and found["reason"] == expected["reason"]
    weights = adapter(whole), adapter(again)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.long
def test_eight_bit_optimizers_go_on_exactly(small_config, tmp_path, monkeypatch, optimizer):
    from types import SimpleNamespace

    state = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))
    more = f"training.optimizer={optimizer} training.save_steps=7 training.num_epochs=1 lora.r=16"
    whole, again = (small_config(f"{more} launch.output_dir={tmp_path}/{name}") for name in ("whole", "again"))
    loop.train(whole, state)
    real, calls = loop.update, []

    def interrupted(run, samples):
        calls.append(1)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return real(run, samples)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(again, state)
    loop.train(again, state)
    weights = adapter(whole), adapter(again)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.long
def test_a_run_that_ended_early_is_not_trained_again(small_config, capsys):
    config = small_config("experiment.task=reverse training.min_val_loss=100")
    history = launch(config)
    assert history["reason"].startswith("validation loss") and len(history["epochs"]) == 1
    written = (run_dir(config) / "final" / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert launch(config) == history
    assert "is finished (validation loss" in capsys.readouterr().out
    assert (run_dir(config) / "final" / "adapter_model.safetensors").stat().st_mtime_ns == written
