"""Child processes that end with their parent, however it ends: the kernel sends the signal (prctl(2))."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
PYTHON: Final = (sys.executable, "-P")
"""This Python; without ``-P`` a module of ours would first be looked for where the command was given, and anybody may
have put one there: who sent a kit or the data, whoever can write to /tmp."""


def tied(command: Sequence[str]) -> list[str]:
    """Return a command that runs another one, program and all, and ends it with the calling process.

    The thread that starts it must be one that lives as long as the process does: the kernel watches that thread.
    """
    return [*PYTHON, "-m", "fedfuse_shared.tied", str(os.getpid()), *command]


def die_with(parent: int) -> None:
    """Have this process killed as soon as its parent is gone; it survives an exec.

    Raises:
        OSError: the kernel refuses.
        SystemExit: the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before the kernel was told to watch
        raise SystemExit(1)


def main() -> None:
    """Tie this process to its parent and become the command given."""
    parent, *command = sys.argv[1:]
    die_with(int(parent))
    os.execvp(command[0], command)  # noqa: S606 - no shell: the words are the caller's own


if __name__ == "__main__":
    main()
