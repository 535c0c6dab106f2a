"""The server's log: one JSON object a line, for machines to read; of a site's data it says nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from fedfuse_server.events import Event
from fedfuse_shared.errors import StateError

_UNSAID = frozenset({"published", "evaluated"})
"""Parts of events that are models or scores: they have their own files."""

log = logging.getLogger("fedfuse_server.events")


class JsonLines(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return its line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "event", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append what fedfuse says, and warnings of Flower, to a file while the block runs; Flower's own output stops.

    Raises:
        StateError: the file cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as problem:
        raise StateError(f"log cannot be written ({problem.strerror})", who=str(path)) from problem
    handler.setFormatter(JsonLines())
    ours, flower = logging.getLogger("fedfuse_server"), logging.getLogger("flwr")
    before = ours.level, ours.propagate, flower.handlers[:], flower.level, flower.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    flower.handlers[:] = [handler]
    flower.setLevel(logging.WARNING)
    flower.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate, flower.handlers[:], flower.level, flower.propagate = before
        handler.close()


def note(event: Event) -> None:
    """Write an event of a run to the log."""
    said = {part.name: getattr(event, part.name) for part in fields(event) if part.name not in _UNSAID}
    log.info("%s", type(event).__name__, extra={"event": {"event": type(event).__name__, **said}})
