"""What a running server shows of itself to others on its machine: that it runs, and who is there."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fedfuse_server.home import RunHome
from fedfuse_shared.config.base import Frozen
from fedfuse_shared.errors import StateError
from fedfuse_shared.files import write_durably

_TRIES: Final = 20
_PAUSE: Final = 0.05


class Standing(Frozen):
    """A running server's last word of itself."""

    pid: int
    superlink: int | None
    """Process of its SuperLink."""
    there: tuple[str, ...]
    """Sites that are connected and introduced themselves."""
    awaited: tuple[str, ...]
    """Sites it waits for."""

    def save(self, home: RunHome) -> None:
        """Write it.

        Raises:
            OSError: the disk is full.
        """
        write_durably(home.standing, self.model_dump_json().encode())

    @classmethod
    def load(cls, home: RunHome) -> Standing | None:
        """Return what the running server said; None if none runs or it said nothing yet."""
        if not runs(home):
            return None
        try:
            return cls.model_validate_json(home.standing.read_bytes())
        except (OSError, ValidationError):
            return None


@contextmanager
def holding(home: RunHome) -> Iterator[None]:
    """Be the one server of a run's folder.

    Raises:
        StateError: another one is, or the folder cannot be written.
    """
    try:
        file = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        raise StateError(f"folder cannot be written ({problem.strerror})", who=str(home.lock)) from problem
    try:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as problem:
                if not left:
                    raise StateError(
                        "a server runs on this folder already",
                        who=str(home.root),
                        advice="stop it first; `fedfuse server status` shows it",
                    ) from problem
                time.sleep(_PAUSE)  # somebody who only looks holds it for a moment
        with suppress(FileNotFoundError):
            home.standing.unlink()
        yield
    finally:
        os.close(file)


def runs(home: RunHome) -> bool:
    """Return whether a server runs on a run's folder."""
    return _held(home.lock)


def _held(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
