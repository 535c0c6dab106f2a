"""What simulated sites write to their own logs, a line each; a disk that is full for one is full for all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Self

from fedfuse_shared.files import is_disk_full

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_LOGGERS: Final = ("fedfuse_client", "fedfuse_simulations.engines")
"""Parents of the loggers of a site's modules, and of what says that a site could not even be opened."""


class SiteLog(logging.Handler):
    """Takes the log of all sites of this process while its ``with`` block lasts.

    A site keeps to itself why it could not take part. On this machine it is told, in one line without a traceback.

    Args:
        show: Told of every line.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show
        self._full: BaseException | None = None

    def __enter__(self) -> Self:
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).propagate = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self)
            logging.getLogger(name).propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        """Take one entry of a site's log."""
        line, problem = record.getMessage(), record.exc_info[1] if record.exc_info else None
        if problem is not None and is_disk_full(problem):
            self._full = problem
        elif problem is None or (str(problem) and str(problem) in line):
            self._show(line)
        else:
            self._show(f"{line}: {type(problem).__name__} {problem}")

    def check_room(self) -> None:
        """Raise what a site met if it was a full disk: trying again would charge the sites for nothing.

        Raises:
            OSError: the disk was full.
            StateError: the disk was full when the site's store was written.
        """
        if self._full is not None:
            raise self._full
