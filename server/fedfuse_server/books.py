"""The server's pen for the ledger: nothing is appended that an auditor would object to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_shared.config.base import SERVER
from fedfuse_shared.envelope import Body, Envelope, decode, encode, seal, verify
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.ledger.log import LedgerWriter, kind_of, read_ledger
from fedfuse_shared.ledger.records import (
    FIRST_LINK,
    Close,
    Policy,
    Receipt,
    Refusal,
    Reservation,
    SiteLeaf,
    link,
)
from fedfuse_shared.offer import Offer
from fedfuse_shared.roster import Roster

SITE_LEAVES: dict[str, type[SiteLeaf]] = {leaf.kind: leaf for leaf in (Policy, Reservation, Refusal, Receipt)}


class Books:
    """One federation's ledger, open for writing.

    Every site's leaves are checked before they are appended: signature, contiguous sequence, link to the leaf
    before. A site that shows two different leaves with one sequence number was cloned or rolled back.
    """

    def __init__(self, path: Path, roster: Roster, key: Ed25519PrivateKey) -> None:
        self._roster = roster
        self._key = key
        self._heads: dict[str, tuple[int, str, bytes]] = {}
        self.standing: dict[str, Offer] = {}
        """Offers that have no close yet, by context."""
        self.attempts: Counter[int] = Counter()
        """Highest attempt offered for each round."""
        self._log = LedgerWriter(path)  # heals a torn last line before anything is read
        for entry in read_ledger(path):
            self._recall(entry.raw, str(path))

    def _recall(self, raw: bytes, who: str) -> None:
        """Learn from a leaf that an earlier process wrote."""
        kind = kind_of(raw)
        if kind in SITE_LEAVES:
            envelope = decode(raw, SITE_LEAVES[kind], who=who)
            self._heads[envelope.author] = (envelope.body.seq, link(envelope), raw)
        elif kind == Offer.kind:
            self._note(decode(raw, Offer, who=who))
        elif kind == Close.kind:
            self._note(decode(raw, Close, who=who))

    def _note(self, envelope: Envelope[Any]) -> None:
        body = envelope.body
        if isinstance(body, Offer):
            self.standing[body.context()] = body
            self.attempts[body.round] = max(self.attempts[body.round], body.attempt)
        elif isinstance(body, Close):
            self.standing.pop(body.context, None)

    @property
    def empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._log.size == 0

    def close(self) -> None:
        """Let go of the ledger file."""
        self._log.close()

    def head(self, site: str) -> tuple[int, bytes]:
        """Return the sequence number and bytes of a site's last leaf on the ledger; 0 and nothing before any."""
        sequence, _, raw = self._heads.get(site, (0, FIRST_LINK, b""))
        return sequence, raw

    def append(self, *envelopes: Envelope[Any]) -> None:
        """Append leaves of the operator or the server; durable when it returns."""
        self._log.append(list(envelopes))
        for envelope in envelopes:
            self._note(envelope)

    def sign(self, body: Body) -> Envelope[Any]:
        """Append a body in the server's name and return its envelope."""
        envelope = seal(body, SERVER, self._key)
        self.append(envelope)
        return envelope

    def take(self, site: str, leaves: Sequence[bytes]) -> list[Envelope[SiteLeaf]]:
        """Append what continues a site's chain and return it; what is already on the ledger is passed over.

        Raises:
            ProtocolError: a leaf is not the site's own, or does not continue its chain.
            VerificationError: a signature does not hold.
        """
        sequence, last, raw_last = self._heads.get(site, (0, FIRST_LINK, b""))
        fresh: list[Envelope[SiteLeaf]] = []
        for raw in leaves:
            body_type = SITE_LEAVES.get(kind_of(raw))
            if body_type is None:
                raise ProtocolError("sent a leaf of a kind no site may write", who=site)
            envelope = decode(raw, body_type, who=site)
            if envelope.author != site:
                raise ProtocolError(f"sent a leaf of {envelope.author}", who=site)
            if envelope.body.seq <= sequence:
                if envelope.body.seq == sequence and raw != raw_last:
                    raise ProtocolError(
                        f"has two different leaves with sequence number {sequence}",
                        who=site,
                        advice="two copies of this site run, or an old backup was restored: stop it and investigate",
                    )
                continue
            verify(envelope, self._roster.key_of(site))
            if envelope.body.seq != sequence + 1 or envelope.body.prev != last:
                raise ProtocolError(f"sent a leaf that does not continue its chain at {sequence}", who=site)
            sequence, last, raw_last = envelope.body.seq, link(envelope), raw
            fresh.append(envelope)
        if fresh:
            self._log.append(fresh)
            self._heads[site] = (sequence, last, encode(fresh[-1]))
        return fresh

    def checkpoint(self) -> None:
        """Sign the ledger's size and root and write them beside it."""
        self._log.checkpoint(self._roster.federation, self._key)
