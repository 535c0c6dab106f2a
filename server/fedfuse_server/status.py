"""Where a federation stands, read from its ledger while the server runs or after: nothing is changed or checked.

It is no audit: ``fedfuse audit`` is. Epsilon is computed from the ledger as an auditor does it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

from fedfuse_server.home import RunHome
from fedfuse_server.standing import Standing, runs
from fedfuse_shared import limits
from fedfuse_shared.commands import Action, Command
from fedfuse_shared.config.base import Frozen
from fedfuse_shared.envelope import decode
from fedfuse_shared.errors import StateError
from fedfuse_shared.ledger.checkpoint import Head, origin_of
from fedfuse_shared.ledger.log import kind_of
from fedfuse_shared.ledger.merkle import Tree
from fedfuse_shared.ledger.records import Close, Leave, Outcome
from fedfuse_shared.ledger.verification import verify_ledger
from fedfuse_shared.offer import Offer

LAST: Final = 5
"""Attempts that are shown."""


class SiteState(StrEnum):
    """How a site stands to its federation."""

    ONLINE = "online"
    AWAY = "away"
    LEFT = "left"
    REVOKED = "revoked"
    UNKNOWN = "unknown"
    """No server runs that could tell."""


class SiteStatus(Frozen):
    """One site."""

    site: str
    state: SiteState
    epsilon: float | None
    """Most spent on one of its data sets; None: unbounded."""
    cap: float | None
    rounds: int
    reservations: int


class AttemptStatus(Frozen):
    """One attempt at a round."""

    round: int
    attempt: int
    participants: tuple[str, ...]
    outcome: str
    """``opened``, ``aborted``, or ``under way``."""
    reason: str


class Status(Frozen):
    """A federation, its sites and its last attempts."""

    federation: str
    running: bool
    pid: int | None
    round: int
    """The last round that was opened."""
    rounds: int
    """Planned rounds."""
    sites: tuple[SiteStatus, ...]
    attempts: tuple[AttemptStatus, ...]


def status_of(home: RunHome) -> Status:
    """Return where a run's federation stands.

    Raises:
        FedfuseError: its settings, roster or ledger cannot be read.
    """
    config, roster = home.load_config(), home.load_roster().body
    running, standing = runs(home), Standing.load(home)
    gone: dict[str, SiteState] = {}
    offers: deque[Offer] = deque(maxlen=LAST)
    closes: dict[str, Close] = {}
    opened = 0
    for raw in _whole_lines(home.ledger):
        kind = kind_of(raw)
        if kind == Offer.kind:
            offers.append(decode(raw, Offer, who=str(home.ledger)).body)
        elif kind == Close.kind:
            close = decode(raw, Close, who=str(home.ledger)).body
            last = next((each for each in offers if each.context() == close.context), None)
            if last is not None:
                closes[close.context] = close
                opened = max(opened, last.round if close.outcome is Outcome.OPENED else 0)
        elif kind == Leave.kind:
            gone[decode(raw, Leave, who=str(home.ledger)).author] = SiteState.LEFT
        elif kind == Command.kind:
            body = decode(raw, Command, who=str(home.ledger)).body
            if body.action is Action.REVOKE and body.site is not None:
                gone[body.site] = SiteState.REVOKED
    report = verify_ledger(
        _whole_lines(home.ledger), roster, Head(origin_of(roster.federation), 0, Tree().root())
    )
    rows = []
    for site in sorted(roster.sites):
        mine = [row for row in report.sites if row.site == site]
        here = SiteState.UNKNOWN
        if standing is not None:
            here = SiteState.ONLINE if site in standing.there else SiteState.AWAY
        spent = [row.epsilon for row in mine if row.reservations]
        rows.append(
            SiteStatus(
                site=site,
                state=gone.get(site, here),
                epsilon=None
                if None in spent
                else max((each for each in spent if each is not None), default=0.0),
                cap=next((row.cap for row in mine), None),
                rounds=sum(row.rounds for row in mine),
                reservations=sum(row.reservations for row in mine),
            )
        )
    return Status(
        federation=roster.federation,
        running=running,
        pid=standing.pid if standing else None,
        round=opened,
        rounds=config.rounds,
        sites=tuple(rows),
        attempts=tuple(_attempt(offer, closes.get(offer.context())) for offer in offers),
    )


def _attempt(offer: Offer, close: Close | None) -> AttemptStatus:
    return AttemptStatus(
        round=offer.round,
        attempt=offer.attempt,
        participants=offer.participants,
        outcome=close.outcome.value if close else "under way",
        reason=close.reason if close else "",
    )


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield a ledger's whole lines: a server that runs may be in the middle of the last."""
    try:
        with path.open("rb") as file:
            while (line := file.readline(limits.MAX_LEDGER_LINE + 1)).endswith(b"\n"):
                yield line[:-1]
    except FileNotFoundError:
        return
    except OSError as problem:
        raise StateError(f"ledger cannot be read ({problem.strerror})", who=str(path)) from problem
