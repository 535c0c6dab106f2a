"""Settings that bear on a privacy guarantee; nothing here is derived from a site's record count."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from fedfuse_shared.config.base import Frozen, Trust

SamplingRate = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Delta = Annotated[float, Field(gt=0, lt=1)]


class Schedule(StrEnum):
    """Whether the mechanism a data set is charged for may change; the site's policy says it, before the first charge.

    Either way the server may choose, after every round, whether and how to go on.

    ``FIXED``: one pair of sampling rate and noise multiplier for good. Only the number of steps is left to choose,
    and the privacy loss distribution bounds it: epsilon never falls as steps are added.
    ``FREE``: any mechanisms the policy allows. Only Renyi accounting is a filter then (Lecuyer 2021), so it counts
    from the first charge on. Evaluation under the budget is a second mechanism and needs it.

    A data set once charged under a free schedule counts by Renyi for good, also if its policy fixes one later.
    """

    FIXED = "fixed"
    FREE = "free"


class PrivacyConfig(Frozen):
    """The guarantee a run asks for and the public constants it is bought with."""

    trust: Trust = Trust.SITE
    epsilon: Positive = 8.0
    """Epsilon for the planned rounds, per record, add/remove adjacency."""
    delta: Delta = 1e-5
    sampling_rate: SamplingRate = 0.5
    """Poisson probability q with which each record enters a step."""
    expected_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 128
    """Public divisor of the summed gradients; never the number of records drawn."""
    steps_per_round: Annotated[int, Field(ge=1, le=10_000)] = 1
    clip: Positive = 1.0
    """L2 norm C to which each record's gradient is clipped."""
    noise_multiplier: Positive | None = None
    """Noise standard deviation over C; left out, it is calibrated for ``epsilon`` over the planned rounds."""
