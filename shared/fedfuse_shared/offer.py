"""The offer: the server's signed proposal of one attempt at one round, with every public parameter of it."""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedfuse_shared import limits
from fedfuse_shared.config.base import Frozen, Hex32, Label, Modality, SiteName, Trust
from fedfuse_shared.config.evaluation import CountNoise, Detail, Every
from fedfuse_shared.config.federation import Lifetime, RingBits, TrainingConfig
from fedfuse_shared.config.model import ModelConfig
from fedfuse_shared.config.privacy import Delta, Positive, SamplingRate
from fedfuse_shared.envelope import GrownBody, canonical

Adjacency = Literal["add-or-remove-one-record"]
SiteCount = Annotated[int, Field(ge=0, le=limits.MAX_SPARSE_SITES)]


class Segment(Frozen):
    """A run of coordinates of the update that belong together, and the modality they need, if any."""

    name: Label
    size: Annotated[int, Field(ge=1, le=limits.MAX_VECTOR)]
    modality: Modality | None = None


class RoundPrivacy(Frozen):
    """The public constants the accounting of one round is made of."""

    trust: Trust
    adjacency: Adjacency = "add-or-remove-one-record"
    sampling_rate: SamplingRate
    steps: Annotated[int, Field(ge=1, le=10_000)]
    clip: Positive
    noise_multiplier: Positive
    """Noise standard deviation over ``clip`` that the accounting relies on, sigma."""
    noise_share: Positive
    """What one site adds, sigma_k; equal to sigma where nobody is trusted."""
    noise_sites: SiteCount
    """Honest survivors whose shares make up sigma, h; 1 where nobody is trusted."""
    expected_batch_size: Annotated[int, Field(ge=1, le=2**24)]
    delta: Delta


class Evaluation(Frozen):
    """Which counts of their own test rows sites release, noised, in some of a run's rounds."""

    every: Every
    """Rounds 1 + every, 1 + 2 every and so on evaluate the model they start from."""
    detail: Detail
    noise: CountNoise
    """Standard deviation of the noise on a count that the accounting relies on."""
    noise_share: CountNoise
    """What one site adds to each of its counts; equal to ``noise`` where nobody is trusted."""


def architecture_hash(model: ModelConfig) -> str:
    """Return the hash by which a site's policy names a model it trains (SHA-256, hexadecimal)."""
    return hashlib.sha256(limits.LABEL_ARCHITECTURE + canonical(model)).hexdigest()


def plan_hash(
    federation: str,
    model: ModelConfig,
    training: TrainingConfig,
    privacy: RoundPrivacy,
    clip_range: float,
    evaluation: Evaluation | None = None,
) -> str:
    """Return the hash of everything in an offer that is the same in every round (SHA-256, hexadecimal)."""
    parts: list[object] = [part.model_dump(mode="json") for part in (model, training, privacy)]
    parts.append(evaluation.model_dump(mode="json") if evaluation else None)
    return hashlib.sha256(limits.LABEL_PLAN + canonical([federation, *parts, clip_range])).hexdigest()


class Offer(GrownBody):
    """Everything a site needs to know, to check and to agree to before it takes part in a round."""

    kind: ClassVar[str] = "offer"
    added: ClassVar[frozenset[str]] = frozenset({"evaluation"})

    federation: Label
    run: Label
    round: Annotated[int, Field(ge=1, le=10**9)]
    attempt: Annotated[int, Field(ge=1, le=10**6)]
    roster_hash: Hex32
    model_hash: Hex32
    """Hash of the global weights the round starts from."""
    model: ModelConfig
    training: TrainingConfig
    layout: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=limits.MAX_SEGMENTS)]
    participants: Annotated[
        tuple[SiteName, ...], Field(min_length=limits.MIN_SITES, max_length=limits.MAX_SPARSE_SITES)
    ]
    neighbours: Annotated[int, Field(ge=0, lt=limits.MAX_SITES)]
    """Sites each site shares masks with; 0: all of them."""
    threshold: SiteCount
    colluders: SiteCount
    min_survivors: SiteCount
    lifetime: Lifetime
    """Seconds after which a site erases the attempt's secrets, whether or not it was opened."""
    ring_bits: RingBits
    scale: Annotated[float, Field(gt=0, le=2.0**40)]
    """Steps of the fixed-point grid per unit."""
    clip_range: Positive
    privacy: RoundPrivacy
    evaluation: Evaluation | None = None

    @property
    def plan_hash(self) -> str:
        """What a site's policy may pin: computed from the offer itself, never taken from the server's word."""
        return plan_hash(
            self.federation, self.model, self.training, self.privacy, self.clip_range, self.evaluation
        )

    @property
    def counts(self) -> int:
        """Number of counts this round's vectors carry; 0 where it does not evaluate."""
        asked = self.evaluation
        if asked is None or self.round == 1 or (self.round - 1) % asked.every:
            return 0
        return 2 if asked.detail is Detail.ACCURACY else len(self.model.classes) ** 2

    def context(self) -> str:
        """Return the hash that binds every message of this attempt (SHA-256, hexadecimal)."""
        return hashlib.sha256(limits.LABEL_CONTEXT + canonical(self)).hexdigest()

    def dimension(self) -> int:
        """Return the length of the update without its tail (coordinates)."""
        return sum(segment.size for segment in self.layout)
