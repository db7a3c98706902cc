"""Runs killed at random moments, each started again until it is finished: `python benchmarks/soak.py --runs 200`.

A run of the embedded model on few rows saves after every step, in one process or two. A kernel's part is played by a
process that calls `launch`; at a random moment it, or one of the run's workers, is killed with SIGKILL, or it is
interrupted with SIGINT. After each kill every file of the run folder must load; when the run is finished its losses,
rates, decisions and final adapter must be those of a run that nothing happened to, and no process may be left.

All processes are forked from this one, which has imported the libraries and computed nothing: a fresh interpreter for
each would only add seconds of importing to every try.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # a process with threads cannot be forked

import argparse
import ctypes
import json
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import peft  # noqa: F401  imported once, here, for all
import psutil
from safetensors import safe_open
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from forking import as_process, fork_jobs

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training.history import read_history

SMALL = (
    "experiment.name=soak experiment.taught=generation data.num_main=4 data.num_control=0 data.image_size=32 "
    "retention.retention_ratio=0 quantization.bits=16 training.save_steps=1 training.num_epochs=3 "
    "training.lr_patience=1 training.improvement_threshold=0.7"
)
KILLS = ("SIGKILL parent", "SIGKILL worker", "SIGINT parent")
SECONDS_TO_END = 10  # after a kill, for every process of the run
PR_SET_CHILD_SUBREAPER = 36


def start_kernel(config, log: Path) -> int:
    """Fork the process that calls `launch`; returns its id."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job was started to ignore it
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    fork_jobs()
    as_process(lambda: launch(config))


def living() -> list[psutil.Process]:
    """Every process of the run: this one adopts those whose parent has died."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for_end(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while living():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def kill(kernel: int, kind: str, chance: random.Random) -> str | None:
    """Returns the kind of kill; the parent's where there is no worker yet, and None where all had ended."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        workers = [process.pid for process in psutil.Process(kernel).children()]
        if kind == "SIGKILL worker" and not workers:
            kind = "SIGKILL parent"
        target = chance.choice(workers) if kind == "SIGKILL worker" else kernel
        os.kill(target, signal.SIGINT if kind == "SIGINT parent" else signal.SIGKILL)
        return kind
    return None


def faults_of(folder: Path) -> list[str]:
    """What does not load in a run folder; a version moved aside counts as there."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if ".new." not in str(path) and ".part." not in str(path)):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "np") as tensors:
                    for name in tensors.keys():
                        tensors.get_tensor(name)
            elif path.name == "training_history.json":
                read_history(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # any error at all is a fault
            found.append(f"{path.name}: {error}")
    return found


def outcome(folder: Path) -> tuple:
    """What must not depend on how often a run was killed."""
    history = read_history(folder / "training_history.json")
    steps = [[step[name] for name in ("global_step", "loss", "lr", "grad_norm")] for step in history["steps"]]
    epochs = [[epoch[name] for name in ("train_loss", "val_loss", "lr", "decision")] for epoch in history["epochs"]]
    adapters = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("best", "final")]
    left = sorted(path.name for path in folder.glob(".*"))
    return history["status"], history["reason"], steps, epochs, adapters, left


def run_until_finished(config, log: Path, longest: float, chance: random.Random, count: Counter) -> list[str]:
    """Kill a run once or twice, then let it finish. Returns what was wrong."""
    folder, wrong, killed, wanted = run_dir(config), [], 0, chance.choice((1, 1, 1, 2))
    for _ in range(30):
        kernel, kind = start_kernel(config, log), chance.choice(KILLS)
        if killed < wanted:
            if not wait_for_end(chance.uniform(0, longest)) and (done := kill(kernel, kind, chance)):
                count[done] += 1
                killed += 1
            elif not killed:  # it was faster
                wait_for_end(60)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            began = time.monotonic()
            if not wait_for_end(SECONDS_TO_END):
                count["processes left"] += len(living())
                wrong.append(f"{kind}: processes left after {SECONDS_TO_END} s")
            count["slowest end"] = max(count["slowest end"], round(time.monotonic() - began, 1))
        elif not wait_for_end(300):
            wrong.append("no end within 300 s")
        for process in living():
            process.kill()
        wait_for_end(10)
        count["tries"] += 1
        wrong += faults_of(folder)
        history = folder / "training_history.json"
        if history.is_file() and read_history(history)["status"] == "finished":
            return wrong
    return [*wrong, "not finished"]


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--runs", type=int, default=200)
    given.add_argument("--seed", type=int, default=0)
    given = given.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    home, chance, broken = Path(tempfile.mkdtemp()), random.Random(given.seed), 0
    counts, whole, seconds = {1: Counter(), 2: Counter()}, {}, {}

    def make(number: int, name: str):
        batch = f"training.batch_size={12 // number} launch.num_processes={number}"
        more = f"{SMALL} {batch} data.dir={home}/data launch.output_dir={home}/{name}"
        return load_config("configs/tiny_cpu.yaml", more)

    ensure_data(make(1, "data"))
    for number in (
        1,
        2,
        1,
        2,
    ):  # the second time as the others will be, with nothing left to be read for the first time
        config, began = make(number, f"whole{number}"), time.monotonic()
        config.launch.overwrite = True
        start_kernel(config, home / "whole.log")
        wait_for_end(300)
        whole[number], seconds[number] = outcome(run_dir(config)), time.monotonic() - began
        print(f"{number} process(es): {seconds[number]:.1f} s uninterrupted, {len(whole[number][2])} steps", flush=True)
    began = time.monotonic()
    for run in range(given.runs):
        number = 1 + run % 2
        config, log = make(number, f"run{run}"), home / f"run{run}.log"
        wrong = run_until_finished(config, log, seconds[number], chance, counts[number])
        if not wrong and outcome(run_dir(config)) != whole[number]:
            wrong = ["another outcome than the uninterrupted run's"]
        counts[number]["runs"] += 1
        counts[number]["broken"] += bool(wrong)
        broken += bool(wrong)
        if wrong:
            kept = f"kept in {home}/run{run}"
            print(f"run {run}, {number} process(es): {'; '.join(wrong)}; {kept}", flush=True)
        else:
            shutil.rmtree(home / f"run{run}")
            log.unlink()
        if (run + 1) % 10 == 0:
            print(f"{run + 1} runs, {broken} broken, {time.monotonic() - began:.0f} s", flush=True)
    columns = ("runs", "tries", *KILLS, "slowest end", "processes left", "broken")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "peft", "safetensors"))
    print(f"\n{time.monotonic() - began:.0f} s, Python {platform.python_version()}, {versions}\n")
    print(f"| processes | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for number, count in counts.items():
        print(f"| {number} | {' | '.join(str(count[name]) for name in columns)} |")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
