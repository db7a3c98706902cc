"""A folder's lock: whoever starts a job there takes it first, so that one job at a time works in a folder.

On the host and boot that wrote it, a lock is held as long as its process lives. On another host, whose processes cannot
be looked at, it is held until nobody has refreshed it for ten minutes.
"""

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.files import locked

NAME = "run.lock"
REFRESH_SECONDS = 30
STALE_SECONDS = 600


class FolderInUse(ConfigError):
    """Somebody else works in the folder."""


def describe(holder: dict) -> str:
    """Who holds a lock, in words."""
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"


def _record(pid: int) -> dict:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    started = psutil.Process(pid).create_time()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": started, "since": since}


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def _is_held(path: Path, holder: dict) -> bool:
    if holder["host"] != socket.gethostname():
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{NAME}.") as now:  # the clock of the disk itself
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime < STALE_SECONDS
    try:
        process = psutil.Process(holder["pid"])
        same = holder["boot"] == _boot() and abs(process.create_time() - holder["started"]) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_holder(folder: Path) -> dict | None:
    """Who works in `folder` (host, boot, pid, started, since), or None where nobody does any longer."""
    path = folder / NAME
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if _is_held(path, holder) else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that was cut short by a full disk
        return None


def hand_over(folder: Path, pid: int) -> None:
    """Make process `pid` the holder; nobody else must hold the lock."""
    with locked(folder / NAME) as file:
        file.truncate(0)
        file.write(json.dumps(_record(pid)) + "\n")


def take(folder: Path) -> None:
    """Make this process the holder; the folder is made where there is none.

    Raises:
        FolderInUse: another process holds it: which, on which host, since when.
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / NAME):
            holder = read_holder(folder)
            if holder is None:
                (folder / NAME).write_text(json.dumps(_record(os.getpid())) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}). Choose another launch.output_dir.") from None
    if holder:
        raise FolderInUse(f"{folder} is in use by {describe(holder)}. Wait for its end, or choose another name.")


def end_with(parent: int) -> None:
    """End this process within a second of its parent's death, whatever it is doing or waiting for by then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within it this process, or the one it hands the lock to, is the only one that works in `folder`; see `take`."""
    take(folder)
    try:
        yield
    finally:
        with suppress(OSError), locked(folder / NAME):
            (folder / NAME).unlink()


def keep_fresh(folder: Path) -> None:
    """Refresh the lock from now on, for those who see it from another host."""

    def refresh() -> None:
        with suppress(FileNotFoundError):
            while True:
                os.utime(folder / NAME)
                time.sleep(REFRESH_SECONDS)

    threading.Thread(target=refresh, daemon=True).start()
