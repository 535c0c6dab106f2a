"""How far an audit has come: on standard error, and only where a person is looking."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

_EVERY = 256
"""Leaves between two updates of the bar."""


@contextmanager
def counted(lines: Iterator[bytes], total: int) -> Iterator[Iterator[bytes]]:
    """Give lines on, with a bar on a terminal that is gone when they are through."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Checking leaves", total=total)

        def passed() -> Iterator[bytes]:
            for index, line in enumerate(lines):
                if index % _EVERY == 0:
                    progress.update(task, completed=index)
                yield line
            progress.update(task, completed=total, description="Accounting")

        yield passed()
