"""Ring elements of 16 to 32 bits as bytes, densely, and back: what a masked vector is on the wire.

Words are written one after the other into a little-endian bit stream: word i takes bits ``b i`` to ``b (i + 1) - 1``,
and bit j of the stream is bit ``j mod 8`` of byte ``j // 8``. Eight words therefore fill ``b`` whole bytes. The
vector is extended with zero words to a multiple of eight, so that a vector has one spelling.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedfuse_shared.crypto.keystream import Words
from fedfuse_shared.errors import ProtocolError

RING_BITS: Final = (*range(16, 25), 32)
"""Widths a ring may have: 32, or packed ones that save bandwidth (design page 2, Numbers in the ring)."""
_GROUP: Final = 8
"""Words that fill a whole number of bytes at every width."""
_CHUNK: Final = 2**16
"""Words packed at a time: what is copied around stays in a core's own cache."""

Bytes = NDArray[np.uint8]


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes of that many packed words."""
    return -(-count // _GROUP) * bits


def pack(words: Words, bits: int) -> bytes:
    """Return the low ``bits`` of every word, shape ``(d,)``, as ``packed_size(d, bits)`` bytes."""
    if bits == 32 and len(words) % _GROUP == 0:
        return words.astype("<u4", copy=False).tobytes()
    packed = np.empty(packed_size(len(words), bits), dtype=np.uint8)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        groups = -(-len(part) // _GROUP)
        padded = np.zeros(groups * _GROUP, dtype=np.uint32)
        np.bitwise_and(part, np.uint32(2**bits - 1), out=padded[: len(part)])
        first = start // _GROUP * bits
        _pack_groups(padded, bits, packed[first : first + groups * bits].reshape(groups, bits))
    return packed.tobytes()


def _pack_groups(words: Words, bits: int, packed: Bytes) -> None:
    columns = np.ascontiguousarray(words.reshape(-1, _GROUP).T)
    for place in range(bits):
        word, shift = divmod(8 * place, bits)
        byte = columns[word] >> shift
        if shift + 8 > bits:  # the byte ends in the next word
            byte |= columns[word + 1] << (bits - shift)
        packed[:, place] = byte  # numpy keeps the low eight bits


def add_packed(total: Words, packed: bytes, bits: int, *, who: str) -> None:
    """Add packed words to ``total`` modulo 2^32, in place and chunk by chunk; only the low ``bits`` count.

    Args:
        total: Shape ``(d,)``.
        packed: What ``pack`` made of ``d`` words.
        bits: Width of the ring.
        who: Whoever sent it.

    Raises:
        ProtocolError: another length, or a spelling ``pack`` does not use; ``total`` is unchanged.
    """
    if len(packed) != packed_size(len(total), bits):
        raise ProtocolError(
            f"sent a vector of {len(packed)} bytes, not {packed_size(len(total), bits)}", who=who
        )
    raw = np.frombuffer(packed, dtype=np.uint8)
    spare = -len(total) % _GROUP
    if spare and _unpack_groups(raw[-bits:], bits)[_GROUP - spare :].any():
        raise ProtocolError("sent a vector with bits beyond its last word", who=who)
    for start in range(0, len(total), _CHUNK):
        part = total[start : start + _CHUNK]
        first, groups = start // _GROUP * bits, -(-len(part) // _GROUP)
        part += _unpack_groups(raw[first : first + groups * bits], bits)[: len(part)]


def _unpack_groups(raw: Bytes, bits: int) -> Words:
    if bits == 32:
        return raw.view("<u4")
    columns = np.ascontiguousarray(raw.reshape(-1, bits).T).astype(np.uint32)
    words = np.empty((columns.shape[1], _GROUP), dtype=np.uint32)
    for place in range(_GROUP):
        byte, shift = divmod(bits * place, 8)
        word = columns[byte] >> shift
        for further in range(1, -(-(shift + bits) // 8)):
            word |= columns[byte + further] << (8 * further - shift)
        words[:, place] = word
    words &= np.uint32(2**bits - 1)
    return words.reshape(-1)
