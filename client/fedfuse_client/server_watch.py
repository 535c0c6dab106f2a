"""Says at a running site why no message comes: Flower's SuperNode only tries again and again, without a word.

The server is looked at when the site starts, and every minute in which nothing was asked of it. A clock that is off
is the fault nobody would guess: the server refuses whatever such a site signs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from fedfuse_client.connection import load_connection
from fedfuse_client.home import SiteHome
from fedfuse_client.journal import Event, Journal
from fedfuse_client.server_probe import check_clock, probe
from fedfuse_shared.errors import FedfuseError

QUIET: Final = 60.0
"""Time without a message after which the server is looked at (seconds)."""


def trouble(home: SiteHome, clock: Callable[[], float] = time.time) -> str:
    """Return why the server cannot be worked with, and what to do; empty where nothing is wrong.

    Args:
        home: The site's folder.
        clock: This machine's (seconds since 1970).
    """
    try:
        server = probe(load_connection(home.connection), home.authority, clock=clock)
        if server.ahead is not None:  # a server that does not tell the time is no trouble by that alone
            check_clock(server)
    except FedfuseError as problem:
        return str(problem)
    return ""


class ServerWatch:
    """Looks at the server while nothing comes from it, beside the site's own work.

    Args:
        look: Returns what is wrong; it may take seconds.
        journal: Where what changed is said.
        clock: Seconds on a clock that never jumps.
    """

    def __init__(
        self, look: Callable[[], str], journal: Journal, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look = look
        self._journal = journal
        self._clock = clock
        self._due = clock()
        self._thread: threading.Thread | None = None
        self._found: str | None = None
        self._said = ""

    def turn(self, *, busy: bool) -> None:
        """Look if it is time to, and say what was found.

        Args:
            busy: Whether a message came just now: the server is there.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            self._say(self._found or "")
        if busy:
            self._due = self._clock() + QUIET
        if self._thread is None and self._clock() >= self._due:
            self._due = self._clock() + QUIET
            # It ends with the process: nobody waits for it when the site is told to end.
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        self._found = self._look()

    def _say(self, found: str) -> None:
        if found == self._said:
            return
        self._said = found
        self._journal.say(
            Event.NOTE,
            f"no message can come: {found}" if found else "the server is there",
            level="warning" if found else "info",
        )
