"""What a schedule's noise leaves of its signal, predicted from public numbers and stated assumptions.

Per step and in expectation, over the cohort's n sites of N records each, with sampling rate q and clip C:

* A record's clipped gradient has norm ``min(C, G)``, G the norm of a gradient before clipping. Modality m takes the
  share ``c`` of that norm and every record's part makes the angle of cosine ``k`` with their mean (``Part``). So the
  sum's part has norm ``n N q p k c min(C, G)``, p being the share of records that have the modality.
* The noise of the sum has deviation ``sigma C sqrt(n)`` on each of the part's d coordinates: norm
  ``sigma C sqrt(n d)``. The ratio of the two is small for every model of many coordinates and does not say whether
  it learns: noise in directions that no record has changes no prediction.
* What a record's prediction feels is the sum along its own gradient: the signal's part along it, ``k`` of the whole,
  against the noise in one direction, ``sigma C sqrt(n)``. This is ``felt``; T steps add up to ``sqrt(T)`` times it.

What is left out: the gradient turns and shrinks as the model learns, classes and sites differ, and the noise of
drawing records. The formulas compare schedules on the same data; they do not predict an accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

NOISE_OF_A_LOGIT: Final = 1.0
"""Deviation by which a schedule's whole noise may move one logit, where the step size is chosen for it.

Measured (bench/README.md): accuracy is flat from about 0.7 to 1.4 and falls on both sides.
"""
TOLERANCE: Final = 0.03
"""Share of the best signal that is given up for fewer rounds: less than what two seeds differ by."""
SHORTER: Final = 0.1
"""Share of the way a model is trained that may be given up for fewer rounds."""

Calibrate = Callable[[float, int, float | None], float]
"""From a sampling rate, a number of steps and a guess to the noise multiplier, at one epsilon and delta."""


def noise_of_site(sigma: float, clip: float, honest: int = 1) -> float:
    """Return the deviation of one site's noise on every coordinate of its clipped sum.

    Args:
        sigma: Noise multiplier that the accounting relies on.
        clip: Clip norm C.
        honest: Sites whose shares make up sigma, h; 1 where every site adds the whole noise.
    """
    return sigma * clip / math.sqrt(honest)


def noise_of_sum(sigma: float, clip: float, sites: int, honest: int = 1) -> float:
    """Return the deviation of the noise on every coordinate of the sum over sites, ``sigma C sqrt(n / h)``."""
    return noise_of_site(sigma, clip, honest) * math.sqrt(sites)


@dataclass(frozen=True, slots=True)
class Part:
    """The coordinates of one modality."""

    name: str
    size: int
    """Coordinates d."""
    share: float
    """Share p of the records that have the modality."""
    cosine: float
    """Assumed cosine k between a record's gradient and the mean gradient, on these coordinates."""
    clip_share: float
    """Share c of a clipped gradient's norm on these coordinates, for a record that has every modality."""


@dataclass(frozen=True, slots=True)
class Population:
    """Whose records are summed."""

    sites: int
    """Sites in a round, n."""
    records: float
    """Training records of a site, N; the mean where sites differ."""
    parts: tuple[Part, ...]
    gradient_norm: float
    """Norm G of a record's gradient before clipping."""
    feature_norm: float
    """Norm of what the last layer sees of a record: how much noise in its weights moves one logit."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The public constants a run's privacy is spent by."""

    rounds: int
    steps_per_round: int
    sampling_rate: float
    expected_batch_size: int
    clip: float

    @property
    def steps(self) -> int:
        """All steps of all rounds, T."""
        return self.rounds * self.steps_per_round


@dataclass(frozen=True, slots=True)
class PartForecast:
    """One modality's part of the summed update, in one step."""

    part: Part
    signal: float
    """Norm of the expected sum of clipped gradients."""
    noise: float
    """Norm of the noise."""
    felt: float
    """Signal over noise along one record's gradient."""

    @property
    def ratio(self) -> float:
        """Signal over noise in norm, ``signal / noise``."""
        return self.signal / self.noise


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a schedule is predicted to give."""

    schedule: Schedule
    sigma: float
    parts: tuple[PartForecast, ...]
    felt: float
    """Signal over noise along the gradient of a record that has every modality, in one step."""

    @property
    def budget(self) -> float:
        """``felt`` over all steps: independent noise adds up as their root, the signal in proportion."""
        return self.felt * math.sqrt(self.schedule.steps)

    def total(self, part: PartForecast) -> float:
        """Return what a record feels of one modality over all steps; below 1 the modality drowns."""
        return part.felt * math.sqrt(self.schedule.steps)


def forecast(schedule: Schedule, sigma: float, population: Population, honest: int = 1) -> Forecast:
    """Return the prediction for a schedule with noise multiplier sigma; ``honest`` as in ``noise_of_sum``."""
    noise = noise_of_sum(sigma, schedule.clip, population.sites, honest)
    summed = population.sites * population.records * schedule.sampling_rate
    norm = min(schedule.clip, population.gradient_norm)
    parts = []
    along = 0.0
    for part in population.parts:
        signal = summed * part.share * part.cosine * part.clip_share * norm
        parts.append(PartForecast(part, signal, noise * math.sqrt(part.size), signal * part.cosine / noise))
        along += signal * part.cosine * part.clip_share
    return Forecast(schedule, sigma, tuple(parts), along / noise)


def noise_of_logit(found: Forecast, population: Population, *, step: float, gain: float) -> float:
    """Return the deviation by which a schedule's whole noise moves one logit.

    Args:
        found: The schedule and its noise; every site adds the whole of it.
        population: Whose records are summed.
        step: Step size of local training.
        gain: What the server makes of an update in the end, its learning rate over one less its momentum.
    """
    schedule = found.schedule
    one = noise_of_sum(found.sigma, schedule.clip, population.sites)
    one /= population.sites * schedule.expected_batch_size
    return step * gain * one * math.sqrt(schedule.steps) * population.feature_norm


def planned_step(found: Forecast, population: Population, *, largest: float, gain: float) -> float:
    """Return the step size at which the noise moves a logit by ``NOISE_OF_A_LOGIT``, and at most ``largest``."""
    return min(largest, NOISE_OF_A_LOGIT / noise_of_logit(found, population, step=1.0, gain=gain))


def alternatives(given: Schedule) -> tuple[Schedule, ...]:
    """Return a schedule and its neighbours: a quarter to double the rounds, half to double q and C.

    The public divisor keeps its proportion to q, so nothing new about a record count is in it.
    """
    found = dict.fromkeys([given])
    for rounds in dict.fromkeys(max(1, given.rounds * f // 4) for f in (4, 2, 1, 8)):
        for rate in dict.fromkeys(min(1.0, given.sampling_rate * f) for f in (1.0, 0.5, 2.0)):
            batch = max(1, round(given.expected_batch_size * rate / given.sampling_rate))
            for clip in (given.clip, given.clip / 2, given.clip * 2):
                found[Schedule(rounds, given.steps_per_round, rate, batch, clip)] = None
    return tuple(found)


def forecast_all(
    schedules: Iterable[Schedule], population: Population, calibrate: Calibrate
) -> Iterator[Forecast]:
    """Yield the prediction for each schedule; those that differ in the clip alone are calibrated once."""
    known: dict[tuple[float, int], float] = {}
    for schedule in schedules:
        key = schedule.sampling_rate, schedule.steps
        if key not in known:
            known[key] = calibrate(*key, _guess(known, *key))
        yield forecast(schedule, known[key], population)


def _guess(known: Mapping[tuple[float, int], float], rate: float, steps: int) -> float | None:
    """Return about what noise a schedule needs: it grows as q and the root of T, more slowly where q T is small."""
    if not known:
        return None
    near = min(known, key=lambda k: abs(math.log(k[0] / rate)) + abs(math.log(k[1] / steps)))
    return known[near] * rate / near[0] * math.sqrt(steps / near[1])


def ranked(found: Sequence[Forecast], given: Schedule) -> list[Forecast]:
    """Return predictions by falling signal budget; ties go to fewer rounds, less sampling, and the given clip."""
    best = max((f.budget for f in found), default=1.0)
    # To a thousandth of the best: what differs by less, as by the last digit of a multiplier, ties.
    return sorted(found, key=lambda f: (-round(f.budget / best, 3), *_cost(f.schedule, given)))


def recommended(found: Sequence[Forecast], given: Schedule, travel: Callable[[Forecast], float]) -> Forecast:
    """Return the cheapest prediction with nearly the best signal that also trains as far as the schedule asked for.

    Args:
        found: Predictions, the given schedule's among them.
        given: The schedule asked for.
        travel: How far a schedule's signal moves predictions, in any unit. Where the step size cannot be raised, a
            few rounds leave a model short however little noise there is.
    """
    enough = (1 - TOLERANCE) * max(f.budget for f in found)
    far = (1 - SHORTER) * next(travel(f) for f in found if f.schedule == given)
    fit = [f for f in found if f.budget >= enough and travel(f) >= far]
    # Nothing both: then the schedule asked for, which at least trains as far as was meant.
    return min(fit or [f for f in found if f.schedule == given], key=lambda f: _cost(f.schedule, given))


def _cost(schedule: Schedule, given: Schedule) -> tuple[int, float, bool, float]:
    return schedule.rounds, schedule.sampling_rate, schedule.clip != given.clip, schedule.clip
