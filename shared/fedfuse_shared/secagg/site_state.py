"""What a site has to remember of a round between its steps; one immutable value, secret."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, ValidationError

from fedfuse_shared.config.base import Frozen, Hex32, SiteName
from fedfuse_shared.envelope import canonical
from fedfuse_shared.errors import StateError
from fedfuse_shared.messages import Roll, SharePair


class SitePhase(StrEnum):
    """What the site has done last."""

    ADVERTISED = "advertised"
    DEALT = "dealt"
    DELIVERED = "delivered"
    MASKED = "masked"
    AGREED = "agreed"
    REVEALED = "revealed"


class PeerKeys(Frozen):
    """A member of U1's public keys."""

    channel: Hex32
    mask: Hex32


class Received(Frozen):
    """What a member of U2 dealt to this site; no shares where they were bad."""

    seed_commitment: Hex32
    shares: SharePair | None


class SiteState(Frozen):
    """Everything a restarted process needs to go on with the round; secret."""

    phase: SitePhase
    context: Hex32
    channel_private: Hex32
    mask_private: Hex32
    seed: Hex32
    peers: dict[SiteName, PeerKeys] = Field(default_factory=dict)
    """This site's neighbourhood in U1, itself included: all of U1 on the complete graph."""
    keys_roll: Roll | None = None
    """U1."""
    own_shares: SharePair | None = None
    received: dict[SiteName, Received] = Field(default_factory=dict)
    """The neighbourhood's members in U2, this site included."""
    dealings_roll: Roll | None = None
    """U2."""
    vector_hash: Hex32 | None = None
    agreed: dict[SiteName, Hex32] = Field(default_factory=dict)
    """The neighbourhood's members in U3 and the hashes of their vectors, as this site signed them."""
    survivors_roll: Roll | None = None
    """U3."""

    def dump(self) -> bytes:
        """Return the state as JSON."""
        return canonical(self)

    @classmethod
    def load(cls, raw: bytes) -> SiteState:
        """Return a state that was dumped.

        Raises:
            StateError: the bytes are no dumped state.
        """
        try:
            return cls.model_validate_json(raw)
        except ValidationError as problem:
            raise StateError(
                "a stored round state cannot be read", advice="erase the round and rejoin"
            ) from problem
