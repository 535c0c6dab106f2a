"""The mathematics of a plan: its noise against the noise that is added, its ranking, what it may never get wrong."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedfuse_client.gradients import Dense
from fedfuse_client.training import PrivateOptimizer
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy.accountant import epsilon
from fedfuse_shared.privacy.calibration import noise_multiplier
from fedfuse_shared.privacy.noise import NoiseSource
from fedfuse_shared.privacy.planning import (
    NOISE_OF_A_LOGIT,
    TOLERANCE,
    Part,
    Population,
    Schedule,
    alternatives,
    forecast,
    forecast_all,
    noise_of_logit,
    noise_of_site,
    noise_of_sum,
    planned_step,
    ranked,
    recommended,
)

pytestmark = pytest.mark.slow

GIVEN = Schedule(rounds=40, steps_per_round=1, sampling_rate=0.5, expected_batch_size=128, clip=1.0)


def people(**changes):
    parts = (Part("text", 2000, 0.75, 0.05, 0.3), Part("image", 500, 0.9, 0.14, 0.6))
    return Population(
        **{"sites": 6, "records": 300.0, "parts": parts, "gradient_norm": 3.0, "feature_norm": 3.2} | changes
    )


def rough(rate, steps, near=None):
    """A multiplier that behaves like a calibrated one: more for more sampling and for more steps."""
    return math.sqrt(0.5 + 80 * rate**2 * steps)


def everything(given=GIVEN, population=None):
    return list(forecast_all(alternatives(given), population or people(), rough))


def far(_):
    """Every schedule trains as far as every other."""
    return 1.0


class Site:
    """One site's real optimiser over the parts of a population, with a batch of gradients of a chosen mean."""

    def __init__(self, sizes, *, clip, sigma):
        self.parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
        sgd = torch.optim.SGD(self.parameters, lr=1.0)
        self.optimizer = PrivateOptimizer(
            sgd, clip=clip, multiplier=sigma, batch=1, noise=NoiseSource.fresh()
        )

    def noised_sum(self, gradients=()):
        if gradients:
            rows = [torch.as_tensor(g, dtype=torch.float32) for g in gradients]
            counted = torch.ones(len(rows[0]), dtype=torch.bool)
            self.optimizer.clip_and_accumulate([Dense(r) for r in rows], counted)
        self.optimizer.add_noise()
        return [p.grad.numpy().astype(np.float64) for p in self.parameters]


def test_the_noise_of_a_part_is_that_of_a_sum_drawn_by_the_real_optimiser():
    population, sigma, schedule = people(), 3.0, replace(GIVEN, clip=0.5)
    found = forecast(schedule, sigma, population)
    sizes = [part.size for part in population.parts]
    summed = [Site(sizes, clip=0.5, sigma=sigma).noised_sum() for _ in range(population.sites)]
    for index, part in enumerate(found.parts):
        drawn = np.linalg.norm(sum(site[index] for site in summed))
        # The norm of d normal values has a relative deviation of 1 / sqrt(2 d).
        assert drawn == pytest.approx(part.noise, rel=6 / math.sqrt(2 * part.part.size))
    one = Site([20_000], clip=0.5, sigma=sigma).noised_sum()[0]
    assert one.std() == pytest.approx(noise_of_site(sigma, 0.5), rel=6 / math.sqrt(40_000))


def test_signal_and_what_a_record_feels_are_those_of_gradients_with_the_assumed_cosine():
    """Records whose gradients have the assumed geometry go through the real optimiser without noise to speak of."""
    generator = np.random.default_rng(1)
    records, size, cosine = 400, 3000, 0.3
    along = np.zeros(size)
    along[0] = 1.0
    aside = generator.normal(size=(records, size))
    aside[:, 0] = 0.0
    aside -= aside.mean(axis=0)  # what a record shares with others is all along the mean
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    gradients = 5.0 * (cosine * along + math.sqrt(1 - cosine**2) * aside)
    part = Part("image", size, 1.0, cosine, 1.0)
    population = people(sites=1, records=float(records), parts=(part,), gradient_norm=5.0)
    found = forecast(replace(GIVEN, sampling_rate=1.0, clip=2.0), 1e-6, population)
    (total,) = Site([size], clip=2.0, sigma=1e-6).noised_sum([gradients])
    assert np.linalg.norm(total) == pytest.approx(found.parts[0].signal, rel=0.02)
    felt = np.mean(gradients @ total / np.linalg.norm(gradients, axis=1)) / noise_of_sum(1e-6, 2.0, 1)
    assert felt == pytest.approx(found.parts[0].felt, rel=0.02)
    assert found.felt == pytest.approx(found.parts[0].felt)


def test_shared_noise_takes_its_whole_multiplier_from_the_honest_sites():
    assert noise_of_sum(4.0, 0.5, sites=9) == pytest.approx(6.0)
    assert noise_of_sum(4.0, 0.5, sites=9, honest=9) == pytest.approx(
        2.0
    )  # sigma C: what central noise would be
    shares = [noise_of_site(4.0, 0.5, honest=9)] * 9
    assert math.sqrt(sum(s**2 for s in shares)) == pytest.approx(noise_of_sum(4.0, 0.5, sites=9, honest=9))
    alone, shared = (forecast(GIVEN, 4.0, people(), honest=h) for h in (1, 4))
    assert shared.budget == pytest.approx(2 * alone.budget)


@pytest.mark.parametrize("field", ["sites", "records"])
def test_more_sites_and_more_records_leave_more_signal(field):
    budgets = [forecast(GIVEN, 4.0, people(**{field: value})).budget for value in (3, 10, 100)]
    assert all(low < high for low, high in pairwise(budgets))
    power = math.log(budgets[2] / budgets[1]) / math.log(10)
    assert power == pytest.approx(0.5 if field == "sites" else 1.0)


def test_more_noise_leaves_less_and_a_clip_above_the_gradients_only_adds_noise():
    assert forecast(GIVEN, 4.0, people()).budget > forecast(GIVEN, 5.0, people()).budget
    budgets = [
        forecast(replace(GIVEN, clip=clip), 4.0, people()).budget for clip in (0.1, 1.0, 3.0, 6.0, 12.0)
    ]
    assert budgets[0] == pytest.approx(budgets[1]) == pytest.approx(budgets[2])
    assert budgets[2] == pytest.approx(2 * budgets[3]) == pytest.approx(4 * budgets[4])


def test_the_parts_of_a_record_add_up_to_what_it_feels():
    population = people()
    found = forecast(GIVEN, 4.0, population)
    whole = sum(p.felt * p.part.clip_share for p in found.parts)
    assert found.felt == pytest.approx(whole)
    assert found.budget == pytest.approx(found.felt * math.sqrt(40))


@pytest.mark.slow
@pytest.mark.parametrize("target", [1.0, 3.0])
def test_no_alternative_costs_more_than_the_epsilon_asked_for(target):
    given = replace(GIVEN, rounds=8)
    found = list(
        forecast_all(
            alternatives(given), people(), lambda q, t, near: noise_multiplier(target, 1e-5, q, t, near=near)
        )
    )
    assert len(found) > 20
    for one in found:
        s = one.schedule
        charge = Charge(sampling_rate=s.sampling_rate, noise_multiplier=one.sigma, steps=s.steps)
        assert 0.99 * target < epsilon([charge], 1e-5) <= target


def test_schedules_that_differ_in_the_clip_alone_are_calibrated_once():
    asked = []

    def calibrate(rate, steps, near):
        asked.append((rate, steps))
        return rough(rate, steps)

    found = list(forecast_all(alternatives(GIVEN), people(), calibrate))
    assert len(asked) == len(set(asked)) == 12
    assert len(found) == 36


def test_the_schedule_asked_for_is_among_its_alternatives_and_the_divisor_goes_with_q():
    assert alternatives(GIVEN)[0] == GIVEN
    for schedule in alternatives(GIVEN):
        assert schedule.expected_batch_size / schedule.sampling_rate == pytest.approx(256)
    assert all(0 < s.sampling_rate <= 1 for s in alternatives(replace(GIVEN, sampling_rate=0.9)))
    small = alternatives(Schedule(1, 1, 1e-6, 1, 1.0))
    assert all(s.rounds >= 1 and s.expected_batch_size >= 1 for s in small)


def test_the_ranking_does_not_depend_on_the_order_or_on_rounding_errors():
    found = everything()
    order = ranked(found, GIVEN)
    shaken = [replace(f, felt=f.felt * (1 + 1e-13 * (-1) ** i)) for i, f in enumerate(found)]
    assert [f.schedule for f in ranked(found[::-1], GIVEN)] == [f.schedule for f in order]
    assert [f.schedule for f in ranked(shaken, GIVEN)] == [f.schedule for f in order]
    assert recommended(found[::-1], GIVEN, far) == recommended(found, GIVEN, far)


def test_the_ranking_does_not_depend_on_what_is_assumed_of_the_gradients():
    harder = people(parts=(Part("text", 2000, 0.75, 0.01, 0.3), Part("image", 500, 0.9, 0.07, 0.6)))
    assert [f.schedule for f in ranked(everything(), GIVEN)] == [
        f.schedule for f in ranked(everything(population=harder), GIVEN)
    ]


def test_the_recommended_schedule_is_near_the_best_and_none_that_is_near_is_cheaper():
    found = everything()
    best, chosen = ranked(found, GIVEN)[0], recommended(found, GIVEN, far)
    assert chosen.budget >= (1 - TOLERANCE) * best.budget
    near = [f for f in found if f.budget >= (1 - TOLERANCE) * best.budget]
    assert chosen.schedule.rounds == min(f.schedule.rounds for f in near)
    assert chosen.schedule.clip == GIVEN.clip


def test_a_schedule_that_leaves_the_model_short_is_not_recommended():
    found = everything()
    short = recommended(found, GIVEN, far).schedule.rounds
    assert short < GIVEN.rounds
    chosen = recommended(found, GIVEN, lambda f: f.schedule.rounds)  # as where no step can be any longer
    assert chosen.schedule.rounds >= GIVEN.rounds
    assert recommended(found, GIVEN, lambda f: float(f.schedule == GIVEN)).schedule == GIVEN


def test_the_planned_step_moves_a_logit_as_far_as_it_says_and_never_more():
    population = people()
    found = forecast(GIVEN, 12.0, population)
    step = planned_step(found, population, largest=100.0, gain=2.0)
    assert noise_of_logit(found, population, step=step, gain=2.0) == pytest.approx(NOISE_OF_A_LOGIT)
    assert planned_step(found, population, largest=step / 3, gain=2.0) == step / 3


def test_the_noise_of_a_logit_is_that_of_real_rounds_of_noise():
    """Noise alone through the real optimiser and a server without momentum, read by one feature vector."""
    population, sigma = people(sites=3, feature_norm=2.0), 3.0
    schedule = Schedule(rounds=5, steps_per_round=2, sampling_rate=0.5, expected_batch_size=1, clip=0.5)
    found = forecast(schedule, sigma, population)
    width, logits = 50, 4000
    sites = [Site([logits * width], clip=0.5, sigma=sigma) for _ in range(3)]
    weights = np.zeros(logits * width)
    for _ in range(schedule.rounds):
        for site in sites:
            for _ in range(schedule.steps_per_round):
                weights -= 0.1 * site.noised_sum()[0] / len(sites)
    features = np.random.default_rng(2).normal(size=width)
    features *= population.feature_norm / np.linalg.norm(features)
    moved = weights.reshape(logits, width) @ features
    assert moved.std() == pytest.approx(
        noise_of_logit(found, population, step=0.1, gain=1.0), rel=6 / math.sqrt(2 * logits)
    )
