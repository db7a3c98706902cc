"""Runs in the processes that a launcher starts, for test_zero.py: `torchrun sharded_runs.py FOLDER SETTINGS`.

Each trains in a folder of its own below FOLDER, with shares and without; `cut` is interrupted in its second epoch, two
updates after its last save, and goes on. In fp16 the scaler begins too high, so that the first updates are skipped.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from mmrev_kit.config.reading import load_config
from mmrev_kit.training import loop
from mmrev_kit.training.processes import worker_state

RUNS = {
    "plain": "launch.mode=data",
    "shared": "launch.mode=deepspeed",
    "cut": "launch.mode=deepspeed",
    "plain16": "launch.mode=data quantization.compute_dtype=fp16 training.num_epochs=1",
    "shared16": "launch.mode=deepspeed quantization.compute_dtype=fp16 training.num_epochs=1",
}
torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**20)


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
    with worker_state(folder) as state:
        for name, more in RUNS.items():
            config = load_config("configs/tiny_cpu.yaml", f"{words} {more} launch.output_dir={folder}/{name}")
            if name == "cut":
                train_and_interrupt(config, state)
            loop.train(config, state)


if __name__ == "__main__":
    main()
