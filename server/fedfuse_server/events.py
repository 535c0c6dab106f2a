"""What a run tells whoever watches it: progress bars, tests, reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfuse_shared.evaluation import Evaluated


@dataclass(frozen=True)
class RoundStarted:
    """An offer is on the ledger and goes out to its participants."""

    round: int
    attempt: int
    participants: tuple[str, ...]


@dataclass(frozen=True)
class SiteLeftOut:
    """A site is left out of an attempt; the round goes on while the bounds allow."""

    round: int
    site: str
    step: str
    reason: str


@dataclass(frozen=True)
class ExchangeEnded:
    """Every site that was asked has answered in one step of an attempt, or its time is over."""

    round: int
    attempt: int
    step: str
    asked: int


@dataclass(frozen=True)
class RoundOpened:
    """A sum was opened and applied; its close is on the ledger."""

    round: int
    survivors: tuple[str, ...]
    published: NDArray[np.float32]
    """The published weights, shape ``(d,)``."""
    evaluated: Evaluated | None = None
    """What the sites' noised counts say of the weights the round started from."""


@dataclass(frozen=True)
class RoundAbandoned:
    """An attempt was aborted; its close is on the ledger."""

    round: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class RunStopped:
    """The run ended before its last planned round."""

    round: int
    reason: str


@dataclass(frozen=True)
class SitesAwaited:
    """A round waits for enrolled sites that are not there."""

    sites: tuple[str, ...]


@dataclass(frozen=True)
class SitesThere:
    """Who is there, before an attempt."""

    sites: tuple[str, ...]


@dataclass(frozen=True)
class SitesOut:
    """Sites are out for good: they left, or a coordinator revoked them."""

    sites: tuple[str, ...]


Event = (
    SitesAwaited
    | SitesThere
    | SitesOut
    | RoundStarted
    | SiteLeftOut
    | ExchangeEnded
    | RoundOpened
    | RoundAbandoned
    | RunStopped
)
Observer = Callable[[Event], None]

_observer: ContextVar[Observer | None] = ContextVar("fedfuse_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Send the events of runs started within the block to an observer."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def tell(event: Event) -> None:
    """Send an event to the current observer, if there is one."""
    observer = _observer.get()
    if observer is not None:
        observer(event)
