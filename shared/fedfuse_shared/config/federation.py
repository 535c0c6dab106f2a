"""The whole of a run's settings, as read from and written to ``config.toml``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from fedfuse_shared import limits
from fedfuse_shared.config.base import Frozen, Label
from fedfuse_shared.config.evaluation import EvaluationConfig
from fedfuse_shared.config.model import ModelConfig
from fedfuse_shared.config.privacy import Positive, PrivacyConfig

Count = Annotated[int, Field(ge=0, le=limits.MAX_SPARSE_SITES)]
Share = Annotated[float, Field(ge=0, lt=1)]
RingBits = Literal[16, 17, 18, 19, 20, 21, 22, 23, 24, 32]
"""Widths of the ring: 32, or packed to save bandwidth."""
Lifetime = Annotated[int, Field(ge=1, le=limits.MAX_ROUND_SECONDS)]
"""How long a site keeps the secrets of an attempt (seconds)."""


class ServerOptimizer(StrEnum):
    """How the opened average update is applied (Reddi et al. 2021, Algorithm 2)."""

    FEDAVG = "fedavg"
    FEDADAM = "fedadam"


class TrainingConfig(Frozen):
    """How a site trains between receiving the model and sending its update."""

    learning_rate: Positive = 4.0
    """Step size of local DP-SGD while a site's noise multiplier is at most ``steady_noise``."""
    steady_noise: Positive = 2.0
    """Noise multiplier beyond which the step shrinks in proportion, so that noise moves the weights no further."""

    def step_size(self, noise_share: float) -> float:
        """Return the step size of a round from public constants alone: what one site adds, over the clip."""
        return self.learning_rate * min(1.0, self.steady_noise / noise_share)


class AggregationConfig(Frozen):
    """What the server does with the average update."""

    optimizer: ServerOptimizer = ServerOptimizer.FEDAVG
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Server momentum for FedAvg, beta_1 for FedAdam."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Decay of the exponential moving average of the weights that is evaluated and published; 0: none."""


class GraphKind(StrEnum):
    """Who shares masks with whom."""

    COMPLETE = "complete"
    """Everybody with everybody: holds against a server that lies; up to 100 sites."""
    SPARSE = "sparse"
    """A random graph of few neighbours: holds only if the server keeps to the protocol; up to 10,000 sites."""


class SecureAggregationConfig(Frozen):
    """Bounds of the secure aggregation; what is left out is chosen from the number of participants."""

    graph: GraphKind = GraphKind.COMPLETE
    threshold: Annotated[int, Field(ge=2, le=limits.MAX_SITES)] | None = None
    """Shares needed to open a round, t; on a sparse graph it is computed."""
    colluders: Count | None = None
    """Sites that may help the server, c."""
    min_survivors: Annotated[int, Field(ge=2, le=limits.MAX_SPARSE_SITES)] | None = None
    corruption: Share = 0.05
    """On a sparse graph: share of the sites that may collude, where ``colluders`` is left out."""
    dropout: Share = 0.05
    """On a sparse graph: share of the sites that may be missing, where ``min_survivors`` is left out."""
    lifetime: Lifetime = 3600
    """Seconds after which a site erases the secrets of an attempt, whether or not it was opened."""
    ring_bits: RingBits = 32
    """Width b of the ring the masked sum is taken in: 16 to 24, which saves bandwidth, or 32."""
    clip_range: Positive = 4.0
    """Each coordinate of an update is clamped to plus or minus this before it is quantised."""


class PerformanceConfig(Frozen):
    """Settings that change speed and memory only, never a guarantee; not part of an offer."""

    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads of torch; small models are fastest with one."""
    exchange_timeout: Positive = 600.0
    """Seconds the server waits for the replies of one exchange."""


class RunConfig(Frozen):
    """Everything a run is started with."""

    federation: Label = "fedfuse"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 40
    sites_per_round: Annotated[int, Field(ge=limits.MIN_SITES, le=limits.MAX_SPARSE_SITES)] | None = None
    """Sites drawn for each round; left out, all of them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the model's initial weights and of scenario data; never of noise, sampling or keys."""
    model: ModelConfig
    privacy: PrivacyConfig = PrivacyConfig()
    training: TrainingConfig = TrainingConfig()
    aggregation: AggregationConfig = AggregationConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    performance: PerformanceConfig = PerformanceConfig()
