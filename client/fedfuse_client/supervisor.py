"""Flower's SuperNode as a child of ours: started, started again when it ends, and never left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedfuse_client.journal import Event, Journal
from fedfuse_shared.tied import tied

_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
"""Pauses between two starts, doubled each time (seconds)."""
_STEADY: Final = 60.0
"""A SuperNode that lived this long has started well: the next pause is the first again (seconds)."""
_PATIENCE: Final = 10.0
"""How long it may take to end when asked to (seconds)."""
_TURNED_AWAY: Final = b"[code: 2004]"
"""What Flower's SuperNode writes when the server does not let it in (1.41)."""
_SOON: Final = 8.0
"""Longest pause after that: the server counts a killed process as connected for a minute (seconds)."""
_MAX_LOG: Final = 10 * 2**20
"""Size at which the log of the runs before is put aside (bytes)."""


class SuperNode:
    """One SuperNode, supervised.

    Args:
        command: Gives the command for a port of the Runtime API.
        environment: Of the process.
        log_file: Where its output goes.
        journal: Where is said that it was started and how it ended.
        clock: Seconds on a clock that never jumps.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        environment: Mapping[str, str],
        log_file: Path,
        journal: Journal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command
        self._environment = dict(environment)
        self._log = log_file
        self._journal = journal
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._next_start = 0.0
        self._pause = _FIRST_PAUSE
        self._log_began = 0
        """Where the log of the process that runs begins (bytes)."""

    def tend(self) -> str | None:
        """Start the SuperNode if it is time to; return its Runtime API's address if it was started just now."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process = None
            if self._clock() - self._started >= _STEADY:
                self._pause = _FIRST_PAUSE
            why = ""
            if self._was_turned_away():
                self._pause = min(self._pause, _SOON)
                why = (
                    " (the server did not let it in: the process before it was killed less than a minute ago, or a "
                    "second copy of this site runs, or the roster does not name its node key)"
                )
            self._next_start = self._clock() + self._pause
            self._journal.say(
                Event.NODE_ENDED,
                f"Flower's SuperNode ended{why}; it is started again in {self._pause:.0f} s; see {self._log}; "
                "`fedfuse site preflight` tries the connection",
                code=code,
            )
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        if self._process is None and self._clock() >= self._next_start:
            return self._start()
        return None

    def end(self) -> None:
        """End it, by force if it does not end when asked to."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _was_turned_away(self) -> bool:
        try:
            with self._log.open("rb") as file:
                file.seek(self._log_began)
                return _TURNED_AWAY in file.read(_MAX_LOG)
        except OSError:
            return False

    def _start(self) -> str:
        port = _free_port()
        if self._log.exists() and self._log.stat().st_size > _MAX_LOG:
            self._log.replace(self._log.with_suffix(".old.log"))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._log_began = os.fstat(descriptor).st_size
        try:
            # Its own session: an interrupt from the terminal is for us, who end it after the message in hand.
            self._process = subprocess.Popen(  # noqa: S603 - no shell: the words are ours
                tied(self._command(port)),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=self._environment,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        self._started = self._clock()
        self._journal.say(Event.NODE_STARTED, process=self._process.pid)
        return f"127.0.0.1:{port}"


def _free_port() -> int:
    """Return a port nobody listens on; should somebody be faster, the SuperNode ends and gets another."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
