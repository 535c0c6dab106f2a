"""Key derivation (HKDF-SHA256, RFC 5869) with every derived key bound to its use, its context and both ends."""

from __future__ import annotations

from typing import NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedfuse_shared import limits


class End(NamedTuple):
    """One end of a pair: its roster name and the public key it advertised (32 bytes)."""

    name: str
    public: bytes


def _expand(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def pair_key(label: bytes, secret: bytes, context: str, one: End, other: End) -> bytes:
    """Return the 256-bit key two ends share for one purpose in one context.

    The names *and* both public keys go in: a colluder that advertises an honest site's key as its own would
    otherwise derive the same key and cancel that site's masks.
    """
    low, high = sorted((one, other))
    # Fixed-length parts and names ended by a zero byte (names never hold one): nothing can be read two ways.
    names = low.name.encode() + b"\0" + high.name.encode() + b"\0"
    return _expand(secret, label + b"\0" + bytes.fromhex(context) + names + low.public + high.public)


def self_mask_key(seed: bytes, context: str, site: str) -> bytes:
    """Return the 256-bit key of a site's own mask, from its 32-byte seed."""
    return _expand(seed, limits.LABEL_SELF_MASK + b"\0" + bytes.fromhex(context) + site.encode())
