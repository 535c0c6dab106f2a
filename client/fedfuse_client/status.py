"""How a site stands, read from its own folder, also beside a site at work: nothing is locked or changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from fedfuse_client.budget import Statement, statements
from fedfuse_client.home import SiteHome
from fedfuse_client.run_lock import holder
from fedfuse_client.server_probe import authority_expires
from fedfuse_shared.config.base import Hex32, Label, SiteName
from fedfuse_shared.envelope import decode
from fedfuse_shared.errors import FedfuseError
from fedfuse_shared.ledger.log import kind_of
from fedfuse_shared.ledger.records import Leave, Receipt, Refusal, Reservation

SHOWN: Final = 10
"""Attempts that are shown."""
_LOOKED_AT: Final = 200
"""Last leaves in which they are looked for: an attempt leaves two at most, an edited policy one."""


class Stage(StrEnum):
    """How far an attempt came at this site."""

    REFUSED = "refused"
    RESERVED = "reserved"
    SENT = "receipt"


@dataclass(frozen=True)
class Attempt:
    """One attempt at a round, as this site's chain tells it.

    Attributes:
        context: Which one.
        leaf: Number of its last leaf.
        stage: How far it came: reserved is charged, whatever came after; a receipt says that an update was sent.
        steps: Steps that were charged; 0 where nothing was.
        reason: Why it was refused.
    """

    context: Hex32
    leaf: int
    stage: Stage
    steps: int
    reason: str


@dataclass(frozen=True)
class Status:
    """How a site stands.

    Attributes:
        site: Its name.
        federation: The federation's.
        process: The process that serves it; None: it is not running.
        left: Why it left the federation; None: it did not.
        leaves: Leaves of its chain.
        in_progress: Whether secrets of an attempt are kept.
        attempts: The last ones, the oldest first.
        budgets: What its data have spent.
        authority_expires: When the federation's certificate authority does; None: its file cannot be used.
    """

    site: SiteName
    federation: Label
    process: str | None
    left: str | None
    leaves: int
    in_progress: bool
    attempts: tuple[Attempt, ...]
    budgets: tuple[Statement, ...]
    authority_expires: datetime | None


def status(home: SiteHome) -> Status:
    """Return how a site stands.

    Raises:
        ConfigError: its policy cannot be used.
        StateError: its store is missing or damaged.
    """
    policy = home.load_policy()
    with home.view_store() as store:
        chain = store.chain(policy.federation, policy.site)
        leaves = chain.head()[0]
        left = chain.latest(Leave)
        attempts = _attempts(chain.leaves_after(max(0, leaves - _LOOKED_AT)))
        in_progress = bool(store.stored_contexts())
        budgets = tuple(statements(store, policy))
    try:
        expires = authority_expires(home.authority)
    except FedfuseError:
        expires = None
    return Status(
        site=policy.site,
        federation=policy.federation,
        process=holder(home),
        left=left.body.reason if left else None,
        leaves=leaves,
        in_progress=in_progress,
        attempts=attempts,
        budgets=budgets,
        authority_expires=expires,
    )


def _attempts(leaves: Iterable[bytes]) -> tuple[Attempt, ...]:
    found: dict[Hex32, Attempt] = {}
    for raw in leaves:
        attempt: Attempt | None = None
        match kind_of(raw):
            case Reservation.kind:
                reserved = decode(raw, Reservation, who="store").body
                attempt = Attempt(reserved.context, reserved.seq, Stage.RESERVED, reserved.charge.steps, "")
            case Receipt.kind:
                receipt = decode(raw, Receipt, who="store").body
                attempt = Attempt(receipt.context, receipt.seq, Stage.SENT, receipt.steps, "")
            case Refusal.kind:
                refusal = decode(raw, Refusal, who="store").body
                attempt = Attempt(refusal.context, refusal.seq, Stage.REFUSED, 0, refusal.reason)
        if attempt is not None:
            found.pop(attempt.context, None)  # the order is that of the last leaves
            found[attempt.context] = attempt
    return tuple(found.values())[-SHOWN:]
