"""How the kit starts a job: a clean Python, which forks its workers with accelerate's `notebook_launcher`.

The kernel or program that asks for it watches that process and its log, so it does not matter what it has imported
or computed before. `torchrun` and `accelerate launch` start the same workers without this module.
"""

import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

from mmrev_kit.config.project import project_root
from mmrev_kit.config.reading import load_config, to_yaml
from mmrev_kit.config.reporting import MARK
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.files import needing, write_bytes, write_text
from mmrev_kit.training.history import JOB, clear_errors
from mmrev_kit.training.lock import end_with, hand_over, keep_fresh, take
from mmrev_kit.training.preflight import read_cards
from mmrev_kit.training.processes import (
    SPARE,
    SPARE_BYTES,
    UNTRIED,
    end_processes,
    free_port,
    killed,
    leave_error,
    on_interrupt,
)
from mmrev_kit.training.update import TrainingError

# How long a thread of a CPU run waits busily for the others. By default they burn the time that a core shared with
# other work would give to the late one: training beside two busy programs was ten times slower. With this it is three
# times slower than alone, and alone within 5 % of the default; with 1,000 alone a third slower.
SPINS = "10000"
# Where torch's compilers keep the kernels that they have made, by the variable that names another place. To load one
# that is cut off ends a process by such a signal.
CACHES = {"TRITON_CACHE_DIR": "~/.triton/cache", "TORCHINDUCTOR_CACHE_DIR": "torchinductor_* in the temporary folder"}
WORKER = 128  # and the number of the signal that killed a worker: how the process that forked it ends, as in a shell
DAMAGED = (signal.SIGBUS, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
# What torchrun and MPI leave in the environment of a shell that they have started.
RANKS = re.compile(r"((LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|(OMPI|PMI|MV2)_.*)$")


def count_processes(config: Config) -> int:
    """Processes of this run: as configured, else one per GPU, else 1; 1 in mode auto.

    Raises:
        ConfigError: more processes than GPUs on a machine that has GPUs, or several in mode auto.
    """
    if config.launch.mode == "auto":
        if (config.launch.num_processes or 1) > 1:
            raise ConfigError("launch.mode = 'auto' spreads one model over all GPUs: set launch.num_processes=1.")
        return 1
    gpus = len(read_cards())
    wanted = config.launch.num_processes or max(gpus, 1)
    if gpus and wanted > gpus:
        raise ConfigError(f"launch.num_processes = {wanted}, but this machine has {gpus} GPUs.")
    return wanted


def job_environment(num_processes: int) -> dict[str, str]:
    """The environment of a job: this package can be imported, and several workers share the cores evenly.

    Without a number of its own each worker would start as many threads as there are cores. What the user's
    environment says is kept, but for a rank that another launcher left: a job would wait for its other ranks.
    """
    own = {name: value for name, value in os.environ.items() if not RANKS.match(name)}
    environment = {"GOMP_SPINCOUNT": SPINS} | own
    if num_processes > 1 and not environment.get("OMP_NUM_THREADS"):
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_processes))
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.getenv("PYTHONPATH")]))
    return environment


def run_job(
    function: Callable, config: Config, folder: Path, log: str, *arguments, show: Callable[[], None] | None = None
) -> None:
    """Run `function(config, *arguments)` in `launch.num_processes` workers and wait for their end.

    Where a signal in `DAMAGED` kills a process before anything is computed, it starts once more with empty `CACHES`.

    Args:
        function: of a module; it is imported by its name.
        config: with a number of processes; it lies in the folder as job.yaml meanwhile.
        folder: the job's; the caller holds its lock (`lock.held`), which the job takes over.
        log: the name of the file in it that takes all output.
        arguments: what JSON can hold.
        show: called about once a second meanwhile.

    Raises:
        DiskFull: the job cannot be started.
        FolderInUse: a job was to be started once more, and another process has taken its folder.
        TrainingError: a worker ended with an error; the message is its own, with its rank where there are several.
        KeyboardInterrupt: after all processes have ended.
    """
    words = [str(folder), str(os.getpid()), f"{function.__module__}:{function.__name__}", json.dumps(arguments)]
    number = config.launch.num_processes
    try:
        write_text(folder / JOB, to_yaml(config))
        for name, size in ((SPARE, SPARE_BYTES), (UNTRIED, 0)):
            write_bytes(folder / name, bytes(size))
        code = _run(words, folder, log, job_environment(number), show)
        if code < 0 and -code in DAMAGED and (folder / UNTRIED).exists():
            take(folder)  # the process that held the lock is dead, and the next one is not there yet
            with tempfile.TemporaryDirectory(dir=folder, prefix=".kernels.new.") as empty:  # `tidy` knows such names
                caches = {name: f"{empty}/{name}" for name in CACHES}
                with needing(folder / log), open(folder / log, "a", encoding="utf-8") as file:
                    file.write(f"{MARK}NOTE: {again_text(code)}\n")
                clear_errors(folder)
                code = _run(words, folder, log, job_environment(number) | caches, show)
    finally:
        for name in (JOB, SPARE, UNTRIED):
            (folder / name).unlink(missing_ok=True)
    if code < 0 and not error_files(folder):
        leave_error(folder, 0, killed(code))
    if code:
        text = error_text(folder, log, number)
        raise TrainingError(text or f"the process ended with code {code}.")


def again_text(code: int) -> str:
    """Why a job is started once more: -7 stands for SIGBUS."""
    places = " and ".join(os.getenv(name) or place for name, place in CACHES.items())
    return (
        f"a process was killed by {signal.Signals(-code).name} before it had computed anything, as by compiled kernels "
        f"that were kept and are damaged. Started once more without them; should that help, delete {places}."
    )


def _run(words: list[str], folder: Path, log: str, environment: dict, show: Callable[[], None] | None) -> int:
    """A job's process, from start to end; returns its exit code, or minus the signal that killed it or a worker."""
    with needing(folder / log), open(folder / log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmrev_kit", "job", *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            cwd=project_root(), env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        hand_over(folder, process.pid)
        while process.poll() is None:
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                if show:
                    show()
    finally:
        with on_interrupt(signal.SIG_IGN):  # an impatient second one
            end_processes([process])
    code = process.returncode
    return WORKER - code if code - WORKER in signal.valid_signals() else code


def error_files(folder: Path) -> list[Path]:
    """What failing processes left, the first one first."""
    return sorted(folder.glob("error_rank[0-9]*.txt"), key=lambda file: file.stat().st_mtime)


def error_text(folder: Path, log: str, num_processes: int) -> str | None:
    """The error that the first failing process left in the job's folder, or the end of the log."""
    if files := error_files(folder):
        rank = files[0].stem.removeprefix("error_rank")
        text = files[0].read_text(encoding="utf-8").strip()
        return text if num_processes == 1 else f"process {rank}: {text}"
    lines = (folder / log).read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-20:]) or None


def main(words: list[str]) -> None:
    """What the clean Python runs, with the words that `run_job` gives it."""
    folder, parent, name, arguments = words
    end_with(int(parent))
    sys.stdout.reconfigure(line_buffering=True)  # into the log, which is shown as it grows
    keep_fresh(Path(folder))
    config = load_config(Path(folder) / JOB)
    call = resolve_name(name), config, *json.loads(arguments)
    if config.launch.num_processes == 1:
        start_workers(1, *call)
    else:
        fork_workers(Path(folder), config.launch.num_processes, *call)


def start_workers(num_processes: int, function: Callable, *arguments) -> None:
    """Run the function in every worker; of several, the launcher forks them from this process."""
    from accelerate import launchers
    from torch.distributed.launcher import api  # noqa: F401  (it sets its loggers' levels)

    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a worker's error is told once, by `run_job`
    launchers.print = lambda *words: None  # it would say "Launching training on 2 CUDAs", of whatever there is
    launchers.notebook_launcher(function, arguments, num_processes=num_processes, use_port=free_port())


def fork_workers(folder: Path, num_processes: int, function: Callable, *arguments) -> None:
    """`start_workers` in a thread: in the main one torch would take over the signals and make errors of interrupts.

    Raises:
        SystemExit: a worker failed; what it left in the folder tells why.
    """
    failures, workers = [], []
    ended = threading.Event()  # an interrupted Thread.join may take a thread that runs for one that has ended

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # in the workers too, until they can heed it
        try:
            start_workers(num_processes, function, *arguments)
        except Exception as error:
            failures.append(error)
        finally:
            ended.set()

    threading.Thread(target=start, daemon=True).start()
    seconds_dead = 0
    try:
        while not ended.wait(1.0 if len(workers) >= num_processes else 0.02):  # one may be killed at once
            if len(workers) < num_processes:
                workers = list({*workers, *multiprocessing.active_children()})
                continue
            seconds_dead += any(child.exitcode for child in workers)
            if seconds_dead > 3:  # torch waits for ever for a worker that was killed when all had done their work
                break
    finally:
        with on_interrupt(signal.SIG_IGN):
            end, seen = time.monotonic() + 15, set(workers)
            while not ended.wait(0.1) and time.monotonic() < end:
                seen |= set(multiprocessing.active_children())
                end_processes(list(seen))
                if len(seen) >= num_processes and not ended.wait(1.0):
                    break  # all have ended, but not all with a result: torch would wait for it for ever
    if failures:
        # The workers' own codes tell which was killed where all fail for it, but for one that ended before it was seen
        # here; torch tells one alone, the first that it noticed. Those that it ended then died of SIGTERM.
        workers.sort(key=lambda child: (len(child.name), child.name))  # ForkProcess-9, ForkProcess-10
        codes = [child.exitcode for child in workers] if len(workers) == num_processes else []
        seen = [(rank, code) for rank, code in enumerate(codes) if code != -signal.SIGTERM]
        noticed = [(rank, one.exitcode) for rank, one in getattr(failures[0], "failures", {}).items()]
        for rank, code in seen + noticed:
            if code not in (None, 0, 1, 130):  # alive, no error, one that it left
                clear_errors(folder)  # that the others lost a connection tells nothing
                leave_error(folder, rank, killed(code))
                if code < 0:
                    sys.exit(WORKER - code)
        sys.exit(str(failures[0]))
