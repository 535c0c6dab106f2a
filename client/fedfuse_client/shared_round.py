"""A round of `trust = "aggregate"` at a site: one sum of clipped gradients, as integers, with a share of the noise.

Order is the guarantee (docs/privacy-aggregate.md): sum in float64, clamp, round once to the grid, add the integer
share; after that comes nothing but the ring.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedfuse_client.gradient_choice import FASTEST, choice_for
from fedfuse_client.training import PrivateOptimizer, accumulate
from fedfuse_shared.privacy.aggregate import share_deviation
from fedfuse_shared.privacy.integer_noise import IntegerGaussian

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_shared.models.classifier import MultimodalClassifier
    from fedfuse_shared.offer import Offer
    from fedfuse_shared.privacy.noise import NoiseSource


def gradient_sum(
    model: MultimodalClassifier,
    data: RecordTensors,
    offer: Offer,
    noise: NoiseSource,
    *,
    microbatch: int,
    gradients: str = FASTEST,
) -> NDArray[np.float64]:
    """Return the sum of the drawn records' clipped gradients, shape ``(d,)``; this is secret.

    Raises:
        ConfigError: no gradient mode is proven for the model.
    """
    choice = choice_for(model, microbatch, gradients, offer.privacy.expected_batch_size)
    trained = copy.deepcopy(model).train()
    privacy = offer.privacy
    optimizer = PrivateOptimizer(
        torch.optim.SGD(trained.parameters(), lr=1.0),  # it never steps: only its clipped sum is used
        clip=privacy.clip,
        multiplier=privacy.noise_share,
        batch=privacy.expected_batch_size,
        noise=noise,
    )
    drawn = np.flatnonzero(noise.poisson_mask(len(data), privacy.sampling_rate)).tolist()
    accumulate(choice.mode(trained), optimizer, data, data.usable(drawn), microbatch, choice.shapes)
    return torch.cat([parameter.summed_grad.flatten() for parameter in optimizer.params]).numpy()


def on_grid(total: NDArray[np.float64], offer: Offer) -> NDArray[np.int64]:
    """Return a sum clamped and rounded to the offer's grid, in steps, shape ``(d,)``; NaN counts as zero."""
    clamped = np.clip(np.nan_to_num(total, nan=0.0), -offer.clip_range, offer.clip_range)
    return np.rint(clamped * offer.scale).astype(np.int64)


def with_share(steps: NDArray[np.int64], offer: Offer, noise: NoiseSource) -> NDArray[np.int64]:
    """Return a sum on the grid plus this site's share of the noise, on every coordinate, shape ``(d,)``.

    Formal guarantee: h such shares are within ``aggregate.opened_distance`` of post-processed Gaussian noise of
    deviation ``noise_multiplier`` times the sensitivity, rounding included.
    """
    privacy = offer.privacy
    deviation = share_deviation(
        privacy.noise_multiplier, privacy.noise_sites, privacy.clip, offer.scale, offer.dimension()
    )
    return steps + IntegerGaussian(deviation).draw(noise, len(steps))
