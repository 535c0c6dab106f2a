"""Checkpoints: a public vector of the note format, strict parsing, and whose signature counts."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfuse_shared.errors import DataError, VerificationError
from fedfuse_shared.ledger.checkpoint import (
    Head,
    key_id,
    origin_of,
    parse_checkpoint,
    sign_checkpoint,
    verify_checkpoint,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
HEAD = Head(origin_of("lab"), 42, bytes(range(32)))


def test_key_id_and_signature_of_the_public_note_vector() -> None:
    """The example of golang.org/x/mod/sumdb/note, after which C2SP signed-note was specified."""
    public = base64.b64decode("ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    text = b"If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    blob = base64.b64decode(
        "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    )
    assert public[:1] == b"\x01"
    assert key_id("PeterNeumann", public[1:]) == blob[:4] == bytes.fromhex("c74f20a3")
    Ed25519PublicKey.from_public_bytes(public[1:]).verify(blob[4:], text)


def test_checkpoint_reads_as_specified() -> None:
    raw = sign_checkpoint(HEAD, KEY)
    lines = raw.decode().split("\n")
    assert lines[:4] == ["fedfuse/lab", "42", base64.b64encode(HEAD.root).decode(), ""]
    assert lines[4].startswith("— fedfuse/lab ")
    assert lines[5:] == [""]
    assert verify_checkpoint(raw, "lab", PUBLIC) == HEAD


def test_witnesses_lines_are_passed_over() -> None:
    """A later version adds cosignatures; today's auditor must still read the note."""
    witness = base64.b64encode(b"\0\1\2\3" + bytes(72)).decode()
    raw = sign_checkpoint(HEAD, KEY) + f"— lyon.example/witness {witness}\n".encode()
    assert verify_checkpoint(raw, "lab", PUBLIC) == HEAD
    assert [name for name, _ in parse_checkpoint(raw).signatures] == ["fedfuse/lab", "lyon.example/witness"]


def test_every_flipped_bit_is_noticed() -> None:
    raw = sign_checkpoint(HEAD, KEY)
    for place in range(len(raw)):
        for bit in range(8):
            forged = bytearray(raw)
            forged[place] ^= 1 << bit
            with pytest.raises((DataError, VerificationError)):
                verify_checkpoint(bytes(forged), "lab", PUBLIC)


def test_other_ledgers_and_other_servers_checkpoints_do_not_count() -> None:
    raw = sign_checkpoint(HEAD, KEY)
    with pytest.raises(VerificationError, match="is of 'fedfuse/lab', not 'fedfuse/other'"):
        verify_checkpoint(raw, "other", PUBLIC)
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    with pytest.raises(VerificationError, match="not signed by the roster's server"):
        verify_checkpoint(raw, "lab", other.public_key().public_bytes_raw())
    # A second, wrong signature under the server's own key id is not outvoted by the good one.
    wrong = base64.b64encode(key_id(HEAD.origin, PUBLIC) + bytes(64)).decode()
    with pytest.raises(VerificationError, match="does not hold"):
        verify_checkpoint(raw + f"— fedfuse/lab {wrong}\n".encode(), "lab", PUBLIC)


ROOT = base64.b64encode(HEAD.root)
TAIL = sign_checkpoint(HEAD, KEY).split(b"\n\n")[1]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"fedfuse/lab\n42\n" + ROOT + b"\n\n", id="unsigned"),
        pytest.param(b"fedfuse/lab\n042\n" + ROOT + b"\n\n" + TAIL, id="second spelling of a number"),
        pytest.param(b"fedfuse/lab\n-1\n" + ROOT + b"\n\n" + TAIL, id="negative"),
        pytest.param(b"fedfuse/lab\n99999999999999999\n" + ROOT + b"\n\n" + TAIL, id="beyond any ledger"),
        pytest.param("fedfuse/lab\n٤٢\n".encode() + ROOT + b"\n\n" + TAIL, id="other digits"),
        pytest.param(b"fedfuse/lab\n42\n" + ROOT[:-2] + b"9=\n\n" + TAIL, id="stray bits in base64"),
        pytest.param(b"fedfuse/lab\n42\n" + ROOT + b"\nextension\n\n" + TAIL, id="extension line"),
        pytest.param(b"fedfuse/lab\r\n42\r\n" + ROOT + b"\r\n\r\n" + TAIL, id="carriage returns"),
        pytest.param(sign_checkpoint(HEAD, KEY)[:-1], id="torn"),
        pytest.param(sign_checkpoint(HEAD, KEY) + b"\n", id="empty line at the end"),
        pytest.param(sign_checkpoint(HEAD, KEY) * 1000, id="too long"),
        pytest.param(b"\xff" + sign_checkpoint(HEAD, KEY), id="not UTF-8"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(raw: bytes) -> None:
    with pytest.raises(DataError, match="not a signed note"):
        parse_checkpoint(raw)
