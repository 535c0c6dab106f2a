"""The server's pen for the ledger: nothing is appended that an auditor would object to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_shared import limits
from fedfuse_shared.commands import Action, Command, CommandRefusal, hash_of
from fedfuse_shared.config.base import SERVER
from fedfuse_shared.envelope import Body, Envelope, decode, encode, seal, verify
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.ledger.log import LedgerWriter, kind_of, read_ledger
from fedfuse_shared.ledger.records import (
    FIRST_LINK,
    Close,
    Leave,
    Policy,
    Receipt,
    Refusal,
    Reservation,
    SiteLeaf,
    link,
)
from fedfuse_shared.offer import Offer
from fedfuse_shared.roster import Roster

SITE_LEAVES: dict[str, type[SiteLeaf]] = {
    leaf.kind: leaf for leaf in (Policy, Reservation, Refusal, Receipt, Leave)
}

_OFFICIAL: dict[str, type[Body]] = {leaf.kind: leaf for leaf in (Offer, Close, Command, CommandRefusal)}

POLICIES = 20
"""Policies a site may publish beyond one for every offer made to it."""


class Books:
    """One federation's ledger, open for writing.

    Every site's leaves are checked before they are appended: signature, contiguous sequence, link to the leaf
    before. A site that shows two different leaves with one sequence number was cloned or rolled back. Its ``Leave``
    is the last: what it was charged for before has a smaller number, and so is on the ledger by then.
    """

    def __init__(self, path: Path, roster: Roster, key: Ed25519PrivateKey) -> None:
        self._roster = roster
        self._key = key
        self._heads: dict[str, bytes] = {}
        """Each site's last leaf."""
        self._links: defaultdict[str, list[str]] = defaultdict(list)
        """Each site's chain as link hashes, so that a fork shows wherever it begins."""
        self._offered: dict[str, frozenset[str]] = {}
        """Participants of every attempt ever offered, by context."""
        self._policies: Counter[str] = Counter()
        """Policies each site published."""
        self._written: set[tuple[str, str, str]] = set()
        """Site, kind and context of every leaf of an attempt: one of each."""
        self.standing: dict[str, Offer] = {}
        """Offers that have no close yet, by context."""
        self.attempts: Counter[int] = Counter()
        """Highest attempt offered for each round."""
        self.left: set[str] = set()
        """Sites whose last leaf says that they left."""
        self.revoked: set[str] = set()
        """Sites that a coordinator revoked."""
        self.plan: str | None = None
        """The plan of the last command to run."""
        self.given: set[str] = set()
        """Hashes of all commands that were carried out."""
        self.nonces: set[tuple[str, str]] = set()
        """Authors and nonces of the same."""
        self.refused: set[str] = set()
        """Hashes of all commands that were refused."""
        self._log = LedgerWriter(path)  # heals a torn last line before anything is read
        for entry in read_ledger(path):
            self._recall(entry.raw, str(path))

    def _recall(self, raw: bytes, who: str) -> None:
        """Learn from a leaf that an earlier process wrote."""
        kind = kind_of(raw)
        if kind in SITE_LEAVES:
            envelope = decode(raw, SITE_LEAVES[kind], who=who)
            self._accept(envelope)
        elif kind in _OFFICIAL:
            self._note(decode(raw, _OFFICIAL[kind], who=who))

    def _note(self, envelope: Envelope[Any]) -> None:
        body = envelope.body
        if isinstance(body, Offer):
            self.standing[body.context()] = body
            self._offered[body.context()] = frozenset(body.participants)
            self.attempts[body.round] = max(self.attempts[body.round], body.attempt)
        elif isinstance(body, Close):
            self.standing.pop(body.context, None)
        elif isinstance(body, Command):
            self.given.add(hash_of(envelope))
            self.nonces.add((envelope.author, body.nonce))
            if body.action is Action.RUN:
                self.plan = body.plan_hash
            elif body.site is not None:
                self.revoked.add(body.site)
        elif isinstance(body, CommandRefusal):
            self.refused.add(body.command)

    @property
    def out(self) -> set[str]:
        """Sites that are asked nothing any more."""
        return self.left | self.revoked

    @property
    def empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._log.size == 0

    def close(self) -> None:
        """Let go of the ledger file."""
        self._log.close()

    def head(self, site: str) -> tuple[int, bytes]:
        """Return the sequence number and bytes of a site's last leaf on the ledger; 0 and nothing before any."""
        return len(self._links[site]), self._heads.get(site, b"")

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
            ProtocolError: a leaf is not the site's own, does not continue its chain, or belongs to no attempt it
                was offered.
            VerificationError: a signature does not hold.
        """
        links = self._links[site]
        fresh: list[Envelope[SiteLeaf]] = []
        last = links[-1] if links else FIRST_LINK
        for raw in leaves:
            envelope = self._open(site, raw)
            known, here = len(links) + len(fresh), link(envelope)
            if envelope.body.seq <= len(links):
                if links[envelope.body.seq - 1] != here:
                    raise ProtocolError(
                        f"has two different leaves with sequence number {envelope.body.seq}",
                        who=site,
                        advice="two copies of it run, or an old backup was restored: stop it and investigate",
                    )
                continue
            if envelope.body.seq != known + 1 or envelope.body.prev != last:
                raise ProtocolError(f"sent a leaf that does not continue its chain at {known}", who=site)
            if site in self.left or any(isinstance(leaf.body, Leave) for leaf in fresh):
                raise ProtocolError(
                    "wrote on after it left",
                    who=site,
                    advice="a site that left is enrolled anew, under a new name",
                )
            self._check_attempt(envelope, fresh)
            verify(envelope, self._roster.key_of(site))
            last = here
            fresh.append(envelope)
        if fresh:
            self._log.append(fresh)
            for envelope in fresh:
                self._accept(envelope)
        return fresh

    def _open(self, site: str, raw: bytes) -> Envelope[SiteLeaf]:
        kind = kind_of(raw)
        if kind not in SITE_LEAVES:
            raise ProtocolError("sent a leaf of a kind no site may write", who=site)
        envelope = decode(raw, SITE_LEAVES[kind], who=site, limit=limits.MAX_SITE_LEAF)
        if envelope.author != site:
            raise ProtocolError(f"sent a leaf of {envelope.author}", who=site)
        return envelope

    def _check_attempt(self, envelope: Envelope[SiteLeaf], fresh: Sequence[Envelope[SiteLeaf]]) -> None:
        """Refuse what an auditor would hold against the server: leaves of no offer, and second ones of a kind.

        A site may change its policy, but not without bound: everybody keeps and audits every leaf.
        """
        if isinstance(envelope.body, Leave):
            return
        key = _attempt_of(envelope)
        if key is None:
            site = envelope.author
            offers = sum(site in participants for participants in self._offered.values())
            published = self._policies[site] + sum(isinstance(leaf.body, Policy) for leaf in fresh)
            if published >= POLICIES + offers:
                raise ProtocolError(
                    f"published {published} policies over {offers} offers, at most {POLICIES} more are kept",
                    who=site,
                    advice="change policy.toml less often",
                )
            return
        site, kind, context = key
        if site not in self._offered.get(context, ()):
            raise ProtocolError(f"wrote a {kind} for an attempt it was not offered", who=site)
        if key in self._written or key in map(_attempt_of, fresh):
            raise ProtocolError(f"wrote a second {kind} for one attempt", who=site)

    def _accept(self, envelope: Envelope[SiteLeaf]) -> None:
        site = envelope.author
        self._links[site].append(link(envelope))
        self._heads[site] = encode(envelope)
        self._policies[site] += isinstance(envelope.body, Policy)
        if isinstance(envelope.body, Leave):
            self.left.add(site)
        key = _attempt_of(envelope)
        if key is not None:
            self._written.add(key)

    def checkpoint(self) -> None:
        """Sign the ledger's size and root and write them beside it."""
        self._log.checkpoint(self._roster.federation, self._key)


def _attempt_of(envelope: Envelope[SiteLeaf]) -> tuple[str, str, str] | None:
    body = envelope.body
    if isinstance(body, Reservation | Refusal | Receipt):
        return envelope.author, body.kind, body.context
    return None
