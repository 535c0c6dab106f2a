"""From settings to offers."""

import pytest
from support.federation import Federation

from fedfuse_server.plan import Plan, bounds_for, grid, plan_hash, resolve, round_privacy
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import (
    GraphKind,
    PerformanceConfig,
    RunConfig,
    SecureAggregationConfig,
    TrainingConfig,
)
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.config.privacy import PrivacyConfig
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.offer import Segment
from fedfuse_shared.privacy.accountant import epsilon

MODEL = ModelConfig(classes=("a", "b"), encoders={Modality.TEXT: EncoderConfig(name="hashed-words")})


def config(**changes):
    return RunConfig(**{"model": MODEL, "rounds": 20, **changes})


def test_the_noise_fits_the_planned_rounds_and_not_one_per_cent_less_would():
    settled = resolve(config(privacy=PrivacyConfig(epsilon=2.0, steps_per_round=2)))
    sigma = settled.privacy.noise_multiplier

    def cost(noise):
        return epsilon([Charge(sampling_rate=0.5, noise_multiplier=noise, steps=40)], 1e-5)

    assert cost(sigma) <= 2.0 < cost(0.99 * sigma)


def test_a_given_noise_multiplier_is_kept():
    assert resolve(config(privacy=PrivacyConfig(noise_multiplier=3.0))).privacy.noise_multiplier == 3.0


def test_shared_noise_is_sized_for_those_who_are_sure_to_be_honest():
    settled = resolve(config(privacy=PrivacyConfig(trust=Trust.AGGREGATE, noise_multiplier=3.0)))
    asked = round_privacy(settled, 6)
    bounds = bounds_for(settled, 6, 6)
    assert asked.noise_sites == bounds.min_survivors - bounds.colluders == 4
    assert asked.noise_share == pytest.approx(1.5)
    assert round_privacy(settled, 100).noise_sites == 67 - 33


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": PrivacyConfig(trust=Trust.AGGREGATE, steps_per_round=2)}, "2 local steps"),
        (
            {
                "privacy": PrivacyConfig(trust=Trust.AGGREGATE),
                "secure_aggregation": SecureAggregationConfig(graph=GraphKind.SPARSE),
            },
            "on a sparse graph",
        ),
    ],
)
def test_what_shared_noise_cannot_be_accounted_with_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        resolve(config(**changes))


def test_the_plan_a_policy_pins_changes_with_training_and_privacy_and_not_with_performance():
    given = PrivacyConfig(noise_multiplier=3.0)
    base = plan_hash(config(privacy=given), 6)
    assert plan_hash(config(privacy=given, performance=PerformanceConfig(threads=7)), 6) == base
    assert plan_hash(config(privacy=given, training=TrainingConfig(learning_rate=0.1)), 6) != base
    assert plan_hash(config(privacy=PrivacyConfig(clip=2.0, noise_multiplier=3.0)), 6) != base


def test_an_offer_is_within_bounds_and_its_sum_cannot_wrap():
    federation = Federation.of(7)
    settled = config(privacy=PrivacyConfig(noise_multiplier=3.0))
    plan = Plan("run", settled, federation.roster, (Segment(name="head", size=10),))
    offer = plan.offer(number=1, attempt=1, model_hash="0" * 64, participants=federation.names)
    assert 2 * offer.threshold > 7 + offer.colluders
    assert 7 * offer.clip_range * offer.scale < 2**31
    assert offer.privacy.noise_share == offer.privacy.noise_multiplier == 3.0
    assert offer.privacy.noise_sites == 1


def test_bounds_that_do_not_fit_are_told_with_the_numbers():
    federation = Federation.of(5)
    secure = SecureAggregationConfig(threshold=3, colluders=1)
    settled = config(privacy=PrivacyConfig(noise_multiplier=3.0), secure_aggregation=secure)
    plan = Plan("run", settled, federation.roster, (Segment(name="head", size=10),))
    with pytest.raises(ConfigError, match="threshold 3 is too low for 5 participants and 1 colluders"):
        plan.offer(number=1, attempt=1, model_hash="0" * 64, participants=federation.names)


@pytest.mark.parametrize("sites", [3, 4, 6, 10, 40])
def test_bounds_do_not_get_weaker_when_sites_stay_away(sites):
    settled = config()
    full = bounds_for(settled, sites, sites)
    for left in range(full.min_survivors, sites):
        fewer = bounds_for(settled, sites, left)
        assert fewer.colluders == full.colluders
        assert fewer.min_survivors == full.min_survivors
        assert 2 * fewer.threshold > left + fewer.colluders
    if full.min_survivors > 3:
        with pytest.raises(ConfigError):
            bounds_for(settled, sites, full.min_survivors - 1)


def test_a_sparse_graph_is_computed_for_whoever_is_there():
    secure = SecureAggregationConfig(graph=GraphKind.SPARSE)
    settled = config(secure_aggregation=secure)
    full = bounds_for(settled, 1000, 1000)
    assert (full.neighbours, full.threshold, full.colluders, full.min_survivors) == (34, 18, 50, 950)
    fewer = bounds_for(settled, 1000, 960)
    assert (fewer.colluders, fewer.min_survivors) == (50, 950)
    fewer.check()
    with pytest.raises(ConfigError):
        bounds_for(settled, 1000, 940)


def test_more_than_a_hundred_sites_need_a_sparse_graph_and_its_threshold_is_not_set_by_hand():
    with pytest.raises(ConfigError, match=r'see secure_aggregation\.graph = "sparse"'):
        bounds_for(config(), 101, 101)
    secure = SecureAggregationConfig(graph=GraphKind.SPARSE, threshold=5)
    with pytest.raises(ConfigError, match="is computed"):
        bounds_for(config(secure_aggregation=secure), 1000, 1000)


def test_a_ring_too_coarse_for_the_noise_is_refused():
    settled = config(
        privacy=PrivacyConfig(noise_multiplier=3.0), secure_aggregation=SecureAggregationConfig(ring_bits=16)
    )
    assert grid(settled, 6) == 1024.0
    with pytest.raises(ConfigError, match="16 bits leaves 64 steps per unit"):
        grid(settled, 100)
    assert grid(
        settled.model_copy(update={"privacy": PrivacyConfig(trust=Trust.NONE, noise_multiplier=1e-6)}), 100
    )


def test_secrets_may_not_be_erased_before_a_round_can_be_over():
    with pytest.raises(ConfigError, match="at least 3600"):
        resolve(
            config(
                performance=PerformanceConfig(exchange_timeout=720.0),
                secure_aggregation=SecureAggregationConfig(lifetime=3599),
            )
        )
