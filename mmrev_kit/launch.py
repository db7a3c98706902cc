"""From a notebook cell to a finished run: the run folder, the processes, live progress, and errors that arrive."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from mmrev_kit import runs
from mmrev_kit.bases import base_fingerprint, check_base
from mmrev_kit.config import Config, ConfigError, load_config, project_root, resolve, run_dir, to_yaml
from mmrev_kit.evaluate import DROPS, evaluate_worker, evaluation_key, read_questions
from mmrev_kit.preflight import ask_in_fork, preflight, read_cards
from mmrev_kit.processes import end_processes, end_with, free_port, killed, leave_error, on_interrupt
from mmrev_kit.progress import LogLines, Progress
from mmrev_kit.results import write_results
from mmrev_kit.steps import TrainingError
from mmrev_kit.train import worker

REQUEST = "request.json"  # what an evaluation was asked for: adapter, drops, folder
# How long a thread of a CPU run waits busily for the others. By default they burn the time that a core shared with
# other work would give to the late one: training beside two busy programs was ten times slower. With this it is three
# times slower than alone, and alone within 5 % of the default; with 1,000 alone a third slower.
SPINS = "10000"


def count_processes(config: Config) -> int:
    """Processes of this run: as configured, else one per GPU, else 1; in mode auto always 1.

    Raises:
        ConfigError: more processes than GPUs on a machine that has GPUs, or several in mode auto.
    """
    if config.launch.mode == "auto":
        if (config.launch.num_processes or 1) > 1:
            raise ConfigError("launch.mode = 'auto' spreads one model over all GPUs: set launch.num_processes=1.")
        return 1
    gpus = len(read_cards())  # torch.cuda.device_count may ask CUDA itself, and then this process cannot be forked
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
    if read_cards() and ask_in_fork(torch.cuda._is_in_bad_fork) == "True":
        return "CUDA has been asked for its devices in this kernel"
    if "bitsandbytes" in sys.modules:
        by = " (peft imports it)" if "peft" in sys.modules else ""
        return f"bitsandbytes has been imported in this kernel{by}"
    if PartialState._shared_state:
        return "an Accelerator has been used in this kernel"
    return None


def check_machine(config: Config) -> None:
    """See `preflight`; warnings are printed.

    Raises:
        ConfigError: what stands in the way of a start.
    """
    found = preflight(config)
    for warning in found.warnings:
        print(f"note: {warning}")
    if found.problems:
        raise ConfigError("\n".join(found.problems))


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
    check_machine(config)
    finished = runs.prepare_folder(config)
    folder = run_dir(config)
    if finished:
        print(f"{folder} is finished ({finished['reason']}). To train anew set launch.overwrite=true.")
        return finished
    number = config.launch.num_processes
    reason = "one process" if number == 1 else why_not_here()
    count = "1 process" if number == 1 else f"{number} processes"
    saved = folder / "last"
    how = (f", in a fresh Python ({reason})" if reason else "") + (f", going on from {saved}" if saved.exists() else "")
    print(f"training in {folder}: {count}{how}")
    progress, log = Progress(folder / "training_history.json"), LogLines(folder / "train.log")

    def show() -> None:
        log.show()
        progress.show()

    job = Job(config, folder, "train.log", worker, (config,), show)
    try:
        (_run_fresh if reason else _run_forked)(job)
    except (KeyboardInterrupt, TrainingError) as error:
        how = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        runs.mark_ended(folder / "training_history.json", how)
        show()
        print(f"{how}; run the same cell again to " + (f"go on from {saved}" if saved.exists() else "start anew"))
        if how == "interrupted":
            raise KeyboardInterrupt from None  # without the fifty lines of the figure that it may have met
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
    check_machine(config)
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
    runs.clear_errors(folder)
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
        from torch.distributed.launcher import api  # noqa: F401  (it sets its loggers' levels)

        for name in ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a worker's error is told once, by this module
        number = self.config.launch.num_processes
        arguments = (self.folder / self.log, self.function, *self.arguments)
        notebook_launcher(_in_log, arguments, num_processes=number, use_port=free_port())


def _in_log(log: Path, function: Callable, *arguments) -> None:
    """What every process runs: the function, with all that it and its libraries print in the log."""
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    function(*arguments)


def _run_forked(job: Job) -> None:
    """The launcher in a thread: in the main one it would take over the kernel's signals and make interrupts errors."""
    before, workers, failures = set(multiprocessing.active_children()), [], []
    ended = threading.Event()  # an interrupted Thread.join may take a thread that runs for one that has ended

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # in the workers too, until they can heed it
        try:
            job.start()
        except Exception as error:
            failures.append(str(error))  # not the error, which holds the launcher's frames and this list: a cycle
        finally:
            ended.set()

    threading.Thread(target=start, daemon=True).start()
    seconds_dead = 0
    try:
        while not ended.wait(1.0):
            seconds_dead += any(child.exitcode for child in workers)
            if seconds_dead > 3:  # torch waits for ever for a worker that was killed when all had done their work
                break
            if len(workers) < job.config.launch.num_processes:  # and nothing shown: a fork copies locks that are held
                workers = [child for child in multiprocessing.active_children() if child not in before]
            else:
                job.show()
    finally:
        with on_interrupt(signal.SIG_IGN):  # an impatient second one
            end, seen = time.monotonic() + 15, set(workers)
            while not ended.wait(0.1) and time.monotonic() < end:
                seen |= {child for child in multiprocessing.active_children() if child not in before}
                end_processes(list(seen))
                if len(seen) >= job.config.launch.num_processes and not ended.wait(1.0):
                    break  # all have ended, but not all with a result: torch would wait for it for ever
    if failures:
        workers.sort(key=lambda child: (len(child.name), child.name))  # ForkProcess-9, ForkProcess-10
        for rank, code in enumerate(child.exitcode for child in workers):
            told = (None, 0, 1, 130, -signal.SIGTERM)  # alive, no error, one that was left, and ended by torch
            if code not in told:
                runs.clear_errors(job.folder)  # that the others lost a connection tells nothing
                leave_error(job.folder, rank, killed(code))
        raise TrainingError(error_text(job) or failures[0])


def _run_fresh(job: Job) -> None:
    command = [sys.executable, "-m", "mmrev_kit.launch", str(job.folder), str(os.getpid())]
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
        with on_interrupt(signal.SIG_IGN):
            end_processes([process])
    if process.returncode < 0:
        leave_error(job.folder, 0, killed(process.returncode))
    if process.returncode:
        raise TrainingError(error_text(job) or f"the process ended with code {process.returncode}.")


def _package_root() -> str:
    return str(Path(__file__).resolve().parent.parent)


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
    """`python -m mmrev_kit.launch FOLDER PARENT`: what a fresh Python runs for `launch` and `evaluate`."""
    folder = Path(sys.argv[1])
    end_with(int(sys.argv[2]))
    config = load_config(folder / "config.yaml")
    job = Job(config, folder, "train.log", worker, (config,), lambda: None)
    if (folder / REQUEST).is_file():
        adapter, drops, _ = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        job = Job(config, folder, "evaluate.log", evaluate_worker, (config, adapter, drops, str(folder)), lambda: None)
    if config.launch.num_processes == 1:
        job.start()
    else:
        _run_forked(job)


if __name__ == "__main__":
    main()
