"""Who took part in which round, as the offers and closes of a run's ledger say."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedfuse_shared.envelope import decode
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Close, Outcome
from fedfuse_shared.offer import Offer


class Part(StrEnum):
    """What one site had to do with one round."""

    COUNTED = "counted"
    """Its update is in the opened sum."""
    LEFT_OUT = "left out"
    """It was asked, and the round was opened without it."""
    NOT_ASKED = "not asked"
    NOT_OPENED = "not opened"
    """It was asked, and no attempt at the round was opened."""


@dataclass(frozen=True)
class AbortedAttempt:
    """An attempt that was closed without opening its sum."""

    round: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class Participation:
    """The rounds of a ledger and every enrolled site's part in them."""

    rounds: tuple[int, ...]
    parts: dict[str, tuple[Part, ...]]
    """By site, one for each of ``rounds``."""
    opened: tuple[bool, ...]
    aborted: tuple[AbortedAttempt, ...]
    offer: Offer | None
    """The last offer, for the bounds that were in force; None where no round was offered."""


def read_participation(ledger: Path, sites: tuple[str, ...]) -> Participation:
    """Return who took part; leaves that cannot be read are passed over, since the audit names them.

    Args:
        ledger: The ledger's file.
        sites: Every enrolled site, in the order wanted.

    Raises:
        DataError: the file cannot be read.
    """
    offers: dict[str, Offer] = {}
    closes: dict[str, Close] = {}
    for entry in read_ledger(ledger):
        try:
            match kind_of(entry.raw):
                case Offer.kind:
                    offer = decode(entry.raw, Offer, who=str(ledger)).body
                    offers[offer.context()] = offer
                case Close.kind:
                    close = decode(entry.raw, Close, who=str(ledger)).body
                    closes[close.context] = close
        except ProtocolError:
            continue
    asked: dict[int, set[str]] = {}
    counted: dict[int, set[str]] = {}
    aborted = []
    for context, offer in offers.items():
        answer = closes.get(context)
        if answer is not None and answer.outcome is Outcome.OPENED:
            asked[offer.round], counted[offer.round] = set(offer.participants), set(answer.survivors)
            continue
        if offer.round not in counted:
            asked.setdefault(offer.round, set()).update(offer.participants)
        reason = answer.reason if answer else "the ledger does not say how this attempt ended"
        aborted.append(AbortedAttempt(offer.round, offer.attempt, reason))
    rounds = tuple(sorted(asked))
    return Participation(
        rounds=rounds,
        parts={site: tuple(_part(site, asked[r], counted.get(r)) for r in rounds) for site in sites},
        opened=tuple(r in counted for r in rounds),
        aborted=tuple(aborted),
        offer=next(reversed(offers.values()), None),
    )


def _part(site: str, asked: set[str], counted: set[str] | None) -> Part:
    if site not in asked:
        return Part.NOT_ASKED
    if counted is None:
        return Part.NOT_OPENED
    return Part.COUNTED if site in counted else Part.LEFT_OUT
