"""Statistics of the noise that sites add: its distribution, its lattice, and that no draw has to do with another.

Every test draws afresh and states the rate at which it would raise a false alarm: ``ALARM`` = 1e-9 per decision
unless it says otherwise. There are fewer than 300 decisions in this file, so all of it together raises one in less
than 1e-6 of its runs (union bound). Sample sizes are fixed, nothing is repeated until it fits. A p-value that is
asymptotic has to fall below ``ROUGH``, a hundred times less, because such values are good to a small factor only.

What the tests would see is shown beside them: the same decisions go red on noise that is 3 % off, on a float sum that
was not put on the grid, and on noise that is used twice.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedfuse_client.data.cells import Record
from fedfuse_client.data.tensors import RecordTensors
from fedfuse_client.training import PrivateOptimizer, train_round
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import TrainingConfig
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.models import build_model
from fedfuse_shared.offer import RoundPrivacy
from fedfuse_shared.privacy.noise import NoiseSource

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ALARM = 1e-9
ROUGH = ALARM / 100
CLIP, MULTIPLIER = 0.7, 1.3
DEVIATION = CLIP * MULTIPLIER
GRID = 2.0**-33  # of a clip norm in [0.5, 1)
SIZE = 200_000
MODEL = ModelConfig(
    classes=("a", "b", "c"), encoders={Modality.TEXT: EncoderConfig(name="hashed-words", width=2048)}
)


def noise(source: NoiseSource | None = None, size: int = SIZE) -> np.ndarray:
    """Return what the real source adds to a sum of zeros."""
    source = source or NoiseSource.fresh()
    return source.private_sum(np.zeros(size), clip=CLIP, multiplier=MULTIPLIER)


def steps_of(count: int, source: NoiseSource, optimizer_batch: int = 16) -> list[np.ndarray]:
    """Return the noise in the gradient of several steps of the whole optimiser, none of which drew a record."""
    model = build_model(MODEL, 0)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        clip=CLIP,
        multiplier=MULTIPLIER,
        batch=optimizer_batch,
        noise=source,
    )
    found = []
    for _ in range(count):
        optimizer.step()
        grads = torch.cat([parameter.grad.flatten() for parameter in optimizer.params])
        found.append(grads.to(torch.float64).numpy() * optimizer_batch)
    return found


def round_of(records: int = 0, rate: float = 1.0) -> np.ndarray:
    """Return a round's update as a site computes it, in units of the noise's deviation."""
    privacy = RoundPrivacy(
        trust=Trust.SITE,
        sampling_rate=rate,
        steps=1,
        clip=CLIP,
        noise_multiplier=MULTIPLIER,
        noise_share=MULTIPLIER,
        noise_sites=1,
        expected_batch_size=16,
        delta=1e-5,
    )
    rows = [Record(n + 2, f"r{n}", "here", "train", n % 3, f"word{n}", None, None) for n in range(records)]
    update = train_round(
        build_model(MODEL, 0),
        RecordTensors(Path("/nonexistent"), rows, MODEL),
        privacy=privacy,
        training=TrainingConfig(learning_rate=1.0),
        noise=NoiseSource.fresh(),
        microbatch=8,
    )
    return update.astype(np.float64) * 16 / DEVIATION


# --- decisions ---------------------------------------------------------------------------------------------------


def is_normal(values: np.ndarray, deviation: float) -> bool:
    """Decide four times whether values are independent N(0, deviation^2).

    Kolmogorov-Smirnov; chi-square of bins of equal probability, 200 values or more in each; the exact chi-square
    interval of the variance; and the counts beyond 3 and 4.5 deviations, exact binomial.
    """
    scaled = values / deviation
    if stats.kstest(scaled, "norm").pvalue < ROUGH:
        return False
    bins = min(1000, scaled.size // 200)
    counts = np.bincount((stats.norm.cdf(scaled) * bins).astype(int).clip(0, bins - 1), minlength=bins)
    if stats.chisquare(counts).pvalue < ROUGH:
        return False
    if (
        not stats.chi2.ppf(ALARM / 2, scaled.size)
        < np.sum(scaled**2)
        < stats.chi2.isf(ALARM / 2, scaled.size)
    ):
        return False
    return all(
        stats.binomtest(int((np.abs(scaled) > bound).sum()), scaled.size, 2 * stats.norm.sf(bound)).pvalue
        > ALARM / 2
        for bound in (3.0, 4.5)
    )


def are_independent(one: np.ndarray, other: np.ndarray) -> bool:
    """Decide three times whether paired normal values have nothing to do with each other.

    Their correlation (exact for normal values), the correlation of their sizes (which sees a common scale or sign
    flips), and a chi-square of a 16 by 16 table of where both fall.
    """
    if stats.pearsonr(one, other).pvalue < ALARM:
        return False
    if stats.spearmanr(np.abs(one), np.abs(other)).pvalue < ROUGH:
        return False
    places = [(stats.rankdata(each) - 1) * 16 // each.size for each in (one, other)]
    table = np.histogram2d(*places, bins=16)[0]
    return bool(stats.chi2_contingency(table).pvalue > ROUGH)


def low_bits_are_uniform(noised: np.ndarray, bits: int = 8) -> bool:
    """Decide whether the last bits of a noised sum, in steps of the grid, are uniform: chi-square of 256 bins.

    The noise is 2^32 steps wide, so of any sum they are uniform but for less than one part in 2^64.
    """
    counts = np.bincount((np.rint(noised / GRID).astype(np.int64) % 2**bits).astype(int), minlength=2**bits)
    return bool(stats.chisquare(counts).pvalue > ROUGH)


# --- distribution ------------------------------------------------------------------------------------------------


def test_the_noise_of_a_sum_is_normal():
    """Five decisions of 1e-9."""
    assert is_normal(noise(), DEVIATION)


def test_three_per_cent_less_noise_would_be_noticed():
    assert not is_normal(0.97 * noise(), DEVIATION)


@pytest.mark.parametrize("centre", [0.3, -20.0])
def test_the_noise_is_the_same_whatever_the_sum(centre):
    """Five decisions of 1e-9 for each sum."""
    total = np.full(SIZE, centre)
    noised = NoiseSource.fresh().private_sum(total, clip=CLIP, multiplier=MULTIPLIER)
    assert is_normal(noised - total, DEVIATION)


def test_the_noise_of_the_whole_optimiser_is_normal():
    """Thirty steps of 6147 weights: five decisions of 1e-9, and five of every weight group together."""
    found = np.concatenate(steps_of(30, NoiseSource.fresh()))
    assert found.size > 180_000
    assert is_normal(found, DEVIATION)


def test_the_noise_of_a_round_is_normal_beside_records():
    """Differences of rounds that draw the same records, all of them, are noise alone: five decisions of 1e-9."""
    values = np.concatenate([round_of(20) - round_of(20) for _ in range(15)])
    assert is_normal(values, 2**0.5)


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_every_record_is_drawn_as_often_and_on_its_own(rate):
    """Of 2000 records over 100 steps: totals are binomial, and so is every record's count and every step's.

    Three decisions: an exact binomial test of all draws (1e-9); of the record and of the step with the most extreme
    count, exact binomial with Bonferroni over 2000 and 100 (1e-9 each).
    """
    source = NoiseSource.fresh()
    drawn = np.array([source.poisson_mask(2000, rate) for _ in range(100)])
    assert stats.binomtest(int(drawn.sum()), drawn.size, rate).pvalue > ALARM
    for axis in (0, 1):
        counts, trials = drawn.sum(axis=axis), drawn.shape[axis]
        least = stats.binom.cdf(counts, trials, rate).min()
        most = stats.binom.sf(counts - 1, trials, rate).min()
        assert min(least, most) > ALARM / (2 * counts.size)


def test_draws_and_noise_of_one_stream_are_independent():
    """Who is drawn says nothing about the noise that follows: normal beside drawn and beside others, 1e-9 each."""
    source = NoiseSource.fresh()
    drawn = source.poisson_mask(SIZE, 0.5)
    values = noise(source)
    assert stats.ks_2samp(values[drawn], values[~drawn]).pvalue > ROUGH
    assert stats.ks_2samp(np.abs(values[drawn]), np.abs(values[~drawn])).pvalue > ROUGH


# --- lattice -----------------------------------------------------------------------------------------------------

SUMS = {
    "zeros": np.zeros(SIZE),
    "a third of a step off": np.full(SIZE, GRID / 3),
    "off the grid": np.linspace(-3, 3, SIZE) * np.pi,
    "tiny": np.full(SIZE, 1e-30),
    "large": np.full(SIZE, 1000.1),
}


@pytest.mark.parametrize("total", SUMS.values(), ids=SUMS)
def test_every_output_lies_on_the_grid_and_its_low_bits_do_not_depend_on_the_sum(total):
    """Being on the grid is no matter of chance; one decision of 1e-9 on the low bits."""
    noised = NoiseSource.fresh().private_sum(total, clip=CLIP, multiplier=MULTIPLIER)
    assert np.array_equal(np.rint(noised / GRID) * GRID, noised)
    assert low_bits_are_uniform(noised)


def test_the_sum_moves_the_output_by_whole_steps_of_the_grid():
    """Under the same noise two sums give outputs that differ by exactly the difference of the rounded sums."""
    for total in SUMS.values():
        moved, still = (
            NoiseSource(bytes(range(16))).private_sum(each, clip=CLIP, multiplier=MULTIPLIER)
            for each in (total, np.zeros(SIZE))
        )
        assert np.array_equal(moved - still, np.rint(total / GRID) * GRID)


def test_a_plain_float_sum_would_betray_itself():
    """What the lattice is for (Mironov 2012): without it, whether a value can come up depends on the sum."""
    naive = NoiseSource.fresh().normal(SIZE) * DEVIATION + 1000.1
    assert not np.array_equal(np.rint(naive / GRID) * GRID, naive)
    assert not low_bits_are_uniform(NoiseSource.fresh().normal(SIZE).astype(np.float32).astype(np.float64))


def test_the_gradient_of_the_whole_optimiser_comes_from_the_grid():
    """Before it is divided and rounded to float32, nothing but the noised sum on the grid enters it."""

    class Keeping(NoiseSource):
        def private_sum(self, total, *, clip, multiplier):
            kept.append(super().private_sum(total, clip=clip, multiplier=multiplier))
            return kept[-1]

    kept: list[np.ndarray] = []
    (found,) = steps_of(1, Keeping(bytes(16)))
    sums = np.concatenate([each.flatten() for each in kept])
    assert np.array_equal(np.rint(sums / GRID) * GRID, sums)
    assert np.array_equal((sums / 16).astype(np.float32).astype(np.float64) * 16, found)


# --- independence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 2048, 6147])
def test_coordinates_are_independent(lag):
    """Three decisions of 1e-9 for each distance."""
    values = noise()
    assert are_independent(values[lag:], values[:-lag])


def test_noise_used_twice_would_be_noticed():
    values, fresh = noise(), noise()
    for again in (values, -values, 0.05 * values + fresh, np.abs(values) * np.sign(fresh)):
        assert not are_independent(values, again)


def test_steps_of_the_whole_optimiser_are_independent():
    """All pairs of eight steps joined, 28 times 6147 values in pairs: three decisions of 1e-9.

    Each pair of steps also on its own (84 decisions of 1e-9): noise that comes again in some later step alone.
    """
    steps = steps_of(8, NoiseSource.fresh())
    pairs = list(itertools.combinations(steps, 2))
    assert all(are_independent(one, other) for one, other in pairs)
    assert not any(np.intersect1d(one, other).size > 20 for one, other in pairs)


def test_rounds_of_one_site_are_independent():
    """Five rounds, ten pairs: thirty decisions of 1e-9."""
    for one, other in itertools.combinations([round_of() for _ in range(5)], 2):
        assert are_independent(one, other)


def test_sites_in_one_process_are_independent():
    """Two sources side by side, in turn: three decisions of 1e-9."""
    sources = NoiseSource.fresh(), NoiseSource.fresh()
    turns = [[noise(source, SIZE // 4) for source in sources] for _ in range(4)]
    one, other = (np.concatenate(each) for each in zip(*turns, strict=True))
    assert are_independent(one, other)


def test_sites_in_processes_with_the_same_seeds_are_independent():
    """Two processes that start alike, with every seed and the hash seed set: three decisions of 1e-9."""
    code = (
        "import random, sys, numpy as np; random.seed(0); np.random.seed(0)\n"
        "from fedfuse_shared.privacy.noise import NoiseSource\n"
        f"values = NoiseSource.fresh().private_sum(np.zeros({SIZE}), clip={CLIP}, multiplier={MULTIPLIER})\n"
        "sys.stdout.buffer.write(values.tobytes())"
    )
    environment = {"PYTHONHASHSEED": "0", "PYTHONPATH": ":".join(filter(None, sys.path))}
    one, other = (
        np.frombuffer(
            subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, check=True
            ).stdout
        )
        for _ in "ab"
    )
    assert one.size == other.size == SIZE
    assert are_independent(one, other)


@pytest.mark.parametrize("records", [0, 30])
def test_rounds_under_the_same_seeds_are_independent(records):
    """Whole rounds under the same seeds of torch, numpy and Python.

    All of them draw all records, so that differences are noise alone; noise that follows a seed would cancel in them.
    Five decisions of 1e-9 for each of two differences, three for the two together.
    """
    updates = []
    for _ in range(4):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - what user code might do
        random.seed(0)
        updates.append(round_of(records))
    one, other = updates[0] - updates[1], updates[2] - updates[3]
    assert is_normal(one, 2**0.5)
    assert is_normal(other, 2**0.5)
    assert are_independent(one, other)
