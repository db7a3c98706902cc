"""Files and folders that are whole or absent, and strict JSON."""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from mmrev_kit.config.errors import Told

FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
UNFINISHED = re.compile(r"\.(.+)\.(aside|(new|part)\.[a-z0-9_]{8})")  # names that only a kill leaves behind


class DiskFull(Told, OSError):
    """No space left for a file or folder; the message says which, how much it needs and how much is free."""

    def __str__(self) -> str:
        return self.strerror


class NotWritable(Told, OSError):
    """A file or folder that may not be written, or not there; the message says which."""

    def __str__(self) -> str:
        return self.strerror


@contextmanager
def needing(path: Path, size: int | None = None):
    """Within it `path` is written, which takes `size` bytes (None: not known).

    Raises:
        DiskFull: in place of the system's error, which names neither.
        NotWritable: `path` or a folder above it may not be written, or cannot be made.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code, said = getattr(error, "errno", None), re.search(r"\(os error (\d+)\)", str(error))
        if (int(said[1]) if said else code) not in FULL:  # safetensors says it in words alone
            named = getattr(error, "filename", None)
            named = Path(named if isinstance(named, str | Path) else "")  # else bytes, or the number of an open file
            beside = named.name.startswith(f".{path.name}.") and named.parent.absolute() == path.parent.absolute()
            if code in DENIED and (beside or named in (path, *path.parents)):
                reason = f"{path} cannot be written ({error.strerror}: {error.filename}). Choose another folder."
                raise NotWritable(error.errno, reason) from None
            raise
        free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
        few = f"at least {size:,} bytes; {free:,} bytes are free" if (size or 0) > free else f"more than {free:,} bytes"
        raise DiskFull(
            errno.ENOSPC,
            f"No space left for {path}: it needs {few}, or a quota is used up. "
            "What was saved before is whole. Free some space and start again.",
        ) from error


def finite(value):
    """`value` with every NaN and infinity replaced by None, so that strict JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def to_json(value, indent: int | None = 1) -> str:
    """Strict JSON text (RFC 8259): a non-finite number becomes null."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def write_bytes(path: str | Path, content: bytes, sync: bool = True) -> Path:
    """Write beside `path` and rename, so that a crash or a full disk leaves the previous file whole.

    Args:
        sync: wait until the disk has it; needless where a reader can tell a broken file.

    Raises:
        DiskFull: there is no room for it.
    """
    path = Path(path)
    with needing(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.part.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of the text in UTF-8."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value) -> Path:
    """`write_text` of `to_json(value)`."""
    return write_text(path, to_json(value) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> Path:
    """One JSON object a line, written whole or not at all."""
    return write_text(path, "".join(to_json(row, indent=None) + "\n" for row in rows))


@contextmanager
def new_folder(target: str | Path, size: int | None = None):
    """Yield an empty folder beside `target`; on success it takes target's place, on failure it is removed.

    The old folder, if any, is moved aside first and removed last: at every moment one whole version exists. A kill
    between the two renames leaves it as `.NAME.aside`; the next `new_folder` or `tidy` gives it its name back.

    Args:
        size: bytes of what will be written, for the message of a full disk.

    Raises:
        DiskFull: there is no room for it.
    """
    target = Path(target)
    old = target.with_name(f".{target.name}.aside")
    with needing(target, size):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.new."))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            for path in temporary.iterdir():
                if path.is_file():
                    os.chmod(path, 0o644)  # safetensors lets nobody else read its files
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())  # a full disk may show only here
            if target.exists():
                remove_folder(old)
                os.replace(target, old)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _restore_or_remove(target, old)


def _restore_or_remove(target: Path, old: Path) -> None:
    """Remove the folder that was moved aside, or give it its name back where nothing has taken it."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Put right what a kill left in a run folder: a version moved aside gets its name back, unfinished ones go.

    No other process may be writing there.
    """
    for path in list(Path(folder).glob(".*")):
        found = UNFINISHED.fullmatch(path.name)
        if found and found[2] == "aside":
            _restore_or_remove(path.with_name(found[1]), path)
        elif found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder that the kit wrote; no folder is no error."""
    shutil.rmtree(folder, ignore_errors=not Path(folder).exists())


@contextmanager
def fresh_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` if all goes well; a folder that exists is never touched.

    Of several processes that make the same folder one works and the others wait; what a killed one left is removed.

    Raises:
        FileExistsError: there is something at `folder`, or is by now, made by another process.
    """
    folder = _absent(Path(folder))
    lock = folder.with_name(f".{folder.name}.lock")
    with needing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, f"waiting for the process that makes {folder}"):
            try:
                for left in folder.parent.glob(f".{glob.escape(folder.name)}.new.*"):
                    shutil.rmtree(left)
                with new_folder(_absent(folder)) as building:
                    yield building
                    _absent(folder)  # something that does not wait may have made it in the meantime
            finally:
                lock.unlink()


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[TextIO]:
    """The file at `path`, made where there is none, as soon as no other process is here with it; who is here may remove
    it. The lock ends with its process, however that ends.

    Args:
        waiting: printed where another process is here.
    """
    there = False
    while not there:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    print(waiting, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # else who held it has removed it: begin again
                there = os.path.samestat(os.fstat(file.fileno()), path.stat())
            if there:
                yield file


def _absent(folder: Path) -> Path:
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists and is left as it is. Choose another name, or delete it yourself.")
    return folder


def checksum(file: Path) -> str:
    """The SHA-256 of a file in hex digits.

    In the hub's cache it is the file's name, as the hub gave it. Of other files it is kept in `HF_HOME/mmrev_kit` by
    path, size and times, so that 64 GB are read once; not where `HF_HOME` is no absolute path.
    """
    from huggingface_hub.constants import HF_HOME

    file = file.resolve()
    if file.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", file.name):
        return file.name
    state = file.stat()
    facts = f"{file}\n{state.st_size}\n{state.st_mtime_ns}\n{state.st_ctime_ns}"
    kept = Path(HF_HOME) / "mmrev_kit" / hashlib.sha256(facts.encode()).hexdigest()
    trusted = kept.is_absolute()  # else it would be another one for each folder that one stands in
    if trusted and kept.is_file() and re.fullmatch(r"[0-9a-f]{64}", known := kept.read_text(encoding="utf-8")):
        return known
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with suppress(OSError):  # a folder that cannot be written to only costs the time again
        if trusted:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(digest, encoding="utf-8")
    return digest
