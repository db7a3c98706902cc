"""Runs that kill themselves at a chosen moment, for test_kills.py: `python killed_runs.py FOLDER SCENARIOS`.

SCENARIOS is JSON, {name: [processes, [moment, ...]]}: one try a moment, then one that is let through. A moment is a
list of names: the process is killed right before it renames something to the last of them, having renamed to each of
the others before, in this order; or ["step", n, rank]: before its nth update; or ["done"]: a worker of several dies
when all have done their work, right before the launcher lets them go. Prints, as JSON, what each try left and
the outcome; the name "whole1" or "whole2", with no moment, is a run that nothing happens to.

One process imports the libraries and forks one for each try, so that a try takes seconds; it has one thread.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import synchronize
from pathlib import Path

import peft  # noqa: F401  imported once, here, for all tries
from forking import fork_jobs
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration  # noqa: F401

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training import loop
from mmrev_kit.training.history import read_history

SMALL = (
    "experiment.name=killed experiment.taught=generation data.num_main=4 data.num_control=0 data.image_size=32 "
    "retention.retention_ratio=0 quantization.bits=16 training.save_steps=2 training.num_epochs=3 "
    "training.lr_patience=1 lora.r=8 lora.alpha=16 lora.dropout=0.1 training.improvement_threshold=0.36 "
    "model.name=embedded-one-order"
)


def make(folder: Path, name: str, number: int):
    more = f"training.batch_size={20 // number} launch.num_processes={number} data.dir={folder}/data"
    return load_config("configs/tiny_cpu.yaml", f"{SMALL} {more} launch.output_dir={folder}/{name}")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: list) -> None:
    """Arrange this process's death, and that of those forked from it."""
    if moment[0] == "step":
        real, left = loop.update, [moment[1]]

        def update(run, samples):
            left[0] -= 1
            if left[0] == 0 and run.state.process_index == moment[2]:
                die()
            return real(run, samples)

        loop.update = update
        return
    if moment[0] == "done":
        let_go = synchronize.Event.set

        def kill_first(event) -> None:
            time.sleep(0.5)  # until they wait for it
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            let_go(event)

        synchronize.Event.set = kill_first
        return
    waiting = list(moment)

    def hook(event: str, arguments: tuple) -> None:
        if event == "os.rename" and Path(arguments[1]).name == waiting[0]:
            if len(waiting) == 1:
                die()
            waiting.pop(0)

    sys.addaudithook(hook)


def attempt(config, moment: list | None, log: Path) -> int:
    """One try in a forked process; returns the signal that ended it, or minus its exit code."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    handle, code = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        if moment:
            die_at(moment)
        if config.launch.num_processes == 1:
            loop.worker(config)
        else:
            launch(config)
        code = 0
    finally:
        os._exit(code)


def outcome(folder: Path) -> dict:
    """What must not depend on how often a run was killed."""
    history = read_history(folder / "training_history.json")
    found = {name: history[name] for name in ("status", "reason", "total_steps")}
    found["steps"] = [[step[name] for name in ("global_step", "loss", "lr", "grad_norm")] for step in history["steps"]]
    names = ("train_loss", "val_loss", "lr", "decision")
    found["epochs"] = [{name: epoch[name] for name in names} for epoch in history["epochs"]]
    for name in ("best", "final"):
        found[name] = (folder / name / "adapter_model.safetensors").read_bytes().hex()
    return found | {"left over": sorted(path.name for path in folder.glob(".*"))}


def main() -> None:
    fork_jobs()
    folder, scenarios, found = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
    ensure_data(make(folder, "data", 1))
    for index, (name, (number, moments)) in enumerate(scenarios.items()):
        config, tries = make(folder, f"run{index}", number), []
        for moment in [*moments, None]:
            code = attempt(config, moment, folder / f"run{index}.log")
            left = sorted(path.name.split(".new.")[0] for path in run_dir(config).iterdir() if path.is_dir())
            tries.append({"code": code, "folders": left})
        found[name] = {"tries": tries, "outcome": outcome(run_dir(config)) if tries[-1]["code"] == 0 else None}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
