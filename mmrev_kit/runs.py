"""Run folders: files that are whole or absent, and a history in strict JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path


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


def write_text(path: str | Path, text: str) -> Path:
    """Write beside `path` and rename, so that a crash or a full disk leaves the previous file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value) -> Path:
    """`write_text` of `to_json(value)`."""
    return write_text(path, to_json(value) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> Path:
    """One JSON object a line, written whole or not at all."""
    return write_text(path, "".join(to_json(row, indent=None) + "\n" for row in rows))


@contextmanager
def new_folder(target: str | Path):
    """Yield an empty folder beside `target`; on success it takes target's place, on failure it is removed.

    The old folder, if any, is moved aside first and removed last: at every moment one whole version exists.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.new."))
    old = None
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, old / target.name)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old is not None:
            if not target.exists():
                os.replace(old / target.name, target)
            shutil.rmtree(old, ignore_errors=True)
