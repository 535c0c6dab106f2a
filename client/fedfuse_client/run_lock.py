"""Which process serves a site's folder: one at a time, told by a lock that a killed process lets go of too."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fedfuse_client.home import SiteHome
from fedfuse_shared.errors import StateError

_NAME: Final = "run.lock"
_WAIT: Final = 0.5
"""How long the lock is tried for: a look at it (``holder``) keeps others out for a moment (seconds)."""
_PAUSE: Final = 0.02
"""Between two tries (seconds)."""


@contextmanager
def only_one(home: SiteHome) -> Iterator[None]:
    """Hold the folder: two processes of one site would answer the same round twice.

    Raises:
        StateError: another process has it.
    """
    descriptor = os.open(home.root / _NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + _WAIT
        while not _take(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise StateError(
                    f"is served already, by process {_written(descriptor)}",
                    who=f"site folder {home.root}",
                    advice="one site runs once: stop that process first, or leave it at work",
                )
            time.sleep(_PAUSE)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(home: SiteHome) -> str | None:
    """Return the number of the process that serves the folder, as it wrote it; None if there is none."""
    try:
        descriptor = os.open(home.root / _NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return None if _take(descriptor, fcntl.LOCK_SH) else _written(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _written(descriptor: int) -> str:
    found = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
    return found if found.isdecimal() else "unknown"
