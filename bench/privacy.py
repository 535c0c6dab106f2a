"""Noise: the integer sampler of aggregate mode against floating-point noise of the same generator."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from fedfuse_shared.privacy.integer_noise import IntegerGaussian
from fedfuse_shared.privacy.noise import NoiseSource

Pair = tuple[Callable[[], object], Callable[[], object]]

DRAWS = 1_000_000
DEVIATION = 1e6
"""Of a share in grid steps: six digits are usual, and two table draws a coordinate are the slower path."""


def integers_against_floats() -> Pair:
    """A million integers of deviation 10^6, against as many float64 normals of the same AES generator."""
    source, sampler = NoiseSource.fresh(), IntegerGaussian(DEVIATION)
    return lambda: sampler.draw(source, DRAWS), lambda: source.normal(DRAWS)


def millions_a_second() -> float:
    """Millions of integers per second on one core, the median of eleven draws of a million each."""
    source, sampler = NoiseSource.fresh(), IntegerGaussian(DEVIATION)
    sampler.draw(source, DRAWS)
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        sampler.draw(source, DRAWS)
        seconds.append(time.perf_counter() - started)
    return DRAWS / 1e6 / statistics.median(seconds)
