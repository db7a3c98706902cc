"""The processes of a run: each one's place among the others, what it leaves when it fails, and how all of them end."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from mmrev_kit import runs
from mmrev_kit.config import ConfigError
from mmrev_kit.data import DataError
from mmrev_kit.steps import TrainingError


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


def end_with(parent: int) -> None:
    """End this process within a second of its parent's death, whatever it is doing or waiting for by then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def process_state():
    """This process's place among the launched ones, an `accelerate.PartialState`; called first in every worker."""
    import torch

    gc.freeze()  # what a kernel left: to collect an earlier launch's store is to wait for a thread that was not forked
    if "TORCHELASTIC_RUN_ID" in os.environ:  # the parent is a launcher, in a kernel or torchrun
        end_with(os.getppid())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends a process that waits for another one too
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see `launch._run_forked`
    on_cpu, several = not torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    if on_cpu and several:
        torch.set_num_threads(1)  # a forked process hangs in its first threaded region if the kernel ran one before
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that accelerate does not raise the number again
    from accelerate import PartialState

    return PartialState(cpu=on_cpu)


@contextmanager
def place(folder: Path):
    """`process_state` for the length of a worker's work.

    An error is left in `folder` as error_rank<r>.txt for the parent, and the first process has a second to write what
    it knows of it: the launcher ends all when one has ended. An interrupted process exits with status 130:
    torch would end it with 0, and its launcher would wait for a result for ever.
    """
    try:
        state = process_state()
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
    plain = isinstance(error, TrainingError | ConfigError | DataError)
    text = f"{type(error).__name__}: {error}\n" if plain else "".join(traceback.format_exception(error))
    runs.write_text(folder / f"error_rank{rank}.txt", text)


def clear_errors(folder: Path) -> None:
    """Forget the errors of an earlier try."""
    for error in folder.glob("error_rank*.txt"):
        error.unlink()


def killed(code: int) -> TrainingError:
    """The error of a process that ended without leaving one: -9 stands for SIGKILL."""
    if code >= 0:
        return TrainingError(f"the process ended with exit code {code}.")
    cause = "; often the host's memory ran out" if code == -signal.SIGKILL else ""
    return TrainingError(f"the process was killed by {signal.Signals(-code).name}{cause}.")


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
