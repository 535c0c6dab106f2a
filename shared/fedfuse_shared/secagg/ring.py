"""How wide a ring has to be: no sum may wrap, and rounding must stay small beside the noise; no numpy here."""

from __future__ import annotations

import math

from fedfuse_shared.errors import ConfigError


def largest_scale(participants: int, clip_range: float, ring_bits: int) -> float:
    """Return the finest power-of-two grid (steps per unit) on which a sum of n clamped updates cannot wrap.

    Raises:
        ConfigError: not even a grid of one step per unit fits.
    """
    room = (2 ** (ring_bits - 1) - 1) / (participants * clip_range)
    if room < 1:
        raise ConfigError(
            f"{participants} updates of range {clip_range:g} do not fit a ring of {ring_bits} bits",
            advice="lower secure_aggregation.clip_range or raise secure_aggregation.ring_bits",
        )
    return float(2 ** (int(room).bit_length() - 1))


def wraps(participants: int, clip_range: float, scale: float, ring_bits: int) -> bool:
    """Return whether a sum of n clamped and rounded coordinates, their noise included, could wrap around."""
    largest = clip_range * scale
    # Rounded up: whichever way a coordinate at the clamp is rounded, it does not exceed this.
    return not math.isfinite(largest) or participants * math.ceil(largest) >= 2 ** (ring_bits - 1)
