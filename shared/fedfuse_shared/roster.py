"""The roster: who belongs to a federation and under which keys; pinned at every site by its hash."""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar

from pydantic import Field

from fedfuse_shared import limits
from fedfuse_shared.config.base import (
    AUDITOR,
    COORDINATOR,
    OPERATOR,
    SERVER,
    Hex32,
    Label,
    NodeKey,
    SiteName,
)
from fedfuse_shared.envelope import Envelope, GrownBody, canonical, verify
from fedfuse_shared.errors import ProtocolError, VerificationError

Keys = Annotated[dict[SiteName, Hex32], Field(max_length=limits.MAX_OFFICERS)]
"""Public keys of those who hold one role, by name."""


class Roster(GrownBody):
    """Every party's Ed25519 public key; signed by the operator, whom everyone trusts for it."""

    kind: ClassVar[str] = "enrolment"
    added: ClassVar[frozenset[str]] = frozenset({"coordinators", "auditors", "nodes"})

    federation: Label
    operator: Hex32
    server: Hex32
    sites: dict[SiteName, Hex32]
    coordinators: Keys = Field(default_factory=dict)
    """Who may start runs and revoke sites; with none, whoever holds the server's key may."""
    auditors: Keys = Field(default_factory=dict)
    """Who is known to read the ledger; the role changes nothing."""
    nodes: dict[SiteName, NodeKey] = Field(default_factory=dict)
    """Keys of the sites' connections; a server lets no other connect."""

    def hash(self) -> str:
        """Return the hash sites pin (SHA-256, hexadecimal)."""
        return hashlib.sha256(limits.LABEL_ROSTER + canonical(self)).hexdigest()

    def key_of(self, author: str) -> bytes:
        """Return an author's public key (32 bytes).

        Raises:
            ProtocolError: nobody of that name is enrolled.
        """
        if author.startswith(COORDINATOR):
            key = self.coordinators.get(author.removeprefix(COORDINATOR))
        elif author.startswith(AUDITOR):
            key = self.auditors.get(author.removeprefix(AUDITOR))
        else:
            key = {SERVER: self.server, OPERATOR: self.operator}.get(author) or self.sites.get(author)
        if key is None:
            raise ProtocolError("not enrolled in this federation", who=author, advice="check the roster")
        return bytes.fromhex(key)

    def author_of(self, key: bytes) -> str | None:
        """Return who signs with a public key (32 bytes); None: nobody in this roster."""
        authors = (
            SERVER,
            OPERATOR,
            *(COORDINATOR + name for name in self.coordinators),
            *(AUDITOR + name for name in self.auditors),
            *self.sites,
        )
        return next((author for author in authors if self.key_of(author) == key), None)


def check_roster(envelope: Envelope[Roster], *, pinned: str | None = None) -> Roster:
    """Return a roster whose own signature holds, whose keys differ, and whose hash is the pinned one.

    Raises:
        VerificationError: one of these does not hold.
    """
    roster = envelope.body
    if envelope.author != OPERATOR:
        raise VerificationError("roster is not signed by the operator", who=envelope.author)
    verify(envelope, bytes.fromhex(roster.operator))
    officers = (*roster.coordinators.values(), *roster.auditors.values())
    keys = [roster.operator, roster.server, *officers, *roster.sites.values()]
    if len(set(keys)) != len(keys) or len(set(roster.nodes.values())) != len(roster.nodes):
        raise VerificationError("two parties of the roster share one key", who=roster.federation)
    strangers = roster.nodes.keys() - roster.sites.keys()
    if strangers:
        raise VerificationError("roster has a connection's key of no site", who=min(strangers))
    if pinned is not None and roster.hash() != pinned:
        raise VerificationError(
            f"roster hash {roster.hash()[:16]}… is not the pinned {pinned[:16]}…",
            who=roster.federation,
            advice="ask the operator which roster is current and pin its hash in policy.toml",
        )
    return roster
