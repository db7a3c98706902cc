"""Runs in two processes with the optimizer in shares and without: `torchrun sharded_runs.py FOLDER SETTINGS`.

Each trains in a folder of its own below FOLDER; `cut` is interrupted in its second epoch, two updates after its last
save, and goes on. In fp16 the scaler begins too high, so that an update is skipped.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from mmrev_kit.config.reading import load_config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.training import loop
from mmrev_kit.training.history import read_history
from mmrev_kit.training.processes import free_port, worker_state

ROOT = Path(__file__).parents[1]
FP16 = "quantization.compute_dtype=fp16 training.num_epochs=1"
RUNS = {
    "plain": "launch.mode=data",
    "shared": "launch.mode=deepspeed",
    "cut": "launch.mode=deepspeed",
    "plain16": f"launch.mode=data {FP16}",
    "shared16": f"launch.mode=deepspeed {FP16}",
}
# 60 rows, 4 updates an epoch, the last one of 12; the gradient of some is clipped
SMALL = (
    "experiment.name=four experiment.taught=generation data.num_main=4 data.num_control=0 data.image_size=64 "
    "retention.retention_ratio=0 training.num_epochs=2 training.save_steps=5 training.batch_size=8 lora.dropout=0.1 "
    "training.max_grad_norm=0.5 quantization.bits=16 launch.num_processes=2"
)


def train_all(folder: Path, words: str) -> dict[str, tuple[Path, dict]]:
    """{name: (run folder, history)} of all `RUNS`, with these settings beside `SMALL`."""
    words = f"{SMALL} data.dir={folder}/data {words}"
    ensure_data(load_config("configs/tiny_cpu.yaml", words))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [*command, __file__, str(folder), words], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folders = {name: folder / name / "four_forward" for name in RUNS}
    return {name: (run, read_history(run / "training_history.json")) for name, run in folders.items()}


def train_and_interrupt(config, state) -> None:
    real, calls = loop.update, []

    def interrupted(run, samples):
        calls.append(samples)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(run, samples)

    loop.update = interrupted
    try:
        loop.train(config, state)
    except KeyboardInterrupt:
        state.wait_for_everyone()
    loop.update = real


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2]
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**20)
    with worker_state(folder) as state:
        for name, more in RUNS.items():
            config = load_config("configs/tiny_cpu.yaml", f"{words} {more} launch.output_dir={folder}/{name}")
            if name == "cut":
                train_and_interrupt(config, state)
            loop.train(config, state)


if __name__ == "__main__":
    main()
