"""Masks: the AES-256-CTR keystream of a full 256-bit key, added to a vector of ring words in place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

Words = NDArray[np.uint32]
"""A vector of elements of the ring modulo 2^32, shape ``(d,)``."""

CHUNK = 2**15
"""Words masked at a time: 128 KiB of vector and as much keystream stay in a core's own cache, whatever the number
of masks."""
_BLOCK_WORDS = 4
"""Words in one block of AES."""
_ZEROS = bytes(4 * CHUNK)
_BATCH = 256
"""Masks applied in one pass: their ciphers are in memory together."""
_WORTH_A_THREAD = 2**20
"""Words to be masked (length times masks) below which a second thread costs more than it saves."""


class Mask(NamedTuple):
    """A keystream and the way it goes onto a vector."""

    key: bytes
    """32 bytes, derived for one purpose in one context: its counter starts at zero."""
    subtract: bool


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply_masks(words: Words, masks: Iterable[Mask], *, threads: int | None = None) -> None:
    """Put every mask onto ``words`` modulo 2^32, in place and in one pass over memory.

    Args:
        words: Shape ``(d,)``.
        masks: Any number of them; besides the vector and them, memory is a chunk and some ciphers a thread.
        threads: Cores to use, all there are if left out: each takes its own stretch of the vector (AES releases
            Python's lock, as numpy does).
    """
    chosen = list(masks)
    wanted = cores() if threads is None else threads
    threads = max(1, min(wanted, len(words) * len(chosen) // _WORTH_A_THREAD))
    # Each thread begins at a whole block, so that a counter can be set to it.
    stretch = -(-len(words) // (threads * _BLOCK_WORDS)) * _BLOCK_WORDS
    starts = range(0, len(words), stretch) if len(words) else range(0)
    if len(starts) <= 1:
        _apply(words, chosen, 0)
        return
    with ThreadPoolExecutor(len(starts)) as pool:
        work = [pool.submit(_apply, words[s : s + stretch], chosen, s // _BLOCK_WORDS) for s in starts]
    for done in work:
        done.result()


def _apply(words: Words, masks: Sequence[Mask], block: int) -> None:
    """Put masks onto a stretch of a vector that begins at a block of the keystreams."""
    counter = block.to_bytes(16, "big")
    # update_into wants one spare cipher block of room.
    buffer = bytearray(4 * CHUNK + 16)
    stream = np.frombuffer(buffer, dtype="<u4", count=CHUNK)
    for batch in range(0, len(masks), _BATCH):
        streams: list[tuple[CipherContext, np.ufunc]] = [
            (Cipher(AES256(mask.key), CTR(counter)).encryptor(), np.subtract if mask.subtract else np.add)
            for mask in masks[batch : batch + _BATCH]
        ]
        for start in range(0, len(words), CHUNK):
            part = words[start : start + CHUNK]
            whole = len(part) == CHUNK
            zeros, drawn = (_ZEROS, stream) if whole else (bytes(4 * len(part)), stream[: len(part)])
            for cipher, combine in streams:
                cipher.update_into(zeros, buffer)
                combine(part, drawn, out=part)
