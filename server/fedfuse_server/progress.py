"""A run's progress on a terminal: a bar of rounds, and a line for whatever went otherwise than planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedfuse_server.events import (
    Event,
    RoundAbandoned,
    RoundOpened,
    RunStopped,
    SiteLeftOut,
    SitesAwaited,
    SitesOut,
)


@contextmanager
def showing(console: Console, rounds: int) -> Iterator[Callable[[Event, str], None]]:
    """Show the events of a run; what is given besides an event is appended to the bar's note."""
    columns = (
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("rounds", total=rounds, note="sites read their data")

        def say(line: str, style: str = "yellow") -> None:
            bar.console.print(line, style=style, markup=False)  # it may hold a site's own words

        def show(event: Event, more: str) -> None:
            match event:
                case RoundOpened():
                    note = f"{len(event.survivors)} survivors  {more}"
                    bar.update(task, completed=event.round, note=note)
                case SiteLeftOut():
                    say(f"round {event.round}: {event.site} left out of {event.step}: {event.reason}")
                case RoundAbandoned():
                    say(f"round {event.round}, attempt {event.attempt}: aborted: {event.reason}")
                case RunStopped():
                    say(f"stopped after round {event.round}: {event.reason}", "bold red")
                case SitesAwaited():
                    say(f"waiting for {', '.join(event.sites)}")
                case SitesOut():
                    say(f"out for good: {', '.join(event.sites)}")
                case _:
                    pass

        yield show
