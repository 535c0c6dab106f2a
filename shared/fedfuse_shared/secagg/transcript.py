"""The hashes by which all parties of a round mean the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np

from fedfuse_shared import limits
from fedfuse_shared.crypto.keystream import Words
from fedfuse_shared.envelope import canonical

ShareKind = Literal["seed", "mask"]


def keys_hash(context: str, keys: Mapping[str, tuple[str, str]]) -> str:
    """Return H(U1): everyone's name, channel key and mask key (hexadecimal)."""
    listed = [[name, *keys[name]] for name in sorted(keys)]
    return _hash(limits.LABEL_KEYS, canonical([context, listed]))


def dealings_hash(context: str, commitments: Mapping[str, str]) -> str:
    """Return H(U2): everyone who dealt and the commitment to their self seed (hexadecimal)."""
    listed = [[name, commitments[name]] for name in sorted(commitments)]
    return _hash(limits.LABEL_DEALINGS, canonical([context, listed]))


def share_hash(context: str, dealer: str, holder: str, kind: ShareKind, share: str) -> str:
    """Return the hash a dealer signs of one share (33 bytes, hexadecimal), so that a wrong one can be traced."""
    return _hash(limits.LABEL_SHARE, canonical([context, dealer, holder, kind, share]))


def seed_commitment(context: str, site: str, seed: bytes) -> str:
    """Return the commitment to a self seed; hiding because the seed is 256 random bits."""
    return _hash(limits.LABEL_SEED_COMMITMENT, canonical([context, site, seed.hex()]))


def vector_hash(context: str, words: Words) -> str:
    """Return the hash of a masked vector as little-endian 32-bit words."""
    digest = hashlib.sha256(limits.LABEL_VECTOR + bytes.fromhex(context))
    digest.update(np.ascontiguousarray(words, dtype="<u4").view(np.uint8).data)
    return digest.hexdigest()


def _hash(label: bytes, content: bytes) -> str:
    return hashlib.sha256(label + b"\0" + content).hexdigest()
