"""Integer Gaussian noise: independent draws of the discrete Gaussian on Z, with a proven distance from it.

The discrete Gaussian of deviation s gives the integer z a probability proportional to exp(-z^2 / (2 s^2)). A
floating-point generator cannot stand in for it at the deviations that ``trust = "aggregate"`` needs: what its
rounding leaves out can be told apart (Mironov 2012), so the integers come from tables of exact probabilities.

Up to deviation 128 one table holds the whole law. Beyond, two draws x and y of one table of deviation t are combined
as x + k y (Micciancio & Walter 2017, "Gaussian sampling over the integers: efficient, generic, constant-time";
Peikert 2010, "An efficient and parallel Gaussian sampler for lattices", theorem 3.1). With s^2 = t^2 (1 + k^2),

    P(x + k y = z)  is proportional to  exp(-z^2 / (2 s^2)) * sum over y of exp(-(y - c)^2 / (2 r^2)),

c = k z / (1 + k^2) and r = t / sqrt(1 + k^2) = s / (1 + k^2), by completing the square. The sum is the same for all
z up to a factor in 1 +- e, e = 2 exp(-2 pi^2 r^2) + ..., by Poisson's summation formula; r >= 2 makes it 2**-112.

Draws do not take constant time: how often a table's slow threshold is read depends on the draws. Timing by somebody
on the same machine is outside the threat model.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedfuse_shared.errors import ConfigError
from fedfuse_shared.privacy.gaussian_table import FAST_BITS, gaussian_table

LEAST_DEVIATION: Final = 8.0
"""Below it, sums of noise are no longer safely smooth at the scale of one integer."""
MOST_DEVIATION: Final = 2.0**25
"""Above it, the table would need more than 2**18 columns."""
SMOOTHING: Final = Fraction(1, 2**112)
"""Bound on the distance that combining two draws costs, and on smoothing by deviation 2 in general.

With e = 2 * sum over w >= 1 of exp(-2 pi^2 2^2 w^2), which is below 2**-112.9, it is e / (1 - e).
"""
SMOOTH: Final = 2
"""The deviation r, in steps of the lattice, whose smoothing error is ``SMOOTHING``."""

_DIRECT: Final = 128.0  # deviations up to which one table of at most 2**12 columns holds everything
_CHUNK: Final = 2**13  # words drawn at a time: what is copied around stays in a core's own cache


class BitSource(Protocol):
    """Whatever gives uniform, independent, secret 64-bit words: ``noise.NoiseSource``."""

    def words(self, size: int) -> NDArray[np.uint64]:
        """Return ``size`` words, shape ``(size,)``, which the caller may write over."""


class IntegerGaussian:
    """Draws of the discrete Gaussian on Z of one public deviation; its table is made once per process.

    Args:
        deviation: The parameter s above, 8 to 2**25, which is kept exactly. The standard deviation of the ideal
            law is the same up to a share below ``exp(-1000)``.

    Raises:
        ConfigError: a deviation outside that range.
    """

    __slots__ = ("_deviation", "_stride", "_table")

    def __init__(self, deviation: float) -> None:
        deviation = float(deviation)
        if not LEAST_DEVIATION <= deviation <= MOST_DEVIATION:
            raise ConfigError(
                f"integer noise of deviation {deviation:g} steps cannot be drawn, only {LEAST_DEVIATION:g} to "
                f"{MOST_DEVIATION:g}",
                advice="choose a finer grid if it is too small and a coarser one if it is too large",
            )
        self._deviation = deviation
        # The largest k with r = s / (1 + k^2) >= SMOOTH: the smallest table.
        self._stride = math.isqrt(math.floor(deviation / SMOOTH - 1)) if deviation > _DIRECT else 0
        self._table = gaussian_table((1 + self._stride**2) / (2 * Fraction(deviation) ** 2))

    @property
    def deviation(self) -> float:
        """The deviation of the ideal law, exactly the one asked for."""
        return self._deviation

    @property
    def distance(self) -> float:
        """Bound on the total-variation distance of one draw from the ideal law, rounded up."""
        bound = 2 * self._table.distance + SMOOTHING if self._stride else self._table.distance
        return math.nextafter(float(bound), 1.0)

    @property
    def reach(self) -> int:
        """Largest absolute value that can be drawn."""
        return (1 + self._stride) * self._table.reach

    def draw(self, source: BitSource, size: int) -> NDArray[np.int64]:
        """Return ``size`` independent draws, shape ``(size,)``.

        Args:
            source: Where all bits come from; ``NoiseSource.fresh()`` outside tests.
            size: How many.
        """
        drawn = np.empty(size, np.int64)
        if not self._stride:
            for start in range(0, size, 2 * _CHUNK):
                part = drawn[start : start + 2 * _CHUNK]
                part[:] = self._columns(source, (len(part) + 1) // 2)[: len(part)]
                part -= self._table.reach
            return drawn
        for start in range(0, size, _CHUNK):
            part = drawn[start : start + _CHUNK]
            columns = self._columns(source, len(part))
            np.multiply(columns[len(part) :], self._stride, out=part, dtype=np.int64)
            part += columns[: len(part)]
            part -= self.reach
        return drawn

    def _columns(self, source: BitSource, words: int) -> NDArray[np.uint32]:
        """Return two drawn columns of the table per word, ``(2 * words,)``."""
        bits, fast = np.uint32(self._table.bits), self._table.fast
        aliases = np.uint32(2**self._table.bits - 1)
        draw = source.words(words).view(np.uint32)
        column = (draw >> np.uint32(FAST_BITS - self._table.bits)).astype(np.intp)
        entry = fast.take(column)
        # Both now hold 32 - bits bits of draw or threshold, then zeros or an alias: the draw is smaller where its
        # head is, and where the heads are equal, which the slow words decide.
        draw <<= bits
        own = draw < entry
        undecided = draw ^ entry
        if undecided.min() <= aliases:
            ties = np.flatnonzero(undecided <= aliases)
            own[ties] = source.words(ties.size) < self._table.slow[column[ties]]
        entry &= aliases
        np.copyto(entry, column, where=own, casting="unsafe")
        return entry

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._deviation!r})"
