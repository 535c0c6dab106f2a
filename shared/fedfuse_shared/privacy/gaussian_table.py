"""Alias tables of the discrete Gaussian on the integers, built and judged by exact arithmetic.

A table draws from {-reach, ..., reach} by Walker's alias method: a column of 2**bits equally likely ones, then the
column's own value or its alias. Every probability is a multiple of 2**-96. Nothing here is floating point: the
Gaussian weights are integers with a proven error, and the table's total-variation distance from the discrete
Gaussian on all of Z is an exact rational upper bound.

Sources: Walker 1977, "An efficient method for generating discrete random variables with general distributions"; Vose
1991, "A linear algorithm for generating random numbers with a given distribution".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

FAST_BITS: Final = 32
"""Bits of a draw that every draw spends: the column and the head of the threshold."""
SLOW_BITS: Final = 64
"""Further bits of the threshold, spent only where the head alone does not decide."""
PRECISION: Final = FAST_BITS + SLOW_BITS
"""Probabilities are multiples of ``2**-PRECISION``."""
REACH: Final = 12
"""Deviations within which a table draws: what lies beyond has probability below 2**-107."""
MAX_BITS: Final = 18
"""Most columns of a table, as a power of two: 3 MiB."""

_WEIGHT_BITS: Final = 192  # fixed point of the Gaussian weights
_EXPONENT_ERROR: Final = 2  # units of 2**-_WEIGHT_BITS by which exp(-exponent) may be too small


@dataclass(frozen=True, eq=False)
class GaussianTable:
    """An alias table whose law is close to the discrete Gaussian of weights ``exp(-exponent * i**2)``, i in Z.

    Attributes:
        bits: A column is drawn by this many bits; column j stands for the value ``j - reach``.
        reach: Largest absolute value that is drawn.
        fast: Per column the first ``32 - bits`` bits of the threshold, then its alias column, ``(2**bits,)``.
        slow: Per column the last 64 bits of the threshold, ``(2**bits,)``.
        distance: Proven bound on the total-variation distance of the table's law from the discrete Gaussian on Z.
    """

    bits: int
    reach: int
    fast: NDArray[np.uint32]
    slow: NDArray[np.uint64]
    distance: Fraction


@lru_cache(maxsize=8)
def gaussian_table(exponent: Fraction) -> GaussianTable:
    """Return the table for weights ``exp(-exponent * i**2)``, that is for deviation ``1 / sqrt(2 * exponent)``.

    Raises:
        ValueError: the deviation lies below 8, or the table would need more than ``2**MAX_BITS`` columns.
    """
    # The smallest integer not below REACH deviations, or one more.
    reach = math.isqrt(math.floor(REACH**2 / (2 * exponent))) + 1
    bits = (2 * reach).bit_length()
    if bits > MAX_BITS:
        raise ValueError(f"a table of reach {reach} needs more than 2**{MAX_BITS} columns")
    weights = gaussian_weights(exponent, reach + 1)
    units = probability_units(weights[:-1])
    own, alias = alias_columns([*units[:0:-1], *units], bits)
    head = np.array([threshold >> SLOW_BITS for threshold in own], np.uint32)
    tail = np.array([threshold & (2**SLOW_BITS - 1) for threshold in own], np.uint64)
    fast = head << np.uint32(bits) | np.array(alias, np.uint32)
    for array in (fast, tail):
        array.setflags(write=False)
    return GaussianTable(bits, reach, fast, tail, table_distance(units, weights, exponent))


def gaussian_weights(exponent: Fraction, last: int) -> list[int]:
    """Return ``exp(-exponent * i**2)`` for i = 0 ... last in units of 2**-192, rounded down.

    None is too large, and weight i too small by at most ``weight_error(i)`` units.

    Raises:
        ValueError: the exponent does not lie in (0, 1/128], where the series below is proven.
    """
    if not 0 < exponent <= Fraction(1, 128):
        raise ValueError("the deviation of a table lies at 8 or above")
    # Taylor's series alternates and falls, so a sum that ends on a negative term lies below exp(-exponent), by less
    # than the next term: 128**-24 / 24! is below 2**-247.
    term = series = Fraction(1)
    for n in range(1, 24):
        term *= -exponent / n
        series += term
    step = math.floor(series * 2**_WEIGHT_BITS)  # too small by less than 2: _EXPONENT_ERROR
    square = step * step >> _WEIGHT_BITS
    weights, weight, ratio = [1 << _WEIGHT_BITS], 1 << _WEIGHT_BITS, step
    for _ in range(last):
        weight = weight * ratio >> _WEIGHT_BITS  # exp(-e i^2) exp(-e (2i+1)) = exp(-e (i+1)^2)
        ratio = ratio * square >> _WEIGHT_BITS
        weights.append(weight)
    return weights


def weight_error(i: int) -> int:
    """Return by how many units of 2**-192 weight i may be too small.

    All factors are at most 1 and truncated downwards, so the errors of a product's factors add up, plus 1. With e for
    that of exp(-exponent): its square has 2e + 1, ratio i has e + i (2e + 2), weight i the sum of (ratio j) + 1
    over j < i, which is (e + 1) i^2.
    """
    return (_EXPONENT_ERROR + 1) * i * i


def probability_units(weights: list[int]) -> list[int]:
    """Return the probabilities of 0, 1, 2, ... in units of 2**-96; negative values mirror them and all add up to 1.

    Args:
        weights: Weights of 0, 1, 2, ...; a value and its mirror image each have that weight.
    """
    total = 2 * sum(weights) - weights[0]
    units = [((weight << PRECISION + 1) + total) // (2 * total) for weight in weights]
    units[0] += 2**PRECISION - (2 * sum(units) - units[0])  # what rounding to the nearest left over or took
    return units


def table_distance(units: list[int], weights: list[int], exponent: Fraction) -> Fraction:
    """Return a bound on the total-variation distance of a symmetric law from the discrete Gaussian on Z.

    It is the exact distance from the law proportional to ``weights``, plus that law's from the ideal: where measures
    satisfy mu <= nu pointwise, normalised they differ by at most (|nu| - |mu|) / |nu| in total variation. That
    mass is what truncation lost and what lies beyond the last value, a series that falls at least geometrically.

    Args:
        units: Probabilities of 0, 1, ..., reach in units of 2**-96.
        weights: ``gaussian_weights(exponent, reach + 1)``.
        exponent: The ideal has weights ``exp(-exponent * i**2)``.
    """
    reach = len(units) - 1
    kept = weights[: reach + 1]
    total = 2 * sum(kept) - kept[0]
    gaps = [abs(unit * total - (weight << PRECISION)) for unit, weight in zip(units, kept, strict=True)]
    rounding = Fraction(2 * sum(gaps) - gaps[0], 2 * total << PRECISION)
    # Each later weight is at most 1 - exponent (2 reach + 3) / 2 times the one before: exp(-x) <= 1 - x / 2, x <= 1.
    fall = min(exponent * (2 * reach + 3), Fraction(1)) / 2
    beyond = 2 * (weights[reach + 1] + weight_error(reach + 1)) / fall
    truncated = 2 * sum(weight_error(i) for i in range(1, reach + 1))
    return rounding + (beyond + truncated) / total


def alias_columns(units: list[int], bits: int) -> tuple[list[int], list[int]]:
    """Return thresholds and aliases of 2**bits columns of 2**(96 - bits) units each, by Vose's algorithm.

    Column j gives j to its first ``own[j]`` units and ``alias[j]`` to the others. A full column is its own alias,
    with threshold 0, so that every threshold is below the column's size.

    Args:
        units: Probabilities in units of 2**-96, which add up to 1; at most ``2**bits`` of them.
        bits: Columns, as a power of two.
    """
    size = 1 << PRECISION - bits
    left = units + [0] * ((1 << bits) - len(units))
    own, alias = [0] * len(left), list(range(len(left)))
    small = [j for j, mass in enumerate(left) if mass < size]
    large = [j for j, mass in enumerate(left) if mass > size]
    while small:
        # Masses are integers that add up to all columns' size: while one is smaller, another is larger.
        poor, rich = small.pop(), large[-1]
        own[poor], alias[poor] = left[poor], rich
        left[rich] += left[poor] - size
        if left[rich] <= size:
            large.pop()
            if left[rich] < size:
                small.append(rich)
    return own, alias
