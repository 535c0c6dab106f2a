"""What offers of `trust = "aggregate"` promise: shares of noise, the grid of summed gradients, and the clamp.

A site sends its clipped gradients' sum on an integer grid with its share of the noise; the server turns the opened
sum into an update by public constants. The proof is docs/privacy-aggregate.md.
"""

from __future__ import annotations

import math

from fedfuse_shared.config.evaluation import LEAST_NOISE
from fedfuse_shared.config.federation import GraphKind, RunConfig
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.privacy import aggregate
from fedfuse_shared.privacy.integer_noise import SMOOTH, IntegerGaussian
from fedfuse_shared.secagg.bounds import Bounds


def check(config: RunConfig) -> None:
    """Refuse settings under which shared noise cannot be accounted.

    Raises:
        ConfigError: local steps, or a sparse graph.
    """
    if config.privacy.steps_per_round != 1:
        raise ConfigError(
            f'trust = "aggregate" with {config.privacy.steps_per_round} local steps a round: a second step would '
            "start from weights that only one site's share of the noise protects",
            advice="set privacy.steps_per_round to 1",
        )
    if config.secure_aggregation.graph is GraphKind.SPARSE:
        raise ConfigError(
            'trust = "aggregate" on a sparse graph: a lying server could take one site\'s noise apart',
            advice='set secure_aggregation.graph to "complete", or use trust = "site"',
        )


def honest(bounds: Bounds) -> int:
    """Return h, the survivors of an opened round that are sure to be honest."""
    return bounds.min_survivors - bounds.colluders


def clamp(config: RunConfig) -> float:
    """Return what a coordinate of a site's summed gradients is clamped to: ``clip_range``, carried over to them."""
    rate = config.training.learning_rate
    return config.secure_aggregation.clip_range * config.privacy.expected_batch_size / rate


def scale(config: RunConfig, bounds: Bounds, dimension: int) -> float:
    """Return the grid of the summed gradients, in steps per unit.

    Raises:
        ConfigError: the ring is too narrow for it, or the noise on it cannot be drawn.
    """
    privacy = config.privacy
    steps = aggregate.least_scale(privacy.clip, dimension)
    if privacy.noise_multiplier is not None:
        share = aggregate.share_deviation(
            privacy.noise_multiplier, honest(bounds), privacy.clip, steps, dimension
        )
        IntegerGaussian(share)
        aggregate.check_ring(
            bounds.participants, clamp(config), steps, share, config.secure_aggregation.ring_bits
        )
    return steps


def count_share(noise: float, sites: int) -> float:
    """Return the deviation of one site's noise on a count, such that h sites' noise is worth the one charged."""
    return max(LEAST_NOISE, math.hypot(noise, SMOOTH) / math.sqrt(sites) * (1 + 2.0**-40))
