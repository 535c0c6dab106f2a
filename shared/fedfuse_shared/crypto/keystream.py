"""Masks: the AES-256-CTR keystream of a full 256-bit key, added to a vector of ring words in place."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

Words = NDArray[np.uint32]
"""A vector of elements of the ring modulo 2^32, shape ``(d,)``."""

_CHUNK = 2**16
"""Words drawn at a time: 256 KiB, so that keystream and vector stay in the processor's cache."""
_ZEROS = bytes(4 * _CHUNK)


def apply_mask(words: Words, key: bytes, *, subtract: bool) -> None:
    """Add the keystream of ``key`` (32 bytes) to ``words`` modulo 2^32 in place, or subtract it.

    The counter starts at zero: each key is derived for one purpose in one context and masks one vector.
    """
    encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    combine = np.subtract if subtract else np.add
    # update_into wants one spare cipher block of room.
    buffer = bytearray(4 * _CHUNK + 16)
    stream = np.frombuffer(buffer, dtype="<u4", count=_CHUNK)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        encryptor.update_into(_ZEROS[: 4 * len(part)], buffer)
        combine(part, stream[: len(part)], out=part)
