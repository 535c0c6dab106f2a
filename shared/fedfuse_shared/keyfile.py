"""Keys on disk: PKCS #8 PEM, or OpenSSH's format for Flower; readable by their owner only, never overwritten."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedfuse_shared.errors import StateError

_MAX_KEY_FILE = 4096


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a new Ed25519 key and write it to a new file of mode 0600.

    Raises:
        StateError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def create_node_key(path: Path) -> str:
    """Make a new key of a SuperNode's connections, as Flower wants it, and return its public half.

    Returns:
        ``ecdsa-sha2-nistp384 ...``, as OpenSSH writes it, without a comment.

    Raises:
        StateError: the file exists or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def is_node_key(line: str) -> bool:
    """Return whether a line is a public key of connections in the one form that OpenSSH writes it in.

    Base64 has sixteen spellings of the last byte of such a key: two that differ are to be two keys.
    """
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm, InternalError):
        return False
    return (
        isinstance(key, ec.EllipticCurvePublicKey)
        and isinstance(key.curve, ec.SECP384R1)
        and key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() == line
    )


def load_node_public(path: Path) -> str:
    """Return the public half of a SuperNode's key, as OpenSSH writes it.

    Raises:
        StateError: the file is missing, readable by others, or holds no such key.
    """
    try:
        key = load_ssh_private_key(_read_secret(path), password=None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm, InternalError) as problem:
        raise StateError("file holds no private key that can be used", who=str(path)) from problem
    if not (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)):
        raise StateError("file holds no key on the curve P-384", who=str(path))
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file of mode 0600, durably.

    Raises:
        StateError: the file exists or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as problem:
        raise StateError("a key is here already and is not overwritten", who=str(path)) from problem
    except OSError as problem:
        raise StateError(f"key cannot be written ({problem.strerror})", who=str(path)) from problem


def _read_secret(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()[:_MAX_KEY_FILE]
    except OSError as problem:
        raise StateError(f"key cannot be read ({problem.strerror})", who=str(path)) from problem
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StateError("key is open to other users", who=str(path), advice=f"chmod 600 {path}")
    return content


def load_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 key in a file.

    Raises:
        StateError: the file is missing, readable by others, or holds no Ed25519 key.
    """
    pem = _read_secret(path)
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as problem:
        # Garbage; encrypted; an algorithm unheard of; one whose keys are of another length.
        raise StateError("file holds no private key that can be used", who=str(path)) from problem
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError("file holds no Ed25519 key", who=str(path))
    return key
