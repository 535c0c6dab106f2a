"""The hashes by which all parties of a round mean the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from fedfuse_shared import limits
from fedfuse_shared.config.base import SERVER
from fedfuse_shared.envelope import canonical
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.messages import Roll

ShareKind = Literal["seed", "mask"]
Stage = Literal["keys", "dealings", "vectors"]
"""What the members of a roll sent: U1, U2 or U3."""


# --- rolls: U1, U2 and U3 -----------------------------------------------------------------------------------
def roll(participants: Sequence[str], members: Collection[str], items: str) -> Roll:
    """Return the roll of some participants, given the hash of what each of them sent."""
    bits = sum(1 << place for place, name in enumerate(participants) if name in members)
    return Roll(members=bits.to_bytes(-(-len(participants) // 8), "little").hex(), items=items)


def members_of(called: Roll, participants: Sequence[str]) -> tuple[str, ...]:
    """Return the participants on a roll, in the offer's order.

    Raises:
        ProtocolError: the roll is for another number of participants.
    """
    raw = bytes.fromhex(called.members)
    bits = int.from_bytes(raw, "little")
    if len(raw) != -(-len(participants) // 8) or bits >> len(participants):
        raise ProtocolError(f"calls a roll that is not of {len(participants)} participants", who=SERVER)
    return tuple(name for place, name in enumerate(participants) if bits >> place & 1)


def roll_hash(context: str, stage: Stage, called: Roll) -> str:
    """Return the hash of a whole set and of all its members sent: equal only if both are."""
    return _hash(limits.LABEL_ROLL, canonical([context, stage, called.members, called.items]))


def keys_items(context: str, keys: Mapping[str, tuple[str, str]]) -> str:
    """Return the hash of everyone's name, channel key and mask key (hexadecimal)."""
    listed = [[name, *keys[name]] for name in sorted(keys)]
    return _hash(limits.LABEL_KEYS, canonical([context, listed]))


def dealings_items(context: str, commitments: Mapping[str, str]) -> str:
    """Return the hash of everyone who dealt and the commitment to their self seed (hexadecimal)."""
    listed = [[name, commitments[name]] for name in sorted(commitments)]
    return _hash(limits.LABEL_DEALINGS, canonical([context, listed]))


def vectors_items(context: str, vectors: Mapping[str, str]) -> str:
    """Return the hash of everyone whose masked vector arrived and the vector's hash (hexadecimal)."""
    listed = [[name, vectors[name]] for name in sorted(vectors)]
    return _hash(limits.LABEL_VECTORS, canonical([context, listed]))


# --- what one site sends ------------------------------------------------------------------------------------
def share_hash(context: str, dealer: str, holder: str, kind: ShareKind, share: str) -> str:
    """Return the hash a dealer signs of one share (33 bytes, hexadecimal), so that a wrong one can be traced."""
    return _hash(limits.LABEL_SHARE, canonical([context, dealer, holder, kind, share]))


def seed_commitment(context: str, site: str, seed: bytes) -> str:
    """Return the commitment to a self seed; hiding because the seed is 256 random bits."""
    return _hash(limits.LABEL_SEED_COMMITMENT, canonical([context, site, seed.hex()]))


def vector_hash(context: str, packed: bytes) -> str:
    """Return the hash of a masked vector as it travels."""
    digest = hashlib.sha256(limits.LABEL_VECTOR + bytes.fromhex(context))
    digest.update(packed)
    return digest.hexdigest()


def _hash(label: bytes, content: bytes) -> str:
    return hashlib.sha256(label + b"\0" + content).hexdigest()
