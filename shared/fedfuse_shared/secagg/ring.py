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


MAX_INFLATION = 1e-3
"""Largest share by which rounding may add to the variance of the noise."""
_CLAMPED = 4.0
"""Deviations of the noise that have to fit within the clamp: one coordinate in 16,000 lies beyond."""


def check_rounding(deviation: float, clip_range: float, scale: float, ring_bits: int) -> None:
    """Refuse a grid so coarse, or a clamp so narrow, that it costs accuracy beside the noise; privacy it never does.

    Args:
        deviation: Standard deviation of the noise on one coordinate of one site's update.
        clip_range: What a coordinate is clamped to.
        scale: Steps of the grid per unit.
        ring_bits: Width of the ring.

    Raises:
        ConfigError: with the numbers.
    """
    # Rounding to a grid of step s adds s^2 / 12 to the variance.
    inflation = 1 / (12 * (scale * deviation) ** 2)
    if inflation > MAX_INFLATION:
        raise ConfigError(
            f"a ring of {ring_bits} bits leaves {scale:g} steps per unit: rounding adds {inflation:.2%} to noise of "
            f"deviation {deviation:.3g}, at most {MAX_INFLATION:.1%} is accepted",
            advice="raise secure_aggregation.ring_bits or lower secure_aggregation.clip_range",
        )
    if _CLAMPED * deviation > clip_range:
        raise ConfigError(
            f"updates are clamped to +/-{clip_range:g}, and their noise alone has deviation {deviation:.3g}",
            advice=f"raise secure_aggregation.clip_range to at least {_CLAMPED * deviation:.3g}",
        )


_FAR = 12.0
"""Deviations of the noise that have room beside a count: a normal value lies beyond with probability 2^-110."""


def most_counted(participants: int, noise: float, ring_bits: int) -> int:
    """Return what each evaluation count of a site is clamped to before its noise, so that n of them do not wrap.

    Args:
        participants: n, sites whose counts are summed at most.
        noise: Standard deviation of the noise on one site's count.
        ring_bits: Width of the ring.

    Raises:
        ConfigError: the ring has no room for a single record.
    """
    room: int = (2 ** (ring_bits - 1) - 1) // participants - math.ceil(_FAR * noise)
    if room < 1:
        raise ConfigError(
            f"a ring of {ring_bits} bits has no room for counts of {participants} sites with noise of deviation "
            f"{noise:g}",
            advice="raise secure_aggregation.ring_bits or leave evaluation.every out",
        )
    return room
