"""What server and sites say to each other in one round, in the order it is said.

Every message is the signed envelope of one of these bodies and carries the context of its offer, so none can be
replayed in another attempt, round, run or federation.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints

from fedfuse_shared import limits
from fedfuse_shared.config.base import Frozen, Hex32, Label, SiteName
from fedfuse_shared.envelope import Body, Envelope

Share = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{66}$")]
"""One Shamir share: a field element of 33 bytes in hexadecimal."""
Bitmap = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){1,1250}$")]
"""Some of an offer's participants: bit i of the little-endian bytes stands for the i-th, in hexadecimal."""
Sealed = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){0,400}$")]
"""An AES-256-GCM nonce and ciphertext in hexadecimal; empty for a dealer's own share."""


class Step(StrEnum):
    """The exchanges between server and site; the values route Flower messages to their handlers."""

    HELLO = "query.hello"
    KEYS = "train.keys"
    SHARES = "train.shares"
    UPDATE = "train.update"
    AGREE = "train.agree"
    UNMASK = "train.unmask"
    SETTLE = "query.settle"


class Hello(Body):
    """Before the first round, server -> node: which enrolled site are you?"""

    kind: ClassVar[str] = "hello"

    federation: Label
    run: Label
    nonce: Hex32


class Introduction(Body):
    """Node -> server: the author of this envelope; federation, run and nonce are repeated."""

    kind: ClassVar[str] = "introduction"

    federation: Label
    run: Label
    nonce: Hex32


class RoundBody(Body):
    """A message of one attempt."""

    context: Hex32


class RoundKeys(RoundBody):
    """1. site -> server -> sites: the public halves of two fresh X25519 pairs."""

    kind: ClassVar[str] = "keys"

    channel: Hex32
    mask: Hex32


class Roll(Frozen):
    """A set of participants and the hash of what each of them sent, those a site does not see included."""

    members: Bitmap
    items: Hex32


class KeyList(RoundBody):
    """1. server -> site: the keys of its neighbourhood in U1, those who answered the offer."""

    kind: ClassVar[str] = "key-list"

    keys: Annotated[tuple[Envelope[RoundKeys], ...], Field(max_length=limits.MAX_SITES)]
    roll: Roll | None
    """All of U1 on a sparse graph; on the complete one everybody is seen and nothing is taken on trust."""


class ShareNote(RoundBody):
    """2. dealer -> holder, by way of the server: two sealed shares, their hashes and the seed's commitment."""

    kind: ClassVar[str] = "share"

    holder: SiteName
    sealed: Sealed
    seed_share_hash: Hex32
    mask_share_hash: Hex32
    seed_commitment: Hex32


class Dealing(RoundBody):
    """2. dealer -> server: one note for every member of its neighbourhood, its own included."""

    kind: ClassVar[str] = "dealing"

    notes: Annotated[tuple[Envelope[ShareNote], ...], Field(max_length=limits.MAX_SITES)]


class Delivery(RoundBody):
    """3. server -> holder: the notes addressed to it by its neighbourhood in U2, those who dealt."""

    kind: ClassVar[str] = "delivery"

    notes: Annotated[tuple[Envelope[ShareNote], ...], Field(max_length=limits.MAX_SITES)]
    roll: Roll | None
    """All of U2 on a sparse graph."""


class Survivors(RoundBody):
    """4. server -> site: its neighbourhood in U3, those whose masked vectors arrived, and the vectors' hashes."""

    kind: ClassVar[str] = "survivors"

    vectors: Annotated[dict[SiteName, Hex32], Field(max_length=limits.MAX_SITES)]
    roll: Roll | None
    """All of U3 on a sparse graph."""


class Agreement(RoundBody):
    """4. site -> server -> sites: this, and nothing else, may be opened."""

    kind: ClassVar[str] = "agreement"

    keys_hash: Hex32
    """Hash of the roll of U1 and everybody's keys."""
    dealings_hash: Hex32
    """Hash of the roll of U2 and everybody's commitments."""
    survivors_hash: Hex32
    """Hash of the roll of U3 and everybody's vectors."""


class Unmasking(RoundBody):
    """5. server -> sites: at least t equal agreements, the proof that U3 is the same everywhere."""

    kind: ClassVar[str] = "unmasking"

    agreements: Annotated[tuple[Envelope[Agreement], ...], Field(max_length=limits.MAX_SITES)]


class Reveal(RoundBody):
    """5. site -> server: seed shares of survivors, mask-key shares of the dropped, never both for one peer."""

    kind: ClassVar[str] = "reveal"

    seed_shares: Annotated[dict[SiteName, Share], Field(max_length=limits.MAX_SITES)]
    mask_shares: Annotated[dict[SiteName, Share], Field(max_length=limits.MAX_SITES)]
    bad_dealers: Annotated[tuple[SiteName, ...], Field(max_length=limits.MAX_SITES)]
    """Dealers whose share could not be opened or did not match the hash they signed."""


class SharePair(Frozen):
    """What a note's sealed part holds."""

    seed: Share
    mask: Share
