"""The processes of a run: each worker's rank, what it leaves when it fails, and how all of them end."""

import hashlib
import os
import signal
import socket
import subprocess
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from mmrev_kit.config.errors import Told
from mmrev_kit.config.project import experiment_dir, hide_secrets, run_dir
from mmrev_kit.config.reading import to_yaml
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.files import needing, write_text
from mmrev_kit.model.strict import quiet
from mmrev_kit.training import history, lock
from mmrev_kit.training.preflight import preflight
from mmrev_kit.training.update import TrainingError

SPARE, SPARE_BYTES = ".spare", 64 * 1024  # a file that makes room for the error of a job that has filled the disk
UNTRIED = ".untried"  # a file that is there until a job's first update, or its first answers


def free_port() -> str:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def on_interrupt(handler):
    """Within it an interrupt (SIGINT) calls `handler`; in a thread, where none arrives, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


@contextmanager
def worker_state(folder: Path):
    """A worker's rank and device, an `accelerate.PartialState`, for the length of its work.

    An error is left in `folder` as error_rank<r>.txt for the process that started the job. Other ranks then wait a
    second, so that rank 0 can still write the history: the launcher ends all workers when one has ended. An interrupted
    worker exits with status 130: torch would end it with 0, and its launcher would wait for a result for ever.
    """
    from accelerate import PartialState

    if "TORCHELASTIC_RUN_ID" in os.environ:  # the parent is a launcher
        lock.end_with(os.getppid())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends a process that waits for another one too
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see `jobs.fork_workers`
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # segments that grow: batches of many sizes leave few gaps
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        quiet()
        state = PartialState(cpu=not torch.cuda.is_available())
        with needing(folder):  # a disk may be full for a line of the log, too
            yield state
    except BaseException as error:
        rank = int(os.environ.get("RANK", "0"))
        with on_interrupt(signal.SIG_IGN):  # interrupts come in pairs: from the terminal or server, and the parent
            leave_error(folder, rank, error)
            if isinstance(error, KeyboardInterrupt):
                os._exit(130)
            time.sleep(1 if rank else 0)
        raise
    state.destroy_process_group()  # not after an error: it may wait for the others


def leave_error(folder: Path, rank: int, error: BaseException) -> None:
    """Write error_rank<r>.txt for the parent: the message of an error that explains itself, a traceback of others."""
    told = isinstance(error, Told)
    text = f"{type(error).__name__}: {error}\n" if told else "".join(traceback.format_exception(error))
    file = folder / f"error_rank{rank}.txt"
    try:
        write_text(file, hide_secrets(text))
    except OSError:
        with suppress(OSError):
            (folder / SPARE).unlink()
            write_text(file, hide_secrets(text))


def killed(code: int) -> TrainingError:
    """The error of a process that ended without leaving one: -9 stands for SIGKILL."""
    if code >= 0:
        return TrainingError(f"the process ended with exit code {code}.")
    cause = "; often the host's memory ran out" if code == -signal.SIGKILL else ""
    return TrainingError(f"the process was killed by {signal.Signals(-code).name}{cause}.")


def begin(config: Config, state, stack: ExitStack) -> bool:
    """Prepare a run whose workers torchrun or accelerate started: preflight once a machine, the run folder once.

    The experiment's data must be there.

    Args:
        stack: what releases the folder's lock at the end.

    Returns:
        Whether there is anything to train.

    Raises:
        ConfigError: in every process, for a reason that any of them has.
    """
    from accelerate.utils import gather_object

    local = replace(config, launch=replace(config.launch, num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    problems, finished = (preflight(local).problems if state.is_local_main_process else []), []
    if not experiment_dir(config).is_dir():
        problems.append(
            f"{experiment_dir(config)}: there is no such folder. Open notebooks/data.ipynb, which makes it."
        )
    if state.is_main_process:
        try:
            stack.enter_context(lock.held(run_dir(config)))
            lock.keep_fresh(run_dir(config))
            finished = [history.prepare_folder(config) is not None]
        except ConfigError as error:
            problems.append(str(error))
    problems = list(dict.fromkeys(gather_object(problems)))
    if problems:
        raise ConfigError("\n".join(problems))
    (finished,) = gather_object(finished)
    if finished and state.is_main_process:
        print(f"{run_dir(config)} is finished. To train anew set launch.overwrite=true.", flush=True)
    return not finished


def check_agreement(config: Config, files: list[Path]) -> None:
    """Refuse nodes that do not go the same way: their processes would train on other rows, or wait for ever.

    Args:
        files: the data files that the run has read.

    Raises:
        ConfigError: in every process.
    """
    from accelerate.utils import gather_object

    saved = run_dir(config) / "last" / "state.json"
    state = saved.read_bytes() if saved.is_file() else None
    facts = {
        "the configuration": to_yaml(config),
        "the data": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        "what is saved in launch.output_dir, which must be on a disk that all share": state,
    }
    everyone = gather_object([facts])
    different = [name for name in facts if any(one[name] != facts[name] for one in everyone)]
    if different:
        raise ConfigError(f"Not the same for all processes: {'; '.join(different)}.")


def end_processes(processes: list) -> None:
    """Leave no process of a job behind: ask each to stop between two updates, then end it. It takes 10 s at most.

    Args:
        processes: `subprocess.Popen` of its own session, whose whole group is ended, or `multiprocessing.Process`.
    """
    for sign, seconds in ((signal.SIGINT, 7), (signal.SIGTERM, 1), (signal.SIGKILL, 1)):
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
