"""Noise shared under secure aggregation: sensitivity on the grid, shares of noise, and the price in delta.

Each site sums its drawn records' clipped gradients in float64, clamps the sum's coordinates, rounds them once to
the grid of ``1 / scale``, and adds a discrete Gaussian share of noise in steps of that grid. Any ``honest`` shares
together carry at least the noise that is charged. The proof, step by step: docs/privacy-aggregate.md.

All functions are pure and take public constants. Results are rounded to the side that costs privacy nothing.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

from fedfuse_shared import limits
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.privacy.integer_noise import SMOOTH, SMOOTHING

MAX_RECORDS: Final = limits.MAX_RECORDS
"""Most records of one step whose float64 sum the stated sensitivity covers."""
FINENESS: Final = 2**10
"""``scale * clip >= FINENESS * sqrt(dimension)`` keeps rounding at a thousandth of the clip norm."""
MOST_SHARE: Final = 2.0**24
"""Largest deviation of a share, in grid steps, whose draws are within ``MOST_DISTANCE`` of their ideal law."""
MOST_DISTANCE: Final = 2.0**-80
"""Bound on ``IntegerGaussian.distance`` for every deviation from 8 to ``MOST_SHARE``."""
MOST_DIMENSION: Final = 2**24
"""Most words of a vector whose noise is drawn as integers; the slack in delta is reckoned with it."""
NOISE_REACH: Final = 12.0
"""Deviations of the summed noise that a ring leaves room for; more has probability below 2**-102."""

_UP: Final = 1 + 2.0**-48  # more than a dozen roundings of float64 can lose
_UNIT: Final = 2.0**-53  # largest relative error of one float64 addition


def sensitivity(clip: float, scale: float, dimension: int, records: int = MAX_RECORDS) -> float:
    """Return C': by how much, in L2, one record moves the rounded sum, in the unit of the clip norm.

    It is the clip norm, plus one grid step per coordinate (two values are rounded by half a step each), plus what
    two float64 sums lose: n - 1 additions in any order err by at most g * sum |x_i| with u = 2**-53 and
    g = (n - 1) u / (1 - (n - 1) u) (Higham 2002, "Accuracy and stability of numerical algorithms", section 4.2),
    so a sum of n vectors of norm at most C errs by at most g n C.

    Args:
        clip: Clip norm C: no record's float64 vector has a larger L2 norm.
        scale: Steps of the grid per unit, a power of two, so that multiplying by it is exact.
        dimension: Coordinates of the vector.
        records: Most records that one step can draw, the added one included.

    Raises:
        ConfigError: a constant outside its range.
    """
    _check(clip=clip, scale=scale, dimension=dimension)
    if not 1 <= records <= MAX_RECORDS:
        raise ConfigError(
            f"sums of {records} records are not covered, only 1 to {MAX_RECORDS}",
            advice="split the data set into several sites' shares or lower the sampling rate",
        )
    lost = (records - 1) * _UNIT / (1 - (records - 1) * _UNIT)
    return (clip * (1 + 2 * lost * records) + math.sqrt(dimension) / scale) * _UP


def share(sigma: float, honest: int) -> float:
    """Return the noise multiplier of one site's share: ``honest`` such shares add up to ``sigma``.

    Raises:
        ConfigError: no noise, or no honest site.
    """
    if not (0 < sigma < math.inf and honest >= 1):
        raise ConfigError(
            f"noise multiplier {sigma:g} cannot be shared among {honest} honest sites",
            advice="min_survivors must exceed the number of colluding sites, and the multiplier zero",
        )
    return sigma / math.sqrt(honest)


def share_deviation(sigma: float, honest: int, clip: float, scale: float, dimension: int) -> float:
    """Return the deviation v of one site's share, in grid steps, such that ``charged_sigma`` is at least ``sigma``.

    Smoothing the integers costs the sum a variance of r^2 = 4 steps, so ``honest * v^2 = (sigma C' scale)^2 + r^2``.

    Args:
        sigma: Noise multiplier that is charged.
        honest: Survivors that are sure to be honest: ``min_survivors`` less the colluding ones.
        clip: Clip norm C.
        scale: Steps of the grid per unit, a power of two.
        dimension: Coordinates of the vector.

    Raises:
        ConfigError: a constant outside its range. Whether v can be drawn is for ``IntegerGaussian`` to say.
    """
    whole = sigma * sensitivity(clip, scale, dimension) * scale
    return share(math.hypot(whole, SMOOTH), honest) * _UP**4  # of which charged_sigma takes back less


def charged_sigma(deviation: float, honest: int, clip: float, scale: float, dimension: int) -> float:
    """Return the multiplier of the Gaussian mechanism that ``honest`` shares of a deviation provide.

    With ``honest = 1`` it is what a site keeps if everybody else colludes. Zero where smoothing takes everything.

    Raises:
        ConfigError: a constant outside its range.
    """
    share(deviation, honest)
    variance = honest * deviation**2 * (2 - _UP) - SMOOTH**2
    return math.sqrt(max(variance, 0.0)) / (sensitivity(clip, scale, dimension) * scale) * (2 - _UP)


def opened_distance(honest: int, distance: float) -> float:
    """Return the total-variation distance, per coordinate, of the opened sum from post-processed Gaussian noise.

    ``honest`` draws that are not quite ideal, ``honest - 1`` additions of discrete Gaussians of deviation 8 or more,
    and one smoothing by deviation 2.

    Args:
        honest: Shares that the charged noise consists of.
        distance: ``IntegerGaussian.distance``, of one draw.
    """
    return honest * (distance + float(SMOOTHING)) * _UP


def slack(epsilon: float, steps: int, dimension: int, distance: float) -> float:
    """Return what inexact sampling adds to delta: ``(1 + exp(epsilon)) * steps * dimension * distance``, at most 1.

    Args:
        epsilon: Epsilon of the ideal mechanisms together.
        steps: Steps composed, of all rounds.
        dimension: Coordinates of one step's vector.
        distance: ``opened_distance``, per coordinate.
    """
    factor = math.exp(min(epsilon, 700.0)) + 1
    return min(1.0, factor * steps * dimension * distance * _UP)


def slack_of_draws(epsilon: float, draws: int) -> float:
    """Return what inexact sampling adds to delta at most, whatever the vectors' lengths.

    Args:
        epsilon: Epsilon of the ideal mechanisms together.
        draws: Honest sites' draws on each coordinate, over all steps: ``Reservation.draws``, added up.
    """
    return slack(epsilon, draws, MOST_DIMENSION, opened_distance(1, MOST_DISTANCE))


def least_scale(clip: float, dimension: int) -> float:
    """Return the smallest power of two with ``scale * clip >= 2**10 * sqrt(dimension)``.

    Raises:
        ConfigError: a constant outside its range.
    """
    _check(clip=clip, scale=1.0, dimension=dimension)
    scale = 2.0 ** math.floor(math.log2(FINENESS * math.sqrt(dimension) / clip) - 1)
    while (Fraction(scale) * Fraction(clip)) ** 2 < FINENESS**2 * dimension:
        scale *= 2
    return scale


def check_ring(participants: int, clamp: float, scale: float, deviation: float, ring_bits: int) -> None:
    """Refuse a ring in which the sum of all shares could wrap; it would cost accuracy, privacy it never does.

    A sum of n discrete Gaussians of deviation v exceeds t v sqrt(n) with probability at most 2 exp(-t^2 / 2), as a
    continuous one does: they are sub-Gaussian (Canonne, Kamath & Steinke 2020, "The discrete Gaussian for
    differential privacy"). t = 12 makes it 2**-102 per coordinate.

    Args:
        participants: Sites whose vectors are summed at most.
        clamp: What a coordinate of one site's sum is clamped to before rounding, in the unit of the clip norm.
        scale: Steps of the grid per unit.
        deviation: Of one share, in grid steps.
        ring_bits: Width of the ring.

    Raises:
        ConfigError: with the numbers.
    """
    room = 2 ** (ring_bits - 1) - 1
    noise = NOISE_REACH * deviation * math.sqrt(participants)
    largest = clamp * scale
    signal = participants * math.ceil(largest) if math.isfinite(largest) else math.inf
    if not signal + noise <= room:
        raise ConfigError(
            f"a ring of {ring_bits} bits holds sums up to {room}; {participants} sites clamped to +/-{clamp:g} at "
            f"{scale:g} steps per unit reach {signal:g}, and their noise of deviation {deviation:.6g} steps each "
            f"another {noise:.6g}",
            advice="raise secure_aggregation.ring_bits, or lower the clamp or the steps per unit",
        )


def _check(*, clip: float, scale: float, dimension: int) -> None:
    if not (math.isfinite(clip) and clip > 0 and dimension >= 1):
        raise ConfigError(
            f"no sensitivity for clip norm {clip:g} and {dimension} coordinates",
            advice="the clip norm must be positive and finite",
        )
    if not (math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5):
        raise ConfigError(
            f"{scale:g} steps per unit are no power of two, so scaling would round once more",
            advice="use aggregate.least_scale or a multiple of it by a power of two",
        )
