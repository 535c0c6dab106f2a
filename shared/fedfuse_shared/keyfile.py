"""Signing keys on disk: PKCS #8 PEM, readable by their owner only, never overwritten."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedfuse_shared.errors import StateError

_MAX_KEY_FILE = 4096


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a new Ed25519 key and write it to a new file of mode 0600.

    Raises:
        StateError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as problem:
        raise StateError("a key is here already and is not overwritten", who=str(path)) from problem
    except OSError as problem:
        raise StateError(f"key cannot be written ({problem.strerror})", who=str(path)) from problem
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 key in a file.

    Raises:
        StateError: the file is missing, readable by others, or holds no Ed25519 key.
    """
    try:
        mode = path.stat().st_mode
        pem = path.read_bytes()[:_MAX_KEY_FILE]
    except OSError as problem:
        raise StateError(f"key cannot be read ({problem.strerror})", who=str(path)) from problem
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StateError("key is open to other users", who=str(path), advice=f"chmod 600 {path}")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as problem:
        # Garbage; encrypted; an algorithm unheard of; one whose keys are of another length.
        raise StateError("file holds no private key that can be used", who=str(path)) from problem
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError("file holds no Ed25519 key", who=str(path))
    return key
