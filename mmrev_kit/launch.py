"""From a notebook cell to a finished run: the run folder, the processes, live progress, and errors that arrive."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from mmrev_kit import runs
from mmrev_kit.config import (
    Config,
    ConfigError,
    differences,
    load_config,
    project_root,
    resolve,
    run_dir,
    to_yaml,
)
from mmrev_kit.evaluate import DROPS, evaluate_worker, evaluation_key, read_questions
from mmrev_kit.loading import base_fingerprint, check_base
from mmrev_kit.preflight import preflight
from mmrev_kit.progress import LogLines, Progress
from mmrev_kit.results import write_results
from mmrev_kit.steps import TrainingError
from mmrev_kit.train import worker

OWN_FILES = ("config.yaml", "manifest.json", "training_history.json", "train.log")
REQUEST = "request.json"  # what an evaluation was asked for: adapter, drops, folder
# How long a thread of a CPU run waits busily for the others. By default they burn the time that a core shared with
# other work would give to the late one: training beside two busy programs was ten times slower.
SPINS = "1000"
OWN_FOLDERS = ("best", "final", "last")


def count_processes(config: Config) -> int:
    """Processes of this run: as configured, else one per GPU, else 1; in mode auto always 1.

    Raises:
        ConfigError: more processes than GPUs on a machine that has GPUs, or several in mode auto.
    """
    import torch

    if config.launch.mode == "auto":
        if (config.launch.num_processes or 1) > 1:
            raise ConfigError("launch.mode = 'auto' spreads one model over all GPUs: set launch.num_processes=1.")
        return 1
    gpus = torch.cuda.device_count()  # asks the driver; does not initialise CUDA
    wanted = config.launch.num_processes or max(gpus, 1)
    if gpus and wanted > gpus:
        raise ConfigError(f"launch.num_processes = {wanted}, but this machine has {gpus} GPUs.")
    return wanted


def why_not_here() -> str | None:
    """Why processes cannot be forked from this one, or None. CUDA and bitsandbytes do not survive a fork."""
    import torch
    from accelerate.state import PartialState

    if torch.cuda.is_initialized():
        return "CUDA is initialised in this kernel"
    if "bitsandbytes" in sys.modules:
        by = " (peft imports it)" if "peft" in sys.modules else ""
        return f"bitsandbytes has been imported in this kernel{by}"
    if PartialState._shared_state:
        return "an Accelerator has been used in this kernel"
    return None


def prepare_folder(config: Config) -> dict | None:
    """Make the run folder ready; returns the history of a run that is already finished, else None.

    Raises:
        ConfigError: the folder holds a run with another configuration, or cannot be written.
    """
    folder = run_dir(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = folder / "config.yaml"
        if config.launch.overwrite:
            runs.tidy(folder)  # or a version moved aside would come back
            for file in [folder / name for name in OWN_FILES]:  # first: no folder that is half gone counts as finished
                file.unlink(missing_ok=True)
            for name in OWN_FOLDERS:
                runs.remove_folder(folder / name)
        elif before.is_file():
            changed = differences(load_config(before), config)
            changed.pop("launch.overwrite", None)
            if changed:
                listed = ", ".join(f"{key} ({old!r} there, {new!r} now)" for key, (old, new) in changed.items())
                raise ConfigError(
                    f"{folder} holds a run with another configuration: {listed}. "
                    "Choose another experiment.name, or set launch.overwrite=true to replace that run."
                )
        clear_errors(folder)
        runs.write_text(before, to_yaml(config))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}). Choose another launch.output_dir.") from None
    history = folder / "training_history.json"
    if history.is_file() and runs.read_history(history)["status"] == "finished":
        return runs.read_history(history)
    return None


def launch(config: Config) -> dict:
    """Train: start the processes, show progress, and return the run's history when it has ended.

    Two processes or more are forked from this kernel by accelerate's `notebook_launcher`; a single one, or several
    from a kernel that cannot be forked, run in a fresh Python that does the same. An interrupted run goes on from its
    last save, a finished one is not trained again.

    Raises:
        ConfigError, DataError: nothing was started; the message says what to change.
        TrainingError: the run ended with an error; the message is the failing process's own.
    """
    config = deepcopy(config)
    config.launch.num_processes = count_processes(config)
    found = preflight(config)
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    finished = prepare_folder(config)
    folder = run_dir(config)
    if finished:
        print(f"{folder} is finished ({finished['reason']}). To train anew set launch.overwrite=true.")
        return finished
    number = config.launch.num_processes
    reason = "one process" if number == 1 else why_not_here()
    count = "1 process" if number == 1 else f"{number} processes"
    print(f"training in {folder}: {count}" + (f", in a fresh Python ({reason})" if reason else ""))
    progress, log = Progress(folder / "training_history.json"), LogLines(folder / "train.log")

    def show() -> None:
        log.show()
        progress.show()

    job = Job(config, folder, "train.log", worker, (config,), show)
    try:
        (_run_fresh if reason else _run_forked)(job)
    except KeyboardInterrupt:
        runs.mark_interrupted(folder / "training_history.json")
        saved = folder / "last"
        print("interrupted; run the same cell again to " + (f"go on from {saved}" if saved.exists() else "start anew"))
        raise
    log.show()
    progress.show(last=True)
    return runs.read_history(folder / "training_history.json")


def evaluate(
    config: Config, adapter: str | None = "best", drops: tuple[str, ...] = ("none",), again: bool = False
) -> Path:
    """Ask all test questions; returns the folder with predictions.jsonl, metrics.json and, of a run, verdict.json.

    The same evaluation is not made twice: same adapter, base, questions, pictures and settings.

    Args:
        config: of the run; pixel limits, template and prompts are those of its training.
        adapter: "best" or "final" of the run, or None for the base model without an adapter.
        drops: from `evaluate.DROPS`; "none" is the whole prompt.
        again: make it even if it is there.

    Raises:
        ConfigError: the run has no such adapter, or it belongs to another base; an unknown drop.
        DataError: a fault in the experiment's test files.
        TrainingError: the evaluation ended with an error; the message is the failing process's own.
    """
    config = deepcopy(config)
    config.launch.num_processes = count_processes(config)
    unknown = [drop for drop in drops if drop not in DROPS]
    if unknown or not drops:
        raise ConfigError(f"drop {' '.join(unknown) or '(none given)'}: must be of {', '.join(DROPS)}.")
    chosen = run_dir(config) / adapter if adapter else None
    base = base_fingerprint(config)
    if chosen:
        check_base(chosen, base, config.model.name)
    owner = run_dir(config) if chosen else resolve(config.launch.output_dir) / f"base_{base}"
    folder = owner / "eval" / config.experiment.name
    questions = read_questions(config)  # a fault in the test files is told here, before any process starts
    key = evaluation_key(config, chosen, base, drops, questions)
    facts = folder / "facts.json"
    if not again and facts.is_file() and json.loads(facts.read_text(encoding="utf-8")).get("key") == key:
        print(f"{folder} holds this evaluation.")
        return folder
    facts.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    clear_errors(folder)
    runs.write_text(folder / "config.yaml", to_yaml(config))
    request = [str(chosen) if chosen else None, list(drops), str(folder)]
    runs.write_json(folder / REQUEST, request)
    number = config.launch.num_processes
    reason = "one process" if number == 1 else why_not_here()
    print(f"evaluating {chosen or config.model.name}" + (f", in a fresh Python ({reason})" if reason else ""))
    log = LogLines(folder / "evaluate.log")
    job = Job(config, folder, log.path.name, evaluate_worker, (config, *request), log.show)
    (_run_fresh if reason else _run_forked)(job)
    log.show()
    task = config.experiment.task if chosen else None
    write_results(folder, task)
    runs.write_json(facts, json.loads(facts.read_text(encoding="utf-8")) | {"task": task, "key": key})
    return folder


def free_port() -> str:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@dataclass
class Job:
    """A function to be run by every process, and what is shown meanwhile."""

    config: Config
    folder: Path
    log: str
    function: Callable
    arguments: tuple
    show: Callable[[], None]

    def start(self) -> None:
        """Run the processes and wait for their end."""
        from accelerate import notebook_launcher

        number = self.config.launch.num_processes
        notebook_launcher(self.function, self.arguments, num_processes=number, use_port=free_port())


def _run_forked(job: Job) -> None:
    ended, before = threading.Event(), set(multiprocessing.active_children())

    def watch() -> None:
        while not ended.wait(1.0):
            job.show()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        job.start()
    except Exception as error:  # whatever the launcher makes of it, the worker's own error is what counts
        raise TrainingError(error_text(job) or str(error)) from None
    finally:
        ended.set()
        watcher.join()
        end_processes([child for child in multiprocessing.active_children() if child not in before])


def _run_fresh(job: Job) -> None:
    command = [sys.executable, "-m", "mmrev_kit.launch", str(job.folder)]
    environment = {"GOMP_SPINCOUNT": SPINS} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_package_root(), os.getenv("PYTHONPATH")]))
    with open(job.folder / job.log, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=project_root(), env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None:
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                job.show()
    finally:
        end_processes([process])
    if process.returncode:
        raise TrainingError(error_text(job) or f"the process ended with code {process.returncode}.")


def _package_root() -> str:
    return str(Path(__file__).resolve().parent.parent)


def end_processes(processes: list) -> None:
    """Leave no process of a job behind: ask each to stop between two updates, then end it. It takes 10 s at most.

    Args:
        processes: `subprocess.Popen` of its own session, whose whole group is ended, or `multiprocessing.Process`.
    """
    for sign, seconds in ((signal.SIGINT, 7), (signal.SIGTERM, 2), (signal.SIGKILL, 1)):
        end = time.monotonic() + seconds
        for process in processes:
            if is_alive(process):
                (os.killpg if isinstance(process, subprocess.Popen) else os.kill)(process.pid, sign)
        while any(map(is_alive, processes)) and time.monotonic() < end:
            time.sleep(0.05)


def is_alive(process) -> bool:
    """Whether a `multiprocessing.Process`, or any process of a `Popen`'s group, still runs."""
    if not isinstance(process, subprocess.Popen):
        return process.is_alive()
    if process.poll() is None:
        return True
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def clear_errors(folder: Path) -> None:
    """Forget the errors of an earlier try."""
    for error in folder.glob("error_rank*.txt"):
        error.unlink()


def error_text(job: Job) -> str | None:
    """The error that the first failing process left in the job's folder, or the end of the log."""
    files = sorted(job.folder.glob("error_rank*.txt"), key=lambda file: file.stat().st_mtime)
    if files:
        rank = files[0].stem.removeprefix("error_rank")
        text = files[0].read_text(encoding="utf-8").strip()
        return text if job.config.launch.num_processes == 1 else f"process {rank}: {text}"
    log = job.folder / job.log
    if log.is_file():
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]) or None
    return None


def main() -> None:
    """`python -m mmrev_kit.launch FOLDER`: what a fresh Python runs for `launch` and `evaluate`."""
    folder = Path(sys.argv[1])
    config = load_config(folder / "config.yaml")
    job = Job(config, folder, "train.log", worker, (config,), lambda: None)
    if (folder / REQUEST).is_file():
        adapter, drops, _ = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        job = Job(config, folder, "evaluate.log", evaluate_worker, (config, adapter, drops, str(folder)), lambda: None)
    job.start()


if __name__ == "__main__":
    main()
