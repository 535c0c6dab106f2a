"""Authenticated encryption of shares between two sites (AES-256-GCM, NIST SP 800-38D)."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedfuse_shared.errors import ProtocolError

NONCE_BYTES = 12

RandomBytes = Callable[[int], bytes]
"""A source of cryptographically secure random bytes; ``os.urandom`` wherever fedfuse runs."""


def _direction(context: str, sender: str, receiver: str) -> bytes:
    return bytes.fromhex(context) + sender.encode() + b"\0" + receiver.encode()


def seal(
    key: bytes, plain: bytes, context: str, sender: str, receiver: str, random_bytes: RandomBytes
) -> bytes:
    """Return nonce and ciphertext; who sends to whom is authenticated, so nothing can be reflected."""
    nonce = random_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, _direction(context, sender, receiver))


def unseal(key: bytes, sealed: bytes, context: str, sender: str, receiver: str) -> bytes:
    """Return the plaintext.

    Raises:
        ProtocolError: the ciphertext was not made under this key for this direction and context.
    """
    nonce, ciphertext = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, _direction(context, sender, receiver))
    except (InvalidTag, ValueError) as problem:
        raise ProtocolError("sent a share that cannot be opened", who=sender) from problem
