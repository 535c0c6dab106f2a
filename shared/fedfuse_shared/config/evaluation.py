"""Settings of evaluation under the budget: which counts sites release, how often, and with how much noise."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field

from fedfuse_shared.config.base import Frozen
from fedfuse_shared.config.privacy import Positive

LEAST_NOISE: Final = 8.0
"""Least deviation of the noise on a count: below it the integer sampler's proof does not hold."""
CountNoise = Annotated[float, Field(ge=LEAST_NOISE, le=2.0**20)]
Every = Annotated[int, Field(ge=1, le=100_000)]


class Detail(StrEnum):
    """What is counted; each evaluated record adds one to exactly one count."""

    ACCURACY = "accuracy"
    """Two counts: classified wrongly, and rightly."""
    CONFUSION = "confusion"
    """One count for every pair of true and predicted class, in rows: much more noise in all for much more detail."""


class EvaluationConfig(Frozen):
    """Evaluation of the global model on the sites' own test rows; off unless ``every`` is set."""

    every: Every | None = None
    """Rounds between two evaluations; left out, nothing computed from test rows leaves a site."""
    detail: Detail = Detail.ACCURACY
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of epsilon that all planned evaluations together may cost."""
    noise: Positive | None = None
    """Standard deviation of the noise on each count of a site; left out, it is calibrated for ``share``."""

    def count(self, rounds: int) -> int:
        """Return how many of the planned rounds evaluate."""
        return 0 if self.every is None else (rounds - 1) // self.every
