"""Mode deepspeed: the runs of the plain way, with the optimizer in shares; and what the mode does not do."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training import zero
from mmrev_kit.training.history import read_history
from mmrev_kit.training.processes import free_port
from mmrev_kit.training.rehearse import rehearse

ROOT = Path(__file__).parents[2]
SHARED = "launch.mode=deepspeed quantization.bits=16"


def largest_difference(left: Path, right: Path) -> float:
    """Between the numbers of two files of tensors with the same names."""
    a, b = load_file(left), load_file(right)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.long
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: pip install -e '.[deepspeed]'")
def test_runs_with_shares_equal_those_without_and_go_on_after_a_cut(tmp_path):
    """60 rows: the last update of an epoch has 12, and passes of 200 tokens are not as many in one process as in the
    other. `last/` is that of the plain way, too: a state does not depend on who holds it."""
    words = (
        f"experiment.name=four experiment.taught=generation data.dir={tmp_path}/data data.num_main=4 "
        "data.num_control=0 data.image_size=32 retention.retention_ratio=0 training.num_epochs=2 training.save_steps=5 "
        "training.batch_size=8 memory.micro_tokens=200 lora.dropout=0.1 quantization.bits=16 launch.num_processes=2 "
        "training.max_grad_norm=0.5"
    )
    ensure_data(load_config("configs/tiny_cpu.yaml", words))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*command, "tests/training/sharded_runs.py", str(tmp_path), words], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folders = {name: tmp_path / name / "four_forward" for name in ("plain", "shared", "cut", "plain16", "shared16")}
    runs = {name: read_history(folder / "training_history.json") for name, folder in folders.items()}
    for name, other, close in (("shared", "plain", 1e-5), ("cut", "shared", 0), ("shared16", "plain16", 1e-3)):
        assert len(runs[name]["steps"]) == len(runs[other]["steps"]) == (4 if close == 1e-3 else 8)
        for key in ("loss", "lr", "grad_norm"):
            pairs = [(a[key], b[key]) for a, b in zip(runs[name]["steps"], runs[other]["steps"], strict=True)]
            assert all(a == b or a == pytest.approx(b, abs=close, rel=close) for a, b in pairs), (name, key, pairs)
        assert runs[name]["epochs"][-1]["val_loss"]["forward"] == pytest.approx(
            runs[other]["epochs"][-1]["val_loss"]["forward"], abs=close
        )
        for file in ("final/adapter_model.safetensors", "last/adapter.safetensors", "last/optimizer.safetensors"):
            assert largest_difference(folders[name] / file, folders[other] / file) <= close
    clipped = [step["grad_norm"] > 0.5 for step in runs["shared"]["steps"]]
    assert any(clipped) and runs["shared"]["epochs"][-1]["train_loss"] < runs["shared"]["steps"][0]["loss"] - 0.1
    skipped = [[step.get("skipped", False) for step in runs[name]["steps"]] for name in ("plain16", "shared16")]
    assert skipped[0] == skipped[1] and True in skipped[0] and not skipped[0][-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("launch.mode=deepspeed", r"quantization.bits = 4: launch.mode=deepspeed trains a 16-bit base"),
        (f"{SHARED} training.optimizer=adamw_8bit", "training.optimizer = 'adamw_8bit': launch.mode=deepspeed"),
    ],
)
def test_settings_that_the_mode_does_not_have_are_refused(small_config, words, told):
    with pytest.raises(ConfigError, match=told):
        small_config(words)


def test_a_training_that_the_mode_does_not_do_is_not_started(small_config, monkeypatch):
    def refused(words: str) -> str:
        with pytest.raises(ConfigError) as found:
            launch(small_config(words))
        return str(found.value)

    auto = small_config("launch.mode=auto quantization.bits=16")
    assert "does not train. Set launch.mode=data" in refused("launch.mode=auto quantization.bits=16")
    with pytest.raises(ConfigError, match="does not train"):
        rehearse(auto)
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    assert "deepspeed is not installed. Run pip install -e '.[deepspeed]'" in refused(
        f"{SHARED} launch.num_processes=2"
    )
    monkeypatch.setattr(zero, "find_spec", lambda name: True)
    assert "this run has one. Set launch.num_processes=2" in refused(f"{SHARED} launch.num_processes=1")
