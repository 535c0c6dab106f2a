"""A federation's server, from its start to its last round: the coordinator here, Flower's SuperLink as its child."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fedfuse_server import runlog
from fedfuse_server.coordinator import Coordinator
from fedfuse_server.events import Event, RoundOpened, RunStopped, SitesAwaited, SitesThere, observing
from fedfuse_server.home import RunHome
from fedfuse_server.link import LinkGrid
from fedfuse_server.orders import write_command
from fedfuse_server.plan import plan_hash, resolve
from fedfuse_server.progress import showing
from fedfuse_server.standing import Standing, holding
from fedfuse_server.supervisor import Listening, SuperLink
from fedfuse_shared.commands import Action
from fedfuse_shared.envelope import encode
from fedfuse_shared.errors import ConfigError, StateError
from fedfuse_shared.keyfile import load_key
from fedfuse_shared.proxies import reach_directly


@dataclass(frozen=True)
class Served:
    """How a run went, as far as this process took it."""

    rounds: int
    """Rounds opened, those before this process included."""
    stopped: str | None
    """Why it ended before its last planned round; None: it did not."""
    seconds: float


@dataclass
class _Watch:
    """Follows a run's events: the log, the display, and what is shown to others on this machine."""

    home: RunHome
    superlink: SuperLink
    show: Callable[[Event, str], None]
    round: int = 0
    stopped: str | None = None
    there: tuple[str, ...] = field(default_factory=tuple)

    def __call__(self, event: Event) -> None:
        runlog.note(event)
        awaited: tuple[str, ...] = ()
        match event:
            case RoundOpened():
                self.round = event.round
            case RunStopped():
                self.stopped = event.reason
            case SitesThere():
                self.there = event.sites
            case SitesAwaited():
                awaited = event.sites
            case _:
                pass
        if isinstance(event, SitesThere | SitesAwaited):
            Standing(pid=os.getpid(), superlink=self.superlink.pid, there=self.there, awaited=awaited).save(
                self.home
            )
        self.show(event, "")


def serve(
    home: RunHome, listening: Listening, key: Path | None, *, resume: bool, wait: float, console: Console
) -> Served:
    """Run a federation's rounds with sites that connect over the network.

    Args:
        home: The run's folder.
        listening: Where sites connect.
        key: Signing key of the coordinator who orders the run; None only where the roster names none.
        resume: Whether a run that was begun goes on.
        wait: Seconds to wait for enrolled sites that are missing, before it goes on with fewer.
        console: Where progress is shown.

    Raises:
        FedfuseError: a file of the run is wrong, the command was refused, or the SuperLink does not start.
    """
    began = time.monotonic()
    config = resolve(home.load_config())
    roster = home.load_roster().body
    _check_begun(home, resume=resume)
    command = None
    if key is not None:
        planned = plan_hash(config, len(roster.sites))
        command = write_command(roster, load_key(key), Action.RUN, plan_hash=planned, reason="server run")
    elif roster.coordinators:
        raise ConfigError(
            "the roster names coordinators, and one of them has to order the run",
            who=roster.federation,
            advice="add --as coordinator.key",
        )
    reach_directly(listening.own_address.rpartition(":")[0])
    superlink = SuperLink(home, listening)
    with holding(home), runlog.logging_to(home.logs / "server.jsonl"), _ending_on_signals():
        grid = LinkGrid(superlink, roster)
        completed = False
        try:
            with showing(console, config.rounds) as show:
                watch = _Watch(home, superlink, show)
                with observing(watch):
                    coordinator = Coordinator(
                        grid,
                        home,
                        command=encode(command) if command and roster.coordinators else None,
                        wait=wait,
                        excluded=grid.exclude,
                    )
                    coordinator.run()
            completed = watch.stopped is None
        finally:
            grid.finish(completed=completed)
            superlink.stop()
        return Served(coordinator.round, watch.stopped, time.monotonic() - began)


def _check_begun(home: RunHome, *, resume: bool) -> None:
    if home.state.exists() and not resume:
        raise StateError(
            "a run was begun here",
            who=str(home.root),
            advice="go on with it by --resume, or provision a new folder",
        )
    if resume and not home.state.exists():
        raise StateError("no run was begun here", who=str(home.root), advice="leave out --resume")


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let an end by SIGTERM be as orderly as one by Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
