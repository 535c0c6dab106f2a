"""Noise and Poisson draws that nobody can predict or repeat.

Every bit comes from AES-128 in counter mode (``randomgen.AESCounter``) under a key from ``os.urandom``; no seed of
torch, numpy or Python reaches it. The key is the privacy of the round: it is not shown, copied, pickled, or carried
into a forked process.

The clipped sum and the noise are rounded to one public power-of-two grid before they are added, so every output is a
multiple of the grid whatever the sum was, and the addition itself is exact: the low bits of a floating-point result
cannot betray the sum (Mironov 2012, "On significance of the least significant bits for differential privacy").
"""

from __future__ import annotations

import math
import os
from typing import Final, NoReturn, Self

import numpy as np
from numpy.typing import NDArray
from randomgen import AESCounter

from fedfuse_shared.errors import ConfigError, StateError

CLIP_MARGIN: Final = 2.0**-16
"""Share of the clip norm kept for rounding: records are clipped to ``clip * (1 - CLIP_MARGIN)``.

Rounding the sum to the grid moves it by at most ``sqrt(d) * grid / 2 <= 2**-19 clip`` for ``d <= 2**28``; the rest
covers float32 arithmetic of the clip factor and float64 summation of up to ``2**20`` records.
"""

_GRID_BITS: Final = 32  # grid steps per unit of clip, as a power of two
_EXACT: Final = 2.0**52  # below it, float64 adds and keeps multiples of the grid exactly


class NoiseSource:
    """A stream of Gaussian noise and Poisson draws for one process.

    Args:
        key: 16 secret bytes; use :meth:`fresh` outside tests of reproducibility.
    """

    __slots__ = ("_bits", "_generator", "_process")

    def __init__(self, key: bytes) -> None:
        if len(key) != 16:
            raise ValueError("an AES-128 key has 16 bytes")
        self._bits = AESCounter(key=int.from_bytes(key, "little"))
        self._generator = np.random.Generator(self._bits)
        self._process = os.getpid()

    @classmethod
    def fresh(cls) -> Self:
        """Return a source under a key from the operating system that nothing else has."""
        return cls(os.urandom(16))

    def normal(self, size: int) -> NDArray[np.float64]:
        """Return ``size`` independent standard normal values, shape ``(size,)``."""
        self._check_process()
        return self._generator.standard_normal(size)

    def poisson_mask(self, n: int, q: float) -> NDArray[np.bool_]:
        """Return which of ``n`` records a step draws, each with probability q rounded down to 64 bits, ``(n,)``."""
        self._check_process()
        if not 0 < q <= 1:
            raise ValueError("a sampling rate lies in (0, 1]")
        if q == 1:
            return np.ones(n, dtype=np.bool_)
        draws = self._generator.integers(0, 2**64, size=n, dtype=np.uint64)
        return draws < np.uint64(math.floor(q * 2**64))

    def words(self, size: int) -> NDArray[np.uint64]:
        """Return ``size`` independent uniform 64-bit words, shape ``(size,)``; the caller may write over them."""
        self._check_process()
        words: NDArray[np.uint64] = self._bits.random_raw(size)
        return words

    def private_sum(
        self, total: NDArray[np.float64], *, clip: float, multiplier: float
    ) -> NDArray[np.float64]:
        """Return a sum of clipped vectors plus Gaussian noise of deviation ``multiplier * clip`` on every coordinate.

        Args:
            total: Sum of vectors of L2 norm at most ``clip * (1 - CLIP_MARGIN)``, shape ``(d,)``.
            clip: Clip norm C, public.
            multiplier: Noise multiplier, public.

        Raises:
            ConfigError: a precision below float64.
        """
        if total.dtype != np.float64:
            raise ConfigError(
                f"noise cannot be added safely in {total.dtype}", advice="sum clipped gradients in float64"
            )
        grid = 2.0 ** (math.floor(math.log2(clip)) - _GRID_BITS)
        exact = _EXACT * grid
        noise = self.normal(total.size).reshape(total.shape) * (multiplier * clip)
        # Clamped, not refused: whether a sum is large depends on records. Clamping moves no two sums further apart.
        total = np.where(np.isnan(total), 0.0, total)
        for values in (total, noise):
            np.clip(values, -exact, exact, out=values)
            np.divide(values, grid, out=values)
            np.rint(values, out=values)
        # In steps of the grid both are integers of at most 2**52, so that this adds and scales without rounding.
        total += noise
        total *= grid
        return total

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise StateError(
                "a noise source was carried into another process, where it would repeat itself",
                advice="make a fresh one after forking",
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, state withheld>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse pickling and copying: both would repeat noise.

        Raises:
            TypeError: always.
        """
        raise TypeError("a noise source cannot be copied or pickled; make a fresh one")
