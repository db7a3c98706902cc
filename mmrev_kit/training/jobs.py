"""From a notebook cell to a finished run: the run folder, the processes, live progress, and errors that arrive."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmrev_kit.config.project import project_root
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.training import history
from mmrev_kit.training.preflight import ask_in_fork, read_cards
from mmrev_kit.training.processes import end_processes, free_port, killed, leave_error, on_interrupt
from mmrev_kit.training.update import TrainingError

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
                history.clear_errors(job.folder)  # that the others lost a connection tells nothing
                leave_error(job.folder, rank, killed(code))
        raise TrainingError(error_text(job) or failures[0])


def _run_fresh(job: Job) -> None:
    command = [sys.executable, "-m", "mmrev_kit.notebook.launch", str(job.folder), str(os.getpid())]
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
    return str(Path(__file__).resolve().parents[2])


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
