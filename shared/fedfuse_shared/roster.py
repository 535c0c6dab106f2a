"""The roster: who belongs to a federation and under which keys; pinned at every site by its hash."""

from __future__ import annotations

import hashlib
from typing import ClassVar

from fedfuse_shared import limits
from fedfuse_shared.config.base import OPERATOR, SERVER, Hex32, Label, SiteName
from fedfuse_shared.envelope import Body, Envelope, canonical, verify
from fedfuse_shared.errors import ProtocolError, VerificationError


class Roster(Body):
    """Every party's Ed25519 public key; signed by the operator, whom everyone trusts for it."""

    kind: ClassVar[str] = "enrolment"

    federation: Label
    operator: Hex32
    server: Hex32
    sites: dict[SiteName, Hex32]

    def hash(self) -> str:
        """Return the hash sites pin (SHA-256, hexadecimal)."""
        return hashlib.sha256(limits.LABEL_ROSTER + canonical(self)).hexdigest()

    def key_of(self, author: str) -> bytes:
        """Return an author's public key (32 bytes).

        Raises:
            ProtocolError: nobody of that name is enrolled.
        """
        key = {SERVER: self.server, OPERATOR: self.operator}.get(author) or self.sites.get(author)
        if key is None:
            raise ProtocolError("not enrolled in this federation", who=author, advice="check the roster")
        return bytes.fromhex(key)


def check_roster(envelope: Envelope[Roster], *, pinned: str | None = None) -> Roster:
    """Return a roster whose own signature holds, whose keys differ, and whose hash is the pinned one.

    Raises:
        VerificationError: one of these does not hold.
    """
    roster = envelope.body
    if envelope.author != OPERATOR:
        raise VerificationError("roster is not signed by the operator", who=envelope.author)
    verify(envelope, bytes.fromhex(roster.operator))
    keys = [roster.operator, roster.server, *roster.sites.values()]
    if len(set(keys)) != len(keys):
        raise VerificationError("two parties of the roster share one key", who=roster.federation)
    if pinned is not None and roster.hash() != pinned:
        raise VerificationError(
            f"roster hash {roster.hash()[:16]}… is not the pinned {pinned[:16]}…",
            who=roster.federation,
            advice="ask the operator which roster is current and pin its hash in policy.toml",
        )
    return roster
