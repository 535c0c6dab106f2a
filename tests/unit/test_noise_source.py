"""Noise, Poisson draws and the grid. False-alarm rates are stated where a test is statistical."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from fedfuse_shared.errors import ConfigError
from fedfuse_shared.privacy.noise import CLIP_MARGIN, NoiseSource


def test_normal_values_have_the_moments_of_a_standard_normal():
    values = NoiseSource.fresh().normal(200_000)
    # Each bound is 7 standard deviations of its statistic: a false alarm once in 10^11 runs.
    assert abs(values.mean()) < 7 / math.sqrt(values.size)
    assert abs(values.var() - 1) < 7 * math.sqrt(2 / values.size)
    assert abs((values**4).mean() - 3) < 7 * math.sqrt(96 / values.size)
    assert abs(np.mean(np.abs(values) > 3) - math.erfc(3 / math.sqrt(2))) < 7 * math.sqrt(
        0.0027 / values.size
    )


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5, 0.9])
def test_each_record_is_drawn_with_the_sampling_rate(rate):
    drawn = NoiseSource.fresh().poisson_mask(200_000, rate)
    assert drawn.dtype == np.bool_
    assert abs(drawn.mean() - rate) < 7 * math.sqrt(rate * (1 - rate) / drawn.size)  # 7 deviations: 10^-11


def test_draws_of_different_records_and_steps_are_uncorrelated():
    source = NoiseSource.fresh()
    first, second = (source.poisson_mask(200_000, 0.5) - 0.5 for _ in range(2))
    for a, b in ((first, second), (first[1:], first[:-1])):
        assert abs(np.mean(a * b)) < 7 * 0.25 / math.sqrt(a.size)  # 7 deviations: 10^-11


def test_a_rate_of_one_draws_everybody_and_no_records_draw_nobody():
    assert NoiseSource.fresh().poisson_mask(1000, 1.0).all()
    assert NoiseSource.fresh().poisson_mask(0, 0.5).shape == (0,)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match="sampling rate"):
        NoiseSource.fresh().poisson_mask(10, rate)


def test_the_noised_sum_has_the_promised_deviation_around_the_sum():
    total = np.linspace(-3, 3, 100_000)
    noise = NoiseSource.fresh().private_sum(total, clip=0.7, multiplier=1.9) - total
    assert abs(noise.mean()) < 7 * 0.7 * 1.9 / math.sqrt(noise.size)
    assert abs(noise.var() / (0.7 * 1.9) ** 2 - 1) < 7 * math.sqrt(2 / noise.size)  # 7 deviations: 10^-11


def test_the_same_key_gives_the_same_stream_and_fresh_sources_never_do():
    a, b = (NoiseSource(bytes(range(16))).normal(100) for _ in range(2))
    assert np.array_equal(a, b)
    assert not np.intersect1d(NoiseSource.fresh().normal(1000), NoiseSource.fresh().normal(1000)).size


@pytest.mark.parametrize("clip", [1.0, 0.3, 7.0, 1e-3])
def test_every_output_lies_on_one_grid_whatever_the_sum(clip):
    grid = 2.0 ** (math.floor(math.log2(clip)) - 32)
    random = np.random.default_rng(1)
    for total in (np.zeros(500), random.normal(size=500) * 1e-9, random.normal(size=500) * 100 * clip):
        out = NoiseSource.fresh().private_sum(total, clip=clip, multiplier=1.3)
        assert np.array_equal(np.rint(out / grid) * grid, out)


def test_rounding_to_the_grid_stays_within_the_margin_of_the_clip_norm():
    total = np.random.default_rng(2).normal(size=2**20)
    same_noise = [
        NoiseSource(bytes(16)).private_sum(part, clip=1.0, multiplier=1.0)
        for part in (total, np.zeros_like(total))
    ]
    moved = np.linalg.norm((same_noise[0] - same_noise[1]) - total)
    assert 0 < moved < CLIP_MARGIN / 4


@pytest.mark.parametrize("precision", [np.float16, np.float32])
def test_a_sum_below_float64_is_refused(precision):
    with pytest.raises(ConfigError, match="sum clipped gradients in float64"):
        NoiseSource.fresh().private_sum(np.zeros(3, precision), clip=1.0, multiplier=1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_a_sum_that_does_not_fit_the_grid_is_clamped_because_refusing_would_tell(bad):
    noised = NoiseSource.fresh().private_sum(np.array([0.0, bad]), clip=1.0, multiplier=1.0)
    assert np.isfinite(noised).all()
    assert abs(noised[1]) <= 2**20 + 100


def test_importing_the_source_loads_no_torch():
    code = "import sys, fedfuse_shared.privacy.noise; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
