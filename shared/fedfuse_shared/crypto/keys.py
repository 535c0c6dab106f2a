"""Key agreement (X25519, RFC 7748) and identities (Ed25519, RFC 8032), with the checks the RFCs leave open."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedfuse_shared.errors import ProtocolError

KEY_BYTES = 32
_P = 2**255 - 19


def public_of(private: bytes) -> bytes:
    """Return the X25519 public key (32 bytes) of a private key (32 bytes)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def identity_public(private: Ed25519PrivateKey) -> str:
    """Return an identity's public key in hexadecimal, as a roster lists it."""
    return private.public_key().public_bytes_raw().hex()


def check_canonical(public: bytes, *, who: str) -> None:
    """Refuse an X25519 public key that has a second spelling.

    RFC 7748 section 5 ignores the top bit and reduces modulo 2^255 - 19, so one point has several encodings; two
    different strings would then name one key (a colluder's "twin" of an honest site's key).

    Raises:
        ProtocolError: wrong length, top bit set, or not below 2^255 - 19.
    """
    if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _P:
        raise ProtocolError("advertised a non-canonical X25519 key", who=who)


def agree(private: bytes, public: bytes, *, who: str) -> bytes:
    """Return the X25519 shared secret (32 bytes).

    Raises:
        ProtocolError: the public key is non-canonical or of low order (all-zero secret, RFC 7748 section 6.1).
    """
    check_canonical(public, who=who)
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as problem:
        raise ProtocolError("advertised an X25519 key of low order", who=who) from problem
