"""A ledger's head: a C2SP tlog-checkpoint, signed as a C2SP signed note by the server.

The text is three lines, the origin, the size in decimal and the root in base64; then an empty line; then signature
lines ``— <name> <base64(key id || signature)>``. Sites will add theirs as witnesses (a later version); lines under
unknown key ids are ignored, as the specification asks.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfuse_shared.errors import VerificationError
from fedfuse_shared.ledger.merkle import HASH_BYTES

MAX_CHECKPOINT = 64 * 2**10
"""Largest checkpoint that is parsed (bytes)."""

_ED25519 = b"\x01"
_TEXT = re.compile(r"\A([^\n]{1,200})\n(0|[1-9][0-9]{0,17})\n([A-Za-z0-9+/]{43}=)\n\n((?:\u2014 [^\n]+\n)+)\Z")


@dataclass(frozen=True)
class Head:
    """What a checkpoint commits to."""

    origin: str
    size: int
    """Leaves."""
    root: bytes

    def text(self) -> bytes:
        """Return the signed text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n".encode()


def origin_of(federation: str) -> str:
    """Return the origin line, and the server's key name, of a federation's ledger."""
    return f"fedfuse/{federation}"


def sign_head(head: Head, key: Ed25519PrivateKey) -> bytes:
    """Return the checkpoint of a head under the server's key."""
    public = key.public_key().public_bytes_raw()
    blob = base64.b64encode(_key_id(head.origin, public) + key.sign(head.text())).decode()
    return head.text() + f"\n— {head.origin} {blob}\n".encode()


def verify_checkpoint(raw: bytes, federation: str, public_key: bytes) -> Head:
    """Return the head of a checkpoint that the server signed.

    Raises:
        VerificationError: malformed, of another ledger, or without a signature by the server that holds.
    """
    head, lines = _parse(raw)
    name = origin_of(federation)
    if head.origin != name:
        raise VerificationError(f"checkpoint is of {head.origin!r}, not {name!r}")
    wanted = _key_id(name, public_key)
    for signer, blob in lines:
        if signer == name and blob[:4] == wanted:
            try:
                Ed25519PublicKey.from_public_bytes(public_key).verify(blob[4:], head.text())
            except (InvalidSignature, ValueError) as problem:
                raise VerificationError("the server's signature of the checkpoint does not hold") from problem
            return head
    raise VerificationError("checkpoint is not signed by the roster's server")


def _parse(raw: bytes) -> tuple[Head, list[tuple[str, bytes]]]:
    try:
        if len(raw) > MAX_CHECKPOINT:
            raise ValueError("too long")
        found = _TEXT.match(raw.decode())
        if found is None:
            raise ValueError("not a signed note of three lines")
        root = base64.b64decode(found[3], validate=True)
        lines = []
        for line in found[4].splitlines():
            name, blob = line[2:].rsplit(" ", 1)
            lines.append((name, base64.b64decode(blob, validate=True)))
    except (ValueError, binascii.Error) as problem:
        raise VerificationError(f"checkpoint is malformed ({problem})") from problem
    if len(root) != HASH_BYTES or base64.b64encode(root).decode() != found[3]:
        raise VerificationError("checkpoint's root is malformed")
    return Head(found[1], int(found[2]), root), lines


def _key_id(name: str, public_key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:4]
