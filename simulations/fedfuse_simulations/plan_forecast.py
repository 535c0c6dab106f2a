"""From what `fedfuse plan` was asked to its findings: settings, calibrated noise, alternatives and a choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress

from fedfuse_server.plan import bounds_for, cohort, grid
from fedfuse_shared.config.base import Trust
from fedfuse_shared.config.federation import RunConfig, ServerOptimizer
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy import accountant
from fedfuse_shared.privacy.calibration import noise_multiplier
from fedfuse_shared.privacy.planning import (
    Forecast,
    Population,
    Schedule,
    alternatives,
    forecast_all,
    noise_of_logit,
    planned_step,
    ranked,
    recommended,
)
from fedfuse_shared.secagg.packing import packed_size
from fedfuse_simulations.plan_population import SEPARATION, Holding, from_folder, from_options, population
from fedfuse_simulations.settings import complete, gather

DEFAULT_CLASSES: Final = 10


@dataclass(frozen=True, slots=True)
class Asked:
    """The command's options."""

    sites: int | None
    records: int | None
    data: Path | None
    classes: int | None
    alignment: float
    file: Path | None
    changes: Mapping[str, object]
    """What options set in the settings, as ``settings.gather`` takes it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A schedule with what belongs to it."""

    found: Forecast
    learning_rate: float | None
    """What to set ``training.learning_rate`` to; none: it is not predicted for this optimiser."""


@dataclass(frozen=True, slots=True)
class Found:
    """All a plan says."""

    config: RunConfig
    holding: Holding
    people: Population
    given: Choice
    given_logit_noise: float | None
    """How far the given schedule's noise moves a logit with the settings' own learning rate."""
    epsilon_pld: float
    epsilon_rdp: float
    choices: tuple[Choice, ...]
    """Every alternative, best first; the given one is among them."""
    best: Choice
    refused: int
    """Alternatives left out because the ring cannot carry their updates."""
    bytes_up: int
    """Bytes of one site's masked vector in a round."""
    unmeasured: tuple[str, ...]
    """Encoders whose alignment is a guess."""
    pinned: bool
    """Whether the settings had a noise multiplier, which was not used."""


def make_plan(asked: Asked, *, quiet: bool) -> Found:
    """Return the findings; a bar on standard error shows the calibrations unless ``quiet``.

    Raises:
        ConfigError: a number is impossible, or no noise reaches epsilon.
        DataError: the data folder cannot be used.
    """
    values = gather(asked.file, asked.changes)
    _check_privacy(values)
    if not (asked.alignment > 0 and math.isfinite(asked.alignment)):
        raise ConfigError(
            f"--alignment {asked.alignment} is not a positive number", advice="1 is as measured"
        )
    holding = _holding(asked)
    config = _settings(values, holding, asked.classes)
    size = cohort(config, holding.sites)
    bounds_for(config, holding.sites, size)
    people = population(holding, config, size)
    parts = tuple(replace(part, cosine=min(1.0, part.cosine * asked.alignment)) for part in people.parts)
    people = replace(people, parts=parts)
    given = _schedule(config)

    def travel(forecast: Forecast) -> float:
        noise = logit_noise(config, people, forecast, planned_rate(config, people, forecast))
        # An adaptive optimiser makes every round's step about as long.
        return forecast.schedule.rounds if noise is None else forecast.budget * noise

    found = _calibrated(config, people, given, quiet=quiet)
    possible = {f.schedule: Choice(f, planned_rate(config, people, f)) for f in found}
    carried = {s: choice for s, choice in possible.items() if s == given or _fits(config, choice, size)}
    order = ranked([choice.found for choice in carried.values()], given)
    mine = carried[given]
    charge = Charge(sampling_rate=given.sampling_rate, noise_multiplier=mine.found.sigma, steps=given.steps)
    tail = len(people.parts)
    dimension = _dimension(config)
    return Found(
        config=config,
        holding=holding,
        people=people,
        given=mine,
        given_logit_noise=logit_noise(config, people, mine.found, config.training.learning_rate),
        epsilon_pld=accountant.epsilon([charge], config.privacy.delta),
        epsilon_rdp=accountant.epsilon_rdp([charge], config.privacy.delta),
        choices=tuple(carried[f.schedule] for f in order),
        best=carried[recommended(order, given, travel).schedule],
        refused=len(possible) - len(carried),
        bytes_up=packed_size(dimension + tail, config.secure_aggregation.ring_bits),
        unmeasured=tuple(e.name for e in config.model.encoders.values() if e.name not in SEPARATION),
        pinned=_pinned(values),
    )


def _check_privacy(values: Mapping[str, Any]) -> None:
    """Refuse what no plan can be made for, in words of the command and before anything heavy is loaded."""
    privacy = values.get("privacy", {})
    if not isinstance(privacy, Mapping):
        return  # the check of the settings names it
    epsilon, trust, rounds = privacy.get("epsilon"), privacy.get("trust"), values.get("rounds")
    if isinstance(epsilon, int | float) and not (epsilon > 0 and math.isfinite(epsilon)):
        raise ConfigError(f"epsilon {epsilon:g} is not a positive number", advice="1 to 10 is usual")
    delta = privacy.get("delta")
    if isinstance(delta, int | float) and not 0 < delta < 1:
        raise ConfigError(f"delta {delta:g} does not lie between 0 and 1", advice="1e-5 is usual")
    if isinstance(rounds, int) and rounds < 1:
        raise ConfigError(f"{rounds} rounds train nothing", advice="plan at least one round")
    if trust == Trust.NONE:
        raise ConfigError(
            'trust = "none" spends no privacy', advice="there is nothing to plan; use --trust site"
        )
    if trust == Trust.AGGREGATE:
        raise ConfigError(
            'trust = "aggregate" is not forecast yet',
            advice="plan with --trust site; shares of h honest sites make the noise sqrt(h) times smaller",
        )


def _holding(asked: Asked) -> Holding:
    if asked.data is None:
        return from_options(asked.sites, asked.records)
    if asked.sites is not None or asked.records is not None:
        raise ConfigError("--data counts sites and records itself", advice="leave out --sites and --records")
    return from_folder(asked.data)


def _pinned(values: Mapping[str, Any]) -> bool:
    privacy = values.get("privacy", {})
    return isinstance(privacy, Mapping) and privacy.get("noise_multiplier") is not None


def _settings(values: Mapping[str, Any], holding: Holding, classes: int | None) -> RunConfig:
    """Return the settings, with the data's classes, or the settings' own, or as many as are asked for."""
    if holding.dataset is not None:
        if classes is not None:
            raise ConfigError("--data counts the classes itself", advice="leave out --classes")
        config = complete(values, holding.dataset.info)
    else:
        model = values.get("model", {})
        named = model.get("classes") if isinstance(model, Mapping) else None
        count = len(named) if isinstance(named, list) else DEFAULT_CLASSES
        count = count if classes is None else classes
        if count < 2:
            raise ConfigError(f"{count} classes leave nothing to learn", advice="give --classes 2 or more")
        # No data set stands behind these names; only their number counts.
        config = complete(values, None)
        names = tuple(str(number) for number in range(count))
        config = config.model_copy(update={"model": config.model.model_copy(update={"classes": names})})
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"noise_multiplier": None})})


def _schedule(config: RunConfig) -> Schedule:
    privacy = config.privacy
    return Schedule(
        config.rounds,
        privacy.steps_per_round,
        privacy.sampling_rate,
        privacy.expected_batch_size,
        privacy.clip,
    )


def _calibrated(config: RunConfig, people: Population, given: Schedule, *, quiet: bool) -> list[Forecast]:
    privacy, console = config.privacy, Console(stderr=True)
    schedules = alternatives(given)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        total = len({(s.sampling_rate, s.steps) for s in schedules})
        task = bar.add_task("calibrating the noise", total=total)

        def calibrate(rate: float, steps: int, near: float | None) -> float:
            sigma = noise_multiplier(privacy.epsilon, privacy.delta, rate, steps, near=near)
            bar.advance(task)
            return sigma

        return list(forecast_all(schedules, people, calibrate))


def _gain(config: RunConfig) -> float | None:
    """Return what the server makes of an update in the end; an adaptive optimiser has no such constant."""
    server = config.aggregation
    if server.optimizer is not ServerOptimizer.FEDAVG:
        return None
    return server.learning_rate / (1 - server.momentum)


def logit_noise(config: RunConfig, people: Population, found: Forecast, rate: float | None) -> float | None:
    """Return how far a schedule's noise moves a logit at a learning rate; none for an adaptive optimiser."""
    gain = _gain(config)
    if gain is None or rate is None:
        return None
    training = config.training.model_copy(update={"learning_rate": rate})
    return noise_of_logit(found, people, step=training.step_size(found.sigma), gain=gain)


def planned_rate(config: RunConfig, people: Population, found: Forecast) -> float | None:
    """Return the learning rate a schedule is predicted with.

    Its largest step is the settings' own, in proportion to the clip: gradients clipped to half are half as long.
    """
    gain = _gain(config)
    if gain is None:
        return None
    largest = config.training.learning_rate * config.privacy.clip / found.schedule.clip
    step = planned_step(found, people, largest=largest, gain=gain)
    # A site shrinks its step where the noise is large (TrainingConfig.step_size); the setting makes up for it.
    return float(f"{step * config.training.learning_rate / config.training.step_size(found.sigma):.3g}")


def _fits(config: RunConfig, choice: Choice, participants: int) -> bool:
    schedule = choice.found.schedule
    privacy = config.privacy.model_copy(
        update={
            "sampling_rate": schedule.sampling_rate,
            "expected_batch_size": schedule.expected_batch_size,
            "clip": schedule.clip,
            "noise_multiplier": choice.found.sigma,
        }
    )
    training = config.training
    if choice.learning_rate is not None:
        training = training.model_copy(update={"learning_rate": choice.learning_rate})
    try:
        grid(config.model_copy(update={"privacy": privacy, "training": training}), participants)
    except ConfigError:
        return False
    return True


def _dimension(config: RunConfig) -> int:
    from fedfuse_shared.models import outline  # noqa: PLC0415 - imports torch

    return sum(segment.size for segment in outline(config.model)[0])
