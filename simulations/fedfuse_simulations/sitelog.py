"""What simulated sites write to their own logs, a line each; a disk that is full for one is full for all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from fedfuse_shared.files import is_disk_full

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_SITES: Final = "fedfuse_client"
"""Parent of the loggers of all modules of a site."""


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

    def __enter__(self) -> SiteLog:
        logger = logging.getLogger(_SITES)
        logger.addHandler(self)
        logger.propagate = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        logger = logging.getLogger(_SITES)
        logger.removeHandler(self)
        logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        """Take one entry of a site's log."""
        problem = record.exc_info[1] if record.exc_info else None
        if problem is None:
            self._show(record.getMessage())
        elif is_disk_full(problem):
            self._full = problem
        else:
            self._show(f"{record.getMessage()}: {problem or type(problem).__name__}")

    def check_room(self) -> None:
        """Raise what a site met if it was a full disk: trying again would charge the sites for nothing.

        Raises:
            OSError: the disk was full.
            StateError: the disk was full when the site's store was written.
        """
        if self._full is not None:
            raise self._full
