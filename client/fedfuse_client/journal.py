"""What happens at a running site, one line an event: on standard output and in the site's folder."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from enum import StrEnum
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final, TextIO

_MAX_LOG: Final = 10 * 2**20
"""Size at which a log is put aside for a new one (bytes)."""
_KEPT: Final = 3
"""Logs put aside that are kept."""


class Event(StrEnum):
    """What a line is about."""

    STARTED = "started"
    NODE_STARTED = "node-started"
    NODE_ENDED = "node-ended"
    ANSWERED = "answered"
    REFUSED = "refused"
    FAILED = "failed"
    NOTE = "note"
    STOPPING = "stopping"
    STOPPED = "stopped"


class _OwnerOnly(RotatingFileHandler):
    """A log that nobody but the site's owner can read."""

    def _open(self) -> TextIO:  # type: ignore[override]
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8")


class Journal(logging.Handler):
    """Writes events, and what the site's code logs, as JSON lines to ``logs/site.jsonl`` and shows them.

    Tracebacks may hold values of the site's records: they are in the file, never on standard output, which a
    service manager may ship elsewhere.

    Args:
        site: Whose events these are.
        logs: The folder of the logs; it is made.
        json_lines: Show JSON, not text for people.
        shown: Where events are shown.
    """

    def __init__(
        self, site: str, logs: Path, *, json_lines: bool = False, shown: TextIO | None = None
    ) -> None:
        super().__init__()
        logs.mkdir(mode=0o700, exist_ok=True)
        self._site = site
        self._json = json_lines
        self._shown = shown
        self._file = _OwnerOnly(logs / "site.jsonl", maxBytes=_MAX_LOG, backupCount=_KEPT)

    def say(self, event: Event, text: str = "", **facts: float | str) -> None:
        """Write one event; facts hold nothing that depends on a record."""
        self._write({"event": event.value, "text": text, **facts}, "")

    def trace(self, text: str) -> None:
        """Write a failure with the traceback of the exception in hand."""
        self._write({"event": Event.FAILED.value, "text": text}, traceback.format_exc())

    def emit(self, record: logging.LogRecord) -> None:
        """Write what some part of the site logged."""
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        level = record.levelname.lower()
        self._write({"event": Event.NOTE.value, "text": record.getMessage(), "level": level}, trace)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _write(self, facts: dict[str, float | str], trace: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "site": self._site, **{name: fact for name, fact in facts.items() if fact != ""}}
        shown = json.dumps(line) if self._json else _readable(line)
        print(shown, file=self._shown or sys.stdout, flush=True)
        kept = json.dumps({**line, "trace": trace} if trace else line)
        self._file.emit(logging.LogRecord("fedfuse", logging.INFO, "", 0, "%s", (kept,), None))


def _readable(line: dict[str, float | str]) -> str:
    rest = " ".join(
        f"{name}={fact:.3g}" if isinstance(fact, float) else f"{name}={fact}"
        for name, fact in line.items()
        if name not in {"time", "site", "event", "text"}
    )
    words = (str(line["time"])[11:19], str(line["site"]), str(line["event"]), str(line.get("text", "")), rest)
    return " ".join(word for word in words if word)
