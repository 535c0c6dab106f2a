"""A ledger's head: a C2SP tlog-checkpoint, signed as a C2SP signed note by the server.

The text is three lines, the origin, the size in decimal and the root in base64; then an empty line; then signature
lines ``— <name> <base64(key id || signature)>``. Sites will add theirs as witnesses (a later version); lines of
unknown keys are passed over, as the specification asks.

Sources: https://c2sp.org/tlog-checkpoint and https://c2sp.org/signed-note.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfuse_shared.errors import DataError, VerificationError

MAX_CHECKPOINT: Final = 64 * 2**10
"""Largest checkpoint that is parsed (bytes)."""

_ED25519: Final = b"\x01"
_KEY_ID_BYTES: Final = 4
_NOTE: Final = re.compile(
    r"\A([^\s+][^\n]{0,199})\n(0|[1-9][0-9]{0,15})\n([A-Za-z0-9+/]{43}=)\n"
    r"\n((?:\u2014 [^\s+]+ [A-Za-z0-9+/]+=*\n)+)\Z"
)


@dataclass(frozen=True)
class Head:
    """What a checkpoint commits to."""

    origin: str
    size: int
    """Leaves."""
    root: bytes
    """Root of the tree over them (32 bytes)."""

    def text(self) -> bytes:
        """Return the signed text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n".encode()


@dataclass(frozen=True)
class Note:
    """A parsed checkpoint: a head and who claims to have signed it; no signature is checked yet."""

    head: Head
    signatures: tuple[tuple[str, bytes], ...]
    """Key name, and key id with signature, of every signature line."""


def origin_of(federation: str) -> str:
    """Return the origin line, and the server's key name, of a federation's ledger."""
    return f"fedfuse/{federation}"


def key_id(name: str, public_key: bytes) -> bytes:
    """Return the four bytes by which signature lines name an Ed25519 key (C2SP signed-note, "Signatures")."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:_KEY_ID_BYTES]


def sign_checkpoint(head: Head, key: Ed25519PrivateKey) -> bytes:
    """Return the checkpoint of a head under the server's key."""
    public = key.public_key().public_bytes_raw()
    blob = base64.b64encode(key_id(head.origin, public) + key.sign(head.text())).decode()
    return head.text() + f"\n— {head.origin} {blob}\n".encode()


def parse_checkpoint(raw: bytes) -> Note:
    """Parse a checkpoint strictly: no extension lines, no second spelling of a number or a hash.

    Raises:
        DataError: it is not a checkpoint.
    """
    try:
        found = _NOTE.match(raw.decode()) if len(raw) <= MAX_CHECKPOINT else None
        lines = [line[2:].split(" ") for line in found[4].split("\n")[:-1]] if found else []
        signatures = tuple((name, _decode(blob)) for name, blob in lines)
        head = Head(found[1], int(found[2]), _decode(found[3])) if found else None
    except ValueError:  # not UTF-8, or base64 with stray bits
        head = None
    if head is None:
        raise DataError(
            "checkpoint is not a signed note of origin, size and root", advice="get it again from the server"
        )
    return Note(head, signatures)


def verify_checkpoint(raw: bytes, federation: str, public_key: bytes) -> Head:
    """Return the head of a checkpoint that the server signed.

    Args:
        raw: The whole note.
        federation: Whose ledger it must be about.
        public_key: The server's key in the roster (32 bytes).

    Raises:
        DataError: it is not a checkpoint.
        VerificationError: it is of another ledger, or no signature by the server holds.
    """
    note = parse_checkpoint(raw)
    name = origin_of(federation)
    if note.head.origin != name:
        raise VerificationError(
            f"checkpoint is of {note.head.origin[:80]!r}, not {name!r}",
            advice="get the ledger's own checkpoint",
        )
    mine = key_id(name, public_key)
    blobs = [blob for signer, blob in note.signatures if signer == name and blob[:_KEY_ID_BYTES] == mine]
    if not blobs:
        raise VerificationError(
            "checkpoint is not signed by the roster's server",
            advice="compare the roster with the federation's",
        )
    for blob in blobs:
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(blob[_KEY_ID_BYTES:], note.head.text())
        except (InvalidSignature, ValueError) as problem:
            raise VerificationError(
                "the server's signature of the checkpoint does not hold",
                advice="get it again from the server",
            ) from problem
    return note.head


def _decode(text: str) -> bytes:
    value = base64.b64decode(text, validate=True)
    if base64.b64encode(value).decode() != text:
        raise ValueError("base64 with stray bits")
    return value
