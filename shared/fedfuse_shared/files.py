"""Files that are either whole and durable or not there."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from typing import Final

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No room on the device, in the quota, or under the largest size of a file."""
_FULL_DATABASE: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
"""The same from SQLite; the second, where the index of its log cannot grow."""


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file's content so that after a crash it is the old or the new, never a mixture.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old content stands.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_disk_full(problem: BaseException) -> bool:
    """Return whether an error, or one that led to it, says that there is no room left to write."""
    seen: BaseException | None = problem
    known: set[int] = set()
    while seen is not None and id(seen) not in known:  # an error raised from itself is its own cause
        known.add(id(seen))
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if isinstance(seen, sqlite3.Error) and getattr(seen, "sqlite_errorcode", 0) in _FULL_DATABASE:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
