"""Aggregate mode's arithmetic: sensitivity by worst-case search, shares, what is charged, slack, room in the ring."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from fedfuse_shared.errors import ConfigError
from fedfuse_shared.privacy import aggregate
from fedfuse_shared.privacy.integer_noise import LEAST_DEVIATION, SMOOTH, IntegerGaussian
from fedfuse_shared.privacy.noise import NoiseSource

pytestmark = pytest.mark.slow

RANDOM = 20_240  # seeds of fixed designs, not of noise


def on_grid(records: list[np.ndarray], scale: float, clamp: float = math.inf) -> np.ndarray:
    """What a site computes: one float64 sum, record after record, clamped and rounded once."""
    total = np.zeros_like(records[0])
    for record in records:
        total = total + record
    return np.rint(np.clip(total, -clamp, clamp) * scale).astype(np.int64)


def norm_above(vector) -> float:
    """A clip norm that this vector respects: its L2 norm, rounded up by more than the three roundings can lose."""
    return math.sqrt(math.fsum(x * x for x in vector.tolist())) * (1 + 2.0**-50)


def moved(records, added, scale, clamp=math.inf) -> float:
    """By how much, in L2 and in the clip norm's unit, adding a record in front moves the rounded sum."""
    gap = on_grid([added, *records], scale, clamp) - on_grid(records, scale, clamp)
    return math.sqrt(sum(int(x) ** 2 for x in gap)) / scale


# --- Sensitivity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 17, 300])
@pytest.mark.parametrize("steps", [1, 5, 1024])
def test_rounding_at_its_worst_reaches_the_bound_and_does_not_pass_it(dimension, steps):
    scale = 2.0**16
    # Every coordinate stands just below a boundary, and the record carries it just over the boundary `steps` further.
    before = np.full(dimension, (0.5 - 2.0**-20) / scale)
    record = np.full(dimension, (steps + 2.0**-19) / scale)
    clip = norm_above(record)
    bound = aggregate.sensitivity(clip, scale, dimension)
    found = moved([before], record, scale)
    assert found == pytest.approx((steps + 1) * math.sqrt(dimension) / scale)
    assert 0.999 * bound < found <= bound
    # Removing is the same pair of sums, and either sign.
    assert moved([-before], -record, scale) == found
    assert found > clip * (1 + 1e-6), "the clip norm alone is no bound"
    halves = clip + math.sqrt(dimension) / (2 * scale)
    assert steps == 1024 or found > halves, "half a step per coordinate is the bound of rounding every record"


def test_searching_for_a_worse_record_never_passes_the_bound():
    random = np.random.default_rng(RANDOM)
    closest = 0.0
    for _ in range(3000):
        dimension = int(random.integers(1, 300))
        scale = 2.0 ** random.integers(-3, 20)
        clip = float(2.0 ** random.uniform(-2, 8) * math.sqrt(dimension) / scale)
        record = random.normal(size=dimension) * (random.random(dimension) < random.choice([0.05, 0.5, 1.0]))
        if not record.any():
            continue
        if random.random() < 0.7:  # whole steps and a little: the most that a boundary can make of it
            record = np.sign(record) * np.floor(np.abs(record) * clip * scale / np.linalg.norm(record))
            record += np.sign(record) * 1e-6
            record /= scale
        record *= min(1.0, clip / max(norm_above(record), 1e-300) * (1 - 1e-15))
        clip_held = norm_above(record) <= clip
        assert clip_held
        # Coordinates of the others' sum at boundaries, on the side from which the record pushes them over.
        whole = random.integers(-5, 6, size=dimension)
        others = (whole + np.where(record >= 0, 0.5, -0.5) * (1 - 1e-6)) / scale
        found = moved([others], record, scale, clamp=float(random.choice([math.inf, 3 / scale, 100 / scale])))
        bound = aggregate.sensitivity(clip, scale, dimension)
        assert found <= bound
        closest = max(closest, found / bound)
    assert closest > 0.85, "the search comes close, so it would notice a bound that is too small"


def test_climbing_towards_a_worse_pair_never_passes_the_bound():
    random = np.random.default_rng(RANDOM + 1)
    for dimension, scale in itertools.product((1, 3, 40), (1.0, 2.0**10)):
        clip = 1.7 * math.sqrt(dimension) / scale
        bound = aggregate.sensitivity(clip, scale, dimension)
        others = random.normal(size=dimension) / scale
        record = random.normal(size=dimension)
        record *= clip * (1 - 1e-12) / np.linalg.norm(record)
        best = moved([others], record, scale)
        for _ in range(1500):
            other = others + random.normal(size=dimension) * random.choice([0.01, 0.3]) / scale
            change = record + random.normal(size=dimension) * random.choice([0.01, 0.3]) / scale
            change *= clip * (1 - 1e-12) / np.linalg.norm(change)
            found = moved([other], change, scale)
            assert found <= bound
            if found >= best:
                best, others, record = found, other, change
        assert best > 0.6 * bound


def test_summation_in_float64_moves_the_sum_and_stays_within_the_bound():
    # A grid so fine that rounding to it is nothing: what is left is float64 losing small records behind a large one.
    scale, clip, n = 2.0**60, 1.0, 4096
    small = [np.array([-(2.0**-54)])] * (n - 1)
    found = moved(small, np.array([1.0]), scale)
    assert found > clip, "summation error is real: the clip norm alone is no bound"
    assert found <= aggregate.sensitivity(clip, scale, 1, records=n)
    # The same with errors of random sign and growing partial sums, in several dimensions.
    random = np.random.default_rng(RANDOM + 2)
    for dimension in (1, 10, 100):
        records = list(random.normal(size=(n - 1, dimension)))
        records = [r / norm_above(r) * (1 - 1e-12) for r in records]
        if dimension == 1:
            records = [np.abs(r) * random.uniform(0.9, 1) for r in records]
        for added in records[:3]:
            assert moved(records, added, 2.0**40) <= aggregate.sensitivity(1.0, 2.0**40, dimension, records=n)


@pytest.mark.parametrize("dimension", [1, 8])
@pytest.mark.parametrize("n", [2, 100, 4096])
def test_the_error_of_a_float64_sum_is_within_the_share_of_the_bound_it_has(dimension, n):
    random = np.random.default_rng(RANDOM + n)
    designs = [
        random.normal(size=(n, dimension)),
        np.abs(random.normal(size=(n, dimension))),
        np.where(np.arange(n)[:, None] == 0, 1.0, 2.0**-53) * np.ones((n, dimension)),
        np.full((n, dimension), 1 / 3),
    ]
    for design in designs:
        records = [r / norm_above(r) * (1 - 1e-12) if r.any() else r for r in design]
        total = np.zeros(dimension)
        for record in records:
            total = total + record
        exact = [sum(Fraction(float(record[j])) for record in records) for j in range(dimension)]
        missed = math.sqrt(sum((Fraction(float(t)) - e) ** 2 for t, e in zip(total, exact, strict=True)))
        share_of_one_sum = (aggregate.sensitivity(1.0, 2.0**900, dimension, records=n) - 1) / 2
        assert missed <= share_of_one_sum


@pytest.mark.parametrize("dimension", [1, 100, 10**4, 10**6, 10**8])
@pytest.mark.parametrize("clip", [1e-3, 0.7, 1.0, 30.0])
def test_the_least_scale_keeps_the_sensitivity_within_a_part_in_eight_hundred(dimension, clip):
    scale = aggregate.least_scale(clip, dimension)
    assert math.frexp(scale)[0] == 0.5
    exact = (Fraction(scale) * Fraction(clip)) ** 2
    assert exact >= 2**20 * dimension > exact / 4, "a power of two, and the smallest"
    assert 1 < aggregate.sensitivity(clip, scale, dimension) / clip < 1 + 1 / 800


def test_sensitivity_grows_with_clip_norm_dimension_and_records_and_falls_with_scale():
    assert aggregate.sensitivity(1.0, 2.0**10, 100) < aggregate.sensitivity(1.1, 2.0**10, 100)
    assert aggregate.sensitivity(1.0, 2.0**10, 100) < aggregate.sensitivity(1.0, 2.0**10, 101)
    assert aggregate.sensitivity(1.0, 2.0**11, 100) < aggregate.sensitivity(1.0, 2.0**10, 100)
    assert aggregate.sensitivity(1.0, 2.0**10, 100, 2**10) < aggregate.sensitivity(1.0, 2.0**10, 100, 2**20)
    # What the docstring states for the most records: 2**-12 of the clip norm.
    assert aggregate.sensitivity(1.0, 2.0**500, 100) == pytest.approx(1 + 2.0**-12, rel=1e-9)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_that_is_none_is_refused(clip):
    for call in (lambda: aggregate.sensitivity(clip, 1.0, 3), lambda: aggregate.least_scale(clip, 3)):
        with pytest.raises(ConfigError, match="positive and finite"):
            call()


@pytest.mark.parametrize("clip", [5e-324, 1e-300, 1e307])
def test_a_clip_norm_without_a_grid_is_refused(clip):
    with pytest.raises(ConfigError, match="no grid of float64 fits"):
        aggregate.least_scale(clip, 10)


@pytest.mark.parametrize("scale", [0.0, 3.0, 1000.0, -2.0, math.nan, math.inf])
def test_a_scale_that_would_round_once_more_is_refused(scale):
    with pytest.raises(ConfigError, match="power of two"):
        aggregate.sensitivity(1.0, scale, 3)


@pytest.mark.parametrize("records", [0, 2**20 + 1])
def test_more_records_than_the_bound_covers_are_refused(records):
    with pytest.raises(ConfigError, match="sampling rate"):
        aggregate.sensitivity(1.0, 1.0, 3, records=records)


# --- Shares and what is charged ----------------------------------------------------------------------------------


def test_enough_shares_add_up_to_the_charged_noise_after_smoothing_and_no_less():
    random = np.random.default_rng(RANDOM + 3)
    checked = 0
    for _ in range(2000):
        dimension, honest = int(10 ** random.uniform(0, 8)), int(random.integers(1, 200))
        clip, sigma = 10 ** random.uniform(-3, 2), 10 ** random.uniform(-1.5, 2)
        scale = aggregate.least_scale(clip, dimension) * 2.0 ** random.integers(-9, 4)
        deviation = aggregate.share_deviation(sigma, honest, clip, scale, dimension)
        if deviation < LEAST_DEVIATION:
            continue
        checked += 1
        step = Fraction(aggregate.sensitivity(clip, scale, dimension)) * Fraction(scale)
        wanted = (Fraction(sigma) * step) ** 2
        given = honest * Fraction(deviation) ** 2 - SMOOTH**2
        # Every share makes up for smoothing on its own, which is needed once only.
        assert wanted <= given - (honest - 1) * SMOOTH**2 < wanted * (1 + Fraction(1, 10**12))
        charged = aggregate.charged_sigma(deviation, honest, clip, scale, dimension)
        assert sigma <= charged
        assert (Fraction(charged) * step) ** 2 <= given, "never more than there is"
        alone = aggregate.charged_sigma(deviation, 1, clip, scale, dimension)
        assert aggregate.share(sigma, honest) <= alone < aggregate.share(sigma, honest) * (1 + 1e-12)
    assert checked > 1000


def test_a_site_alone_keeps_its_own_share():
    clip, dimension = 1.0, 10_000
    scale = aggregate.least_scale(clip, dimension)
    deviation = aggregate.share_deviation(3.97, 4, clip, scale, dimension)
    alone = aggregate.charged_sigma(deviation, 1, clip, scale, dimension)
    assert aggregate.share(3.97, 4) <= alone < aggregate.share(3.97, 4) * (1 + 1e-12)
    assert aggregate.share(3.97, 4) == 3.97 / 2


def test_noise_that_smoothing_takes_is_not_charged():
    assert aggregate.charged_sigma(1.9, 1, 1.0, 1.0, 1) == 0
    assert aggregate.charged_sigma(8.0, 1, 1.0, 1.0, 1) < aggregate.charged_sigma(8.0, 2, 1.0, 1.0, 1)


@pytest.mark.parametrize(("sigma", "honest"), [(0.0, 3), (-1.0, 3), (math.nan, 3), (1.0, 0), (math.inf, 1)])
def test_noise_that_cannot_be_shared_is_refused(sigma, honest):
    with pytest.raises(ConfigError, match="min_survivors"):
        aggregate.share(sigma, honest)


def test_shares_really_drawn_add_up_to_the_charged_deviation():
    clip, dimension, honest, sigma = 0.5, 200_000, 5, 1.7
    scale = aggregate.least_scale(clip, dimension)
    sampler = IntegerGaussian(aggregate.share_deviation(sigma, honest, clip, scale, dimension))
    total = sum(sampler.draw(NoiseSource.fresh(), dimension) for _ in range(honest))
    unit = total / (sigma * aggregate.sensitivity(clip, scale, dimension) * scale)
    assert abs(unit.mean()) < 7 / math.sqrt(dimension)
    assert abs(unit.var() - 1) < 7 * math.sqrt(2 / dimension)  # 7 deviations: 10^-11


# --- Privacy of the opened sum, by brute force -------------------------------------------------------------------


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    """The smallest delta at which p and q are indistinguishable by epsilon, in one direction."""
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


@pytest.mark.parametrize("rate", [1.0, 0.25])
@pytest.mark.parametrize(("deviation", "honest", "shift"), [(8, 1, 3), (8, 1, 12), (8, 3, 20), (30, 2, 41)])
def test_the_opened_integers_are_no_less_private_than_the_gaussian_that_is_charged(
    deviation, honest, shift, rate
):
    """One coordinate; the record moves it by `shift`. Both directions, with and without Poisson sampling."""
    reach = 40 * deviation
    law = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * deviation**2))
    total = law / law.sum()
    for _ in range(honest - 1):
        total = np.convolve(total, law / law.sum(), mode="same")
    # The Gaussian mechanism that charged_sigma(deviation, honest, ...) names, on a fine lattice of outputs.
    variance = honest * deviation**2 - SMOOTH**2
    fine = np.arange(-reach, reach, 1 / 50)
    density = np.exp(-(fine**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance) / 50
    moved_density = np.exp(-((fine - shift) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance) / 50
    without, added = total, (1 - rate) * total + rate * np.roll(total, shift)
    ideal_without, ideal_added = density, (1 - rate) * density + rate * moved_density
    for epsilon in (0.05, 0.3, 1.0, 2.0):
        pairs = (
            ((without, added), (ideal_without, ideal_added)),
            ((added, without), (ideal_added, ideal_without)),
        )
        for real, ideal in pairs:
            assert hockey_stick(*real, epsilon) <= hockey_stick(*ideal, epsilon) + 1e-9
        # A record that moves the sum a tenth further than was charged is noticed.
        further = (1 - rate) * total + rate * np.roll(total, math.ceil(1.1 * shift))
        if hockey_stick(ideal_added, ideal_without, epsilon) > 1e-6 and honest * deviation > 8:
            assert hockey_stick(further, without, epsilon) > hockey_stick(ideal_added, ideal_without, epsilon)


def test_charging_as_if_smoothing_were_free_is_close_but_more_than_the_proof_gives():
    scale, deviation = 1.0, 8.0
    proven = aggregate.charged_sigma(deviation, 1, 1.0, scale, 1)
    naive = deviation / (aggregate.sensitivity(1.0, scale, 1) * scale)
    assert 0.96 < proven / naive < 0.97  # sqrt(1 - 4 / 64)
    assert aggregate.charged_sigma(8192.0, 1, 1.0, scale, 1) / (1024 * naive) > 1 - 1e-7


# --- Slack -------------------------------------------------------------------------------------------------------


def test_slack_is_what_two_perturbed_laws_can_lose_and_is_reached():
    """P, Q at (epsilon, delta); P', Q' within t of them are at (epsilon, delta + (1 + e^epsilon) t), and no less."""
    epsilon, t = 0.7, 0.01
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    delta = hockey_stick(p, q, epsilon)
    assert delta > 0
    worst_p, worst_q = p + t * np.array([1, 0, -1]), q - t * np.array([1, 0, -1])
    found = hockey_stick(worst_p, worst_q, epsilon)
    assert found == pytest.approx(delta + aggregate.slack(epsilon, 1, 1, t))
    random = np.random.default_rng(RANDOM + 4)
    for _ in range(500):
        p_near, q_near = (law + t * (random.dirichlet([1] * 3) - random.dirichlet([1] * 3)) for law in (p, q))
        assert hockey_stick(p_near, q_near, epsilon) <= delta + aggregate.slack(epsilon, 1, 1, t) + 1e-15


def test_slack_grows_with_everything_and_is_at_most_one():
    base = aggregate.slack(1.0, 10, 100, 2.0**-80)
    assert base == pytest.approx((1 + math.e) * 1000 * 2.0**-80, rel=1e-12, abs=0)
    assert base >= (1 + math.e) * 1000 * 2.0**-80
    for larger in ((1.1, 10, 100, 2.0**-80), (1.0, 11, 100, 2.0**-80), (1.0, 10, 101, 2.0**-80)):
        assert aggregate.slack(*larger) > base
    assert aggregate.slack(1.0, 10, 100, 2.0**-79) == pytest.approx(2 * base, abs=0)
    assert aggregate.slack(1e9, 1, 1, 2.0**-80) == 1
    assert aggregate.slack(math.inf, 1, 1, 2.0**-80) == 1


def test_the_opened_sum_is_charged_for_every_honest_share():
    one = IntegerGaussian(1e6).distance
    assert aggregate.opened_distance(1, one) > one
    assert aggregate.opened_distance(6, one) == pytest.approx(6 * one, rel=1e-6, abs=0)


def test_slack_is_nothing_beside_a_usual_delta():
    distance = aggregate.opened_distance(50, IntegerGaussian(2.0**24).distance)
    assert aggregate.slack(8.0, 10_000, 10**6, distance) < 1e-9


# --- Room in the ring --------------------------------------------------------------------------------------------


def test_a_ring_is_accepted_up_to_its_last_step_and_refused_beyond():
    participants, clamp, scale, deviation = 4, 8.0, 2.0**16, 1000.0
    needed = participants * 8 * 2**16 + 12 * deviation * math.sqrt(participants)
    bits = math.ceil(math.log2(needed + 1)) + 1
    aggregate.check_ring(participants, clamp, scale, deviation, bits)
    with pytest.raises(ConfigError, match="ring_bits") as refusal:
        aggregate.check_ring(participants, clamp, scale, deviation, bits - 1)
    for figure in (str(2 ** (bits - 2) - 1), "4 sites", "+/-8", "65536", "2.09715e+06", "1000", "24000"):
        assert figure in str(refusal.value)
    # By noise alone, by clamps alone, and one more site.
    for change in ((4, 8.0, scale, 1e6, bits), (4, 16.0, scale, deviation, bits), (8, 8.0, scale, 1e3, bits)):
        with pytest.raises(ConfigError):
            aggregate.check_ring(*change)


@pytest.mark.parametrize(
    ("clamp", "deviation"), [(math.inf, 10.0), (math.nan, 10.0), (1.0, math.inf), (1.0, math.nan)]
)
def test_sums_without_a_bound_are_refused(clamp, deviation):
    with pytest.raises(ConfigError):
        aggregate.check_ring(3, clamp, 1.0, deviation, 32)


def test_sums_in_an_accepted_ring_do_not_wrap():
    participants, clamp, scale, deviation, bits = 5, 1.0, 1000.0, 500.0, 16
    aggregate.check_ring(participants, clamp, scale, deviation, bits)
    noise = sum(IntegerGaussian(deviation).draw(NoiseSource.fresh(), 100_000) for _ in range(participants))
    assert np.abs(noise + participants * 1000).max() < 2 ** (bits - 1)  # at the clamp; beyond: below 2**-80


@pytest.mark.parametrize("t", [1.0, 3.0, 6.0])
def test_sums_of_discrete_gaussians_have_the_tails_the_ring_counts_on(t):
    for deviation, honest in ((8, 1), (8, 4), (20, 9)):
        whole = deviation * math.sqrt(honest)
        values = np.arange(-math.ceil(40 * whole), math.ceil(40 * whole) + 1)
        law = np.exp(-(values**2) / (2 * whole**2))
        tail = law[np.abs(values) >= t * whole].sum() / law.sum()
        assert tail <= 2 * math.exp(-t * t / 2)
    assert 2 * math.exp(-(aggregate.NOISE_REACH**2) / 2) < 2.0**-102
