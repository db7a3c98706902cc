"""The guide's eight processes, and several nodes: the same losses as one process, every row computed once."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mmrev_kit.config import run_dir
from mmrev_kit.launch import launch
from mmrev_kit.train import ordered_rows, prepare

ROOT = Path(__file__).parent.parent
# Every process writes the rows that it computes, by file and line, into a file of its own.
RECORDED = """
import os, sys
from mmrev_kit.batches import Batcher
from mmrev_kit.config import load_config
from mmrev_kit.launch import launch
from mmrev_kit.train import prepare

packed = Batcher.packed

def recorded(self, groups):
    with open(f"{sys.argv[1]}/rows{os.environ['RANK']}.txt", "a") as file:
        file.writelines(f"{sample.row.where}\\n" for group in groups for sample in group.samples)
    return packed(self, groups)

Batcher.packed = recorded
config = load_config("configs/tiny_cpu.yaml", sys.argv[2])
prepare(config)  # as the notebook does; the forked processes have its imports then
launch(config)
"""


def test_eight_processes_accumulating_eight_equal_one_accumulating_64(small_config, small_overrides, tmp_path):
    """300 rows: four updates of 64, and one of 44, of which some processes have fewer than others."""
    common = "experiment.task=reverse lora.dropout=0 training.batch_size=1 training.num_epochs=1"
    eight = f"{common} training.gradient_accumulation_steps=8 launch.num_processes=8 launch.output_dir={tmp_path}/eight"
    one = f"{common} training.gradient_accumulation_steps=64 launch.output_dir={tmp_path}/one"
    command = [sys.executable, "-c", RECORDED, str(tmp_path), f"{small_overrides} {eight}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 processes" in done.stdout and "fresh Python" not in done.stdout
    config = small_config(eight)
    manifest = json.loads((run_dir(config) / "manifest.json").read_text())
    assert manifest["num_processes"] == 8 and manifest["effective_batch"] == 64

    a, b = launch(small_config(one)), json.loads((run_dir(config) / "training_history.json").read_text())
    assert a["steps_per_epoch"] == b["steps_per_epoch"] == 5  # 300 / 64, rounded up
    for left, right in zip(a["steps"], b["steps"], strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
    assert b["epochs"][0]["train_loss"] == pytest.approx(a["epochs"][0]["train_loss"], rel=1e-4)
    assert b["epochs"][0]["val_loss"] == pytest.approx(a["epochs"][0]["val_loss"], rel=1e-4)

    task = prepare(config)
    planned = [task.train[source][index].row.where for source, index in ordered_rows(config, task, 0)]
    planned += [sample.row.where for samples in task.val.values() for sample in samples]
    computed = [(tmp_path / f"rows{rank}.txt").read_text().splitlines() for rank in range(8)]
    assert Counter(row for rows in computed for row in rows) == Counter(planned)
    assert all(computed)
