"""A slow, obvious reference for one round, written from docs/protocol.md: plain integers, one word at a time.

It shares no code with the product but the primitives of pyca/cryptography: the keystream is made of single AES blocks
over a counter, packing is one big integer, sharing is polynomials over the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

FIELD = 2**256 + 297


def hkdf(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def keystream(key: bytes, count: int) -> list[int]:
    """AES-256 of 0, 1, 2, ... as big-endian blocks, read as little-endian 32-bit words."""
    block = Cipher(AES256(key), ECB()).encryptor()
    stream = b"".join(block.update(number.to_bytes(16, "big")) for number in range(-(-count // 4)))
    return [int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(count)]


def pair_keystream(
    context: str, mine: str, private: bytes, theirs: str, public: bytes, count: int
) -> list[int]:
    own = X25519PrivateKey.from_private_bytes(private)
    secret = own.exchange(X25519PublicKey.from_public_bytes(public))
    ends = sorted([(mine, own.public_key().public_bytes_raw()), (theirs, public)])
    names = b"".join(name.encode() + b"\0" for name, _ in ends)
    info = b"fedfuse/v1/mask" + b"\0" + bytes.fromhex(context) + names + ends[0][1] + ends[1][1]
    return keystream(hkdf(secret, info), count)


def masked(
    context: str,
    site: str,
    seed: bytes,
    private: bytes,
    publics: Mapping[str, bytes],
    words: Sequence[int],
    bits: int,
) -> list[int]:
    """A site's vector under its own mask and one for each peer: added if its name comes first, else subtracted."""
    own = keystream(
        hkdf(seed, b"fedfuse/v1/self-mask" + b"\0" + bytes.fromhex(context) + site.encode()), len(words)
    )
    total = [word + mask for word, mask in zip(words, own, strict=True)]
    for peer, public in publics.items():
        stream = pair_keystream(context, site, private, peer, public, len(words))
        sign = 1 if site < peer else -1
        total = [word + sign * mask for word, mask in zip(total, stream, strict=True)]
    return [word % 2**bits for word in total]


def packed(words: Sequence[int], bits: int) -> bytes:
    """All words in one integer, word i at bit ``bits * i``, as little-endian bytes of whole groups of eight words."""
    number = sum((word % 2**bits) << (bits * place) for place, word in enumerate(words))
    return number.to_bytes(math.ceil(len(words) / 8) * bits, "little")


def quantised(value: float, clip_range: float, scale: float, bits: int) -> int:
    """Clamp, scale, round half to even, two's complement; what is not finite counts as zero."""
    if not math.isfinite(value):
        return 0
    clamped = max(-Fraction(clip_range), min(Fraction(clip_range), Fraction(value)))
    return round(clamped * Fraction(scale)) % 2**bits


def dealt(coefficients: Sequence[int], point: int) -> int:
    """The polynomial with these coefficients, the secret first, at a point."""
    return sum(c * pow(point, power, FIELD) for power, c in enumerate(coefficients)) % FIELD


def restored(shares: Mapping[int, int]) -> int:
    """The value at 0 of the polynomial through the shares, by solving for its coefficients (Gauss)."""
    points = list(shares)
    rows = [[pow(point, power, FIELD) for power in range(len(points))] + [shares[point]] for point in points]
    size = len(rows)
    for column in range(size):
        pivot = next(row for row in range(column, size) if rows[row][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        inverse = pow(rows[column][column], -1, FIELD)
        rows[column] = [value * inverse % FIELD for value in rows[column]]
        for row in range(size):
            if row != column and (factor := rows[row][column]):
                rows[row] = [(a - factor * b) % FIELD for a, b in zip(rows[row], rows[column], strict=True)]
    return rows[0][size]
