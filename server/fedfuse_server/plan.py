"""From settings to offers: the noise, the bounds and the grid every round of a run is proposed with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedfuse_server import shared_noise
from fedfuse_shared.config.base import Trust
from fedfuse_shared.config.evaluation import LEAST_NOISE
from fedfuse_shared.config.federation import GraphKind, RunConfig, SecureAggregationConfig
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.ledger.records import gaussian
from fedfuse_shared.offer import Evaluation, Offer, RoundPrivacy, Segment
from fedfuse_shared.offer import plan_hash as offered_plan
from fedfuse_shared.privacy.accountant import usable_delta
from fedfuse_shared.privacy.aggregate import share
from fedfuse_shared.privacy.calibration import noise_beside, noise_multiplier
from fedfuse_shared.roster import Roster
from fedfuse_shared.secagg.bounds import Bounds, choose
from fedfuse_shared.secagg.ring import check_rounding, largest_scale
from fedfuse_shared.secagg.sparse import choose_graph

NO_NOISE = 1e-6
"""Noise multiplier of ``trust = "none"``: too small to protect anything, and accounted as infinite epsilon."""

EXCHANGES = 5
"""Exchanges of one attempt, each bounded by ``performance.exchange_timeout``."""


def resolve(config: RunConfig) -> RunConfig:
    """Return the settings with the noise multiplier filled in for the planned rounds.

    Every site is accounted as if it took part in every round: which sites are drawn is the server's choice and
    earns no amplification.

    Raises:
        ConfigError: the settings contradict each other, or no noise reaches the target.
    """
    secure, patience = config.secure_aggregation, config.performance.exchange_timeout
    if secure.lifetime < EXCHANGES * patience:
        raise ConfigError(
            f"sites erase a round's secrets after {secure.lifetime} s, its {EXCHANGES} exchanges may take "
            f"{EXCHANGES * patience:g} s",
            advice=f"set secure_aggregation.lifetime to at least {math.ceil(EXCHANGES * patience)}",
        )
    if config.privacy.trust is Trust.NONE:
        if config.evaluation.every is not None and config.evaluation.noise is None:
            raise ConfigError(
                "without a guarantee there is no epsilon to take evaluation.share of",
                advice=f"set evaluation.noise, {LEAST_NOISE:g} or more",
            )
        privacy = config.privacy.model_copy(update={"noise_multiplier": NO_NOISE})
        return config.model_copy(update={"privacy": privacy})
    if config.privacy.trust is Trust.AGGREGATE:
        shared_noise.check(config)
    config = _with_evaluation(config)
    if config.privacy.noise_multiplier is not None:
        return config
    privacy = config.privacy
    delta = _usable_delta(config)
    steps = config.rounds * privacy.steps_per_round
    counted = config.evaluation.count(config.rounds)
    if counted and config.evaluation.noise is not None:
        beside = [gaussian(config.evaluation.noise)] * counted
        sigma = noise_beside(beside, privacy.epsilon, delta, privacy.sampling_rate, steps)
    else:
        sigma = noise_multiplier(privacy.epsilon, delta, privacy.sampling_rate, steps)
    return config.model_copy(update={"privacy": privacy.model_copy(update={"noise_multiplier": sigma})})


def _with_evaluation(config: RunConfig) -> RunConfig:
    """Return the settings with the noise on evaluation counts filled in, if there is any evaluation."""
    asked, privacy = config.evaluation, config.privacy
    if asked.every is None or asked.noise is not None:
        return config
    planned = asked.count(config.rounds)
    if not planned:
        raise ConfigError(
            f"{config.rounds} rounds end before the first evaluation, in round {asked.every + 1}",
            advice="lower evaluation.every or leave it out",
        )
    delta = _usable_delta(config)
    found = noise_beside([], asked.share * privacy.epsilon, delta, sampling_rate=1.0, steps=planned)
    noise = max(LEAST_NOISE, found)
    return config.model_copy(update={"evaluation": asked.model_copy(update={"noise": noise})})


def _usable_delta(config: RunConfig) -> float:
    integers = config.privacy.trust is Trust.AGGREGATE or config.evaluation.every is not None
    return usable_delta(config.privacy.delta, shared=integers)


def evaluation(config: RunConfig, sites: int) -> Evaluation | None:
    """Return what offers of a run among enrolled sites say of evaluation.

    Raises:
        ConfigError: the noise on counts is not set, or too little.
    """
    asked = config.evaluation
    if asked.every is None:
        return None
    if asked.noise is None or asked.noise < LEAST_NOISE:
        raise ConfigError(
            f"evaluation.noise is {asked.noise}, at least {LEAST_NOISE:g} is needed",
            advice="leave it out: it is calibrated for evaluation.share",
        )
    share = asked.noise
    if config.privacy.trust is Trust.AGGREGATE:
        share = shared_noise.count_share(asked.noise, _honest(config, sites))
    return Evaluation(every=asked.every, detail=asked.detail, noise=asked.noise, noise_share=share)


def _honest(config: RunConfig, sites: int) -> int:
    # The same in every round: bounds keep colluders and survivors when sites stay away.
    return shared_noise.honest(bounds_for(config, sites, cohort(config, sites)))


def clip_range(config: RunConfig) -> float:
    """Return what a coordinate of a site's vector is clamped to."""
    shared = config.privacy.trust is Trust.AGGREGATE
    return shared_noise.clamp(config) if shared else config.secure_aggregation.clip_range


def plan_hash(config: RunConfig, sites: int) -> str:
    """Return the hash by which a site's policy pins the offers of a run among enrolled sites (hexadecimal).

    Raises:
        ConfigError: the noise multiplier is not set.
    """
    return offered_plan(
        config.federation,
        config.model,
        config.training,
        round_privacy(config, sites),
        clip_range(config),
        evaluation(config, sites),
    )


def round_privacy(config: RunConfig, sites: int) -> RoundPrivacy:
    """Return the privacy constants every offer of a run among enrolled sites carries.

    Raises:
        ConfigError: the noise multiplier is not set.
    """
    privacy = config.privacy
    if privacy.noise_multiplier is None:
        raise ConfigError("the noise multiplier is not set", advice="resolve the settings before planning")
    noise_sites = _honest(config, sites) if privacy.trust is Trust.AGGREGATE else 1
    return RoundPrivacy(
        trust=privacy.trust,
        sampling_rate=privacy.sampling_rate,
        steps=privacy.steps_per_round,
        clip=privacy.clip,
        noise_multiplier=privacy.noise_multiplier,
        noise_share=share(privacy.noise_multiplier, noise_sites),
        noise_sites=noise_sites,
        expected_batch_size=privacy.expected_batch_size,
        delta=privacy.delta,
    )


def cohort(config: RunConfig, sites: int) -> int:
    """Return how many sites take part in a round while all are willing."""
    return min(config.sites_per_round or sites, sites)


def bounds_for(config: RunConfig, sites: int, participants: int) -> Bounds:
    """Return the secure-aggregation bounds of a round, which do not get weaker when sites stay away.

    Args:
        config: The run's settings.
        sites: Enrolled sites.
        participants: Sites in this round; fewer than the cohort when some refused or were left out.

    Raises:
        ConfigError: the configured bounds do not fit.
    """
    wanted = config.secure_aggregation
    size = cohort(config, sites)
    if wanted.graph is GraphKind.SPARSE:
        return _sparse_bounds(wanted, size, min(size, participants))
    full = choose(
        size,
        threshold=wanted.threshold,
        colluders=wanted.colluders,
        min_survivors=wanted.min_survivors,
    )
    if participants >= full.participants:
        return full
    return choose(
        participants,
        threshold=wanted.threshold,
        colluders=full.colluders,
        min_survivors=full.min_survivors,
    )


def _sparse_bounds(wanted: SecureAggregationConfig, size: int, participants: int) -> Bounds:
    if wanted.threshold is not None:
        raise ConfigError(
            "the threshold of a sparse graph is computed",
            advice="leave secure_aggregation.threshold out",
        )
    colluders = math.ceil(wanted.corruption * size) if wanted.colluders is None else wanted.colluders
    least = size - math.ceil(wanted.dropout * size) if wanted.min_survivors is None else wanted.min_survivors
    chosen = choose_graph(participants, colluders=colluders, min_survivors=least)
    bounds = Bounds(participants, chosen.threshold, colluders, least, chosen.neighbours)
    bounds.check()
    return bounds


def grid(config: RunConfig, participants: int) -> float:
    """Return the steps per unit of the fixed-point grid of a round's updates, with all noise at every site.

    Raises:
        ConfigError: the ring is too narrow for the sum of that many, or so coarse that it costs accuracy.
    """
    secure, privacy = config.secure_aggregation, config.privacy
    scale = largest_scale(participants, secure.clip_range, secure.ring_bits)
    if privacy.trust is not Trust.NONE and privacy.noise_multiplier is not None:
        step = config.training.step_size(privacy.noise_multiplier)
        noise = privacy.noise_multiplier * privacy.clip * math.sqrt(privacy.steps_per_round)
        check_rounding(step * noise / privacy.expected_batch_size, secure.clip_range, scale, secure.ring_bits)
    return scale


def scale_for(config: RunConfig, bounds: Bounds, dimension: int) -> float:
    """Return the steps per unit of the grid of a round's vectors, whoever adds the noise.

    Raises:
        ConfigError: the ring is too narrow.
    """
    if config.privacy.trust is Trust.AGGREGATE:
        return shared_noise.scale(config, bounds, dimension)
    return grid(config, bounds.participants)


@dataclass(frozen=True)
class Plan:
    """What all offers of one run have in common."""

    run: str
    config: RunConfig
    roster: Roster
    layout: tuple[Segment, ...]

    @property
    def dimension(self) -> int:
        """Coordinates of an update."""
        return sum(segment.size for segment in self.layout)

    def bounds(self, participants: int) -> Bounds:
        """Return the secure-aggregation bounds for that many participants.

        Raises:
            ConfigError: the configured bounds do not fit that many.
        """
        return bounds_for(self.config, len(self.roster.sites), participants)

    def offer(self, *, number: int, attempt: int, model_hash: str, participants: Sequence[str]) -> Offer:
        """Return the offer of one attempt at one round.

        Raises:
            ConfigError: the settings do not fit that many participants.
        """
        bounds, sites = self.bounds(len(participants)), len(self.roster.sites)
        secure = self.config.secure_aggregation
        return Offer(
            federation=self.config.federation,
            run=self.run,
            round=number,
            attempt=attempt,
            roster_hash=self.roster.hash(),
            model_hash=model_hash,
            model=self.config.model,
            training=self.config.training,
            layout=self.layout,
            participants=tuple(sorted(participants)),
            neighbours=bounds.neighbours,
            threshold=bounds.threshold,
            colluders=bounds.colluders,
            min_survivors=bounds.min_survivors,
            lifetime=secure.lifetime,
            ring_bits=secure.ring_bits,
            scale=scale_for(self.config, bounds, self.dimension),
            clip_range=clip_range(self.config),
            privacy=round_privacy(self.config, sites),
            evaluation=evaluation(self.config, sites),
        )
