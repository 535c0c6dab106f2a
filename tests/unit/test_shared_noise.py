"""The grid, the clamp and the shares that a server offers, and what a site makes of a sum on that grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.federation import ALL, Federation

from fedfuse_client.shared_round import on_grid, with_share
from fedfuse_server import shared_noise
from fedfuse_server.plan import clip_range, evaluation, resolve, round_privacy
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.evaluation import LEAST_NOISE, EvaluationConfig
from fedfuse_shared.config.federation import RunConfig, SecureAggregationConfig, TrainingConfig
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.config.privacy import PrivacyConfig
from fedfuse_shared.errors import ConfigError, ProtocolError
from fedfuse_shared.offer import RoundPrivacy
from fedfuse_shared.privacy import aggregate
from fedfuse_shared.privacy.integer_noise import SMOOTH
from fedfuse_shared.privacy.noise import NoiseSource
from fedfuse_shared.secagg.bounds import Bounds, choose
from fedfuse_shared.secagg.quantise import as_words, average

MODEL = ModelConfig(classes=("a", "b"), encoders={Modality.TEXT: EncoderConfig(name="hashed-words")})
SCALE = 2.0**14


def config(**changes):
    privacy = {"trust": Trust.AGGREGATE, "noise_multiplier": 3.0, **changes.pop("privacy", {})}
    return RunConfig(**{"model": MODEL, "rounds": 20, "privacy": PrivacyConfig(**privacy), **changes})


def offer(**changes):
    privacy = RoundPrivacy(
        trust=Trust.AGGREGATE,
        sampling_rate=0.25,
        steps=1,
        clip=1.0,
        noise_multiplier=3.0,
        noise_share=3.0 / math.sqrt(2),
        noise_sites=2,
        expected_batch_size=8,
        delta=1e-5,
    )
    return Federation.of(4).offer(**{"privacy": privacy, "scale": SCALE, "clip_range": 32.0, **changes})


# --- the server's side --------------------------------------------------------------------------------------------


def test_the_clamp_of_sums_is_that_of_updates_before_they_are_scaled():
    asked = config(
        privacy={"expected_batch_size": 64},
        training=TrainingConfig(learning_rate=2.0),
        secure_aggregation=SecureAggregationConfig(clip_range=3.0),
    )
    assert shared_noise.clamp(asked) == clip_range(asked) == 3.0 * 64 / 2.0


@pytest.mark.parametrize("sites", [3, 4, 6, 10, 40, 100])
def test_h_is_what_survives_less_what_colludes_and_the_shares_of_h_add_up(sites):
    bounds = choose(sites)
    asked = round_privacy(config(), sites)
    assert asked.noise_sites == shared_noise.honest(bounds) == bounds.min_survivors - bounds.colluders
    assert math.sqrt(asked.noise_sites) * asked.noise_share == pytest.approx(3.0, rel=1e-15)
    assert asked.noise_share < 3.0


def test_the_grid_is_the_coarsest_on_which_rounding_is_small():
    bounds = choose(4)
    assert shared_noise.scale(config(), bounds, 10_000) == aggregate.least_scale(1.0, 10_000) == 2.0**17
    assert shared_noise.scale(config(privacy={"clip": 0.5}), bounds, 10_000) == 2.0**18


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"noise_multiplier": 1e-5}}, "integer noise of deviation"),
        ({"privacy": {"noise_multiplier": 1e4}}, "integer noise of deviation"),
        (
            {"secure_aggregation": SecureAggregationConfig(ring_bits=20)},
            "a ring of 20 bits holds sums up to 524287",
        ),
        ({"secure_aggregation": SecureAggregationConfig(clip_range=1e5)}, "a ring of 32 bits holds"),
        ({"rounds": 100_000, "privacy": {"delta": 1e-9}}, "may add to delta passes what is kept"),
    ],
)
def test_a_grid_that_does_not_fit_is_a_configuration_error(changes, said):
    with pytest.raises(ConfigError, match=said):
        shared_noise.scale(config(**changes), choose(4), 10_000)


def test_a_cap_far_above_what_is_spent_leaves_room_for_the_draws():
    shared_noise.scale(config(privacy={"epsilon": 500.0}), choose(4), 10_000)


@pytest.mark.parametrize("noise", [8.0, 20.0, 1000.0])
@pytest.mark.parametrize("sites", [1, 2, 4, 67])
def test_the_noise_of_h_sites_on_a_count_is_worth_the_one_charged(noise, sites):
    share = shared_noise.count_share(noise, sites)
    assert share >= LEAST_NOISE
    assert sites * share**2 - SMOOTH**2 >= noise**2
    if share > LEAST_NOISE:
        assert sites * share**2 - SMOOTH**2 < noise**2 * (1 + 1e-11)


def test_offers_state_the_share_on_counts():
    asked = resolve(config(evaluation=EvaluationConfig(every=2, noise=30.0)))
    found = evaluation(asked, 6)
    assert (found.noise, found.noise_share) == (30.0, shared_noise.count_share(30.0, 4))
    assert (
        evaluation(asked.model_copy(update={"privacy": PrivacyConfig(noise_multiplier=3.0)}), 6).noise_share
        == 30.0
    )


def test_two_honest_survivors_are_the_fewest():
    with pytest.raises(ConfigError, match="fewer than two honest"):
        Bounds(4, 4, 3, 4).check()


# --- the site's side ----------------------------------------------------------------------------------------------


def test_a_sum_is_clamped_and_rounded_to_the_nearest_step():
    total = np.zeros(200)
    total[:8] = [0.25 / SCALE, 0.75 / SCALE, -0.75 / SCALE, 31.5, 32.0, 32.5, -1e300, 1.0]
    found = on_grid(total, offer())
    assert found.dtype == np.int64
    assert found[:8].tolist() == [0, 1, -1, 31.5 * SCALE, 32 * SCALE, 32 * SCALE, -32 * SCALE, SCALE]
    assert not found[8:].any()


def test_what_is_no_number_counts_as_zero_and_the_rest_stays():
    total = np.ones(200)
    total[:3] = [np.nan, np.inf, -np.inf]
    assert on_grid(total, offer())[:4].tolist() == [0, 32 * SCALE, -32 * SCALE, SCALE]


@given(st.lists(st.floats(-64, 64), min_size=1, max_size=20), st.floats(-1, 1))
def test_neighbours_stay_a_step_of_rounding_apart_at_most(values, added):
    total = np.array(values)
    one, other = on_grid(total, offer()), on_grid(total + added, offer())
    assert np.abs(one - other).max() <= abs(added) * SCALE + 1 + 1e-6


def test_shares_differ_and_none_is_left_out():
    steps = np.arange(200)
    one, other = (with_share(steps, offer(), NoiseSource.fresh()) - steps for _ in range(2))
    assert (one != other).mean() > 0.99
    assert one.any()
    assert other.any()


@pytest.mark.parametrize("bits", [20, 24, 32])
def test_negative_and_large_sums_go_through_the_ring_modulo_its_width(bits):
    asked = offer(ring_bits=bits, scale=1.0)
    numbers = np.zeros(200, np.int64)
    numbers[:5] = [-1, 1, -(2**19), 2**40 + 5, -(2**40) - 5]
    words = as_words(numbers, ALL, asked)
    mask = 2**bits - 1
    assert (words[:5].astype(np.int64) & mask).tolist() == [int(number) & mask for number in numbers[:5]]
    assert words[200:].tolist() == [1, 1]
    # Three sites that say the same: their mean is what they said, where it fits.
    mean, _ = average(words * np.uint32(3), asked, 3)
    assert mean[:2].tolist() == [-1, 1]


def test_a_sum_of_another_length_is_refused():
    with pytest.raises(ProtocolError, match="sum of shape"):
        as_words(np.zeros(199, np.int64), ALL, offer())
