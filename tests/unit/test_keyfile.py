"""Key files: one key, its owner's alone, and one kind of error for everything else."""

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedfuse_shared.errors import StateError
from fedfuse_shared.keyfile import create_key, load_key


def pem(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def of_algorithm(identifier):
    """A key that claims another algorithm; found by fuzzing, such files left as untyped errors."""
    der = bytes.fromhex("302e020100300506032b6570042204202d94" + "00" * 30)
    der = der.replace(bytes.fromhex("06032b6570"), bytes.fromhex(identifier))
    return b"-----BEGIN PRIVATE KEY-----\n" + base64.b64encode(der) + b"\n-----END PRIVATE KEY-----\n"


def test_a_key_is_made_once_and_read_back(tmp_path):
    path = tmp_path / "a.key"
    made = create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path).private_bytes_raw() == made.private_bytes_raw()
    with pytest.raises(StateError, match="is not overwritten"):
        create_key(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no key",
        pem(Ed25519PrivateKey.generate())[:60],
        pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"password")),
        pem(generate_private_key(SECP256R1())),
        of_algorithm("06032b5570"),
        of_algorithm("06032b656f"),
    ],
    ids=["empty", "garbage", "cut", "encrypted", "another kind", "unheard of", "of another length"],
)
def test_any_other_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "b.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StateError, match=r"b\.key"):
        load_key(path)


def test_a_key_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "a.key"
    create_key(path)
    path.chmod(0o640)
    with pytest.raises(StateError, match="chmod 600"):
        load_key(path)
