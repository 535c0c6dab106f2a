"""What the server does with an opened average update: FedAvg with momentum, FedAdam, and a moving average."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedfuse_shared.config.federation import AggregationConfig, ServerOptimizer

Vector = NDArray[np.float32]

_BETA_2 = 0.99
_TAU = 1e-3
"""Adaptivity of FedAdam (Reddi et al. 2021, section 5)."""


@dataclass
class GlobalModel:
    """The global weights with the optimiser's memory; every array has shape ``(d,)`` and is float32.

    Attributes:
        weights: What the next round starts from.
        published: The moving average of the weights, which is evaluated and given to users.
        first: First moment (momentum).
        second: Second moment; only FedAdam moves it.
        steps: Updates applied so far.
    """

    weights: Vector
    published: Vector = field(init=False)
    first: Vector = field(init=False)
    second: Vector = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        """Start the moving average at the initial weights and the moments at zero."""
        self.published = self.weights.copy()
        self.first = np.zeros_like(self.weights)
        self.second = np.zeros_like(self.weights)

    def apply(self, update: Vector, config: AggregationConfig) -> None:
        """Move the weights by an average update (Reddi et al. 2021, algorithm 2)."""
        self.steps += 1
        beta = config.momentum
        if config.optimizer is ServerOptimizer.FEDADAM:
            self.first = (beta * self.first + (1 - beta) * update).astype(np.float32)
            self.second = (_BETA_2 * self.second + (1 - _BETA_2) * update**2).astype(np.float32)
            step = (self.first / (np.sqrt(self.second) + _TAU)).astype(np.float32)
        else:
            self.first = (beta * self.first + update).astype(np.float32)
            step = self.first
        self.weights = (self.weights + config.learning_rate * step).astype(np.float32)
        # A moving average without bias towards the initial weights: early on it is a plain mean.
        decay = min(config.ema, self.steps / (self.steps + 9.0)) if config.ema else 0.0
        self.published = (decay * self.published + (1 - decay) * self.weights).astype(np.float32)
