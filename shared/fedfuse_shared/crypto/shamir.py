"""Secret sharing (Shamir 1979) of 256-bit secrets over a prime field larger than 2^256."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedfuse_shared.crypto.sealing import RandomBytes
from fedfuse_shared.errors import ProtocolError

PRIME = 2**256 + 297
"""The smallest prime above 2^256: every 32-byte secret is a field element and none has two representations."""
SECRET_BYTES = 32
SHARE_BYTES = 33


def _draw(random_bytes: RandomBytes) -> int:
    # 384 bits reduced modulo a 257-bit prime: within 2^-127 of uniform.
    return int.from_bytes(random_bytes(48), "big") % PRIME


def split(
    secret: bytes, threshold: int, points: Sequence[int], random_bytes: RandomBytes
) -> dict[int, bytes]:
    """Return one share (33 bytes) per evaluation point, any ``threshold`` of which restore the secret (32 bytes)."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(points) or len(set(points)) != len(points):
        raise ValueError("a 32-byte secret, distinct points and at least `threshold` of them are needed")
    if any(not 0 < point < PRIME for point in points):
        raise ValueError("points are positive field elements: the point 0 is the secret itself")
    coefficients = [int.from_bytes(secret, "big"), *(_draw(random_bytes) for _ in range(threshold - 1))]
    shares = {}
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares[point] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes], *, who: str) -> bytes:
    """Return the secret (32 bytes) from at least ``threshold`` shares by Lagrange interpolation at 0.

    With fewer shares, or wrong ones, the result is unrelated to the secret: the caller compares it with the
    dealer's commitment.

    Raises:
        ProtocolError: a share is no field element, or the result is no 32-byte secret: the dealer is to blame.
    """
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    if any(value >= PRIME for value in values.values()):
        raise ProtocolError("dealt a share outside the field", who=who)
    weights = _weights(tuple(values))
    secret = sum(value * weight for value, weight in zip(values.values(), weights, strict=True)) % PRIME
    if secret >= 2**256:
        raise ProtocolError("dealt shares of something that is not a 32-byte secret", who=who)
    return secret.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=256)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return the Lagrange coefficients at 0: they depend on public points alone and are the same for many secrets."""
    weights = []
    for point in points:
        numerator, denominator = 1, 1
        for other in points:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(weights)
