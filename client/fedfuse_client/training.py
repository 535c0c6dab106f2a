"""DP-SGD at a site (Abadi et al. 2016), by Opacus, with what Opacus leaves to chance replaced.

1. Every record enters a step independently with the public probability q, drawn from the CSPRNG; an empty draw is a
   step of noise alone.
2. Each record's gradient is clipped to norm C. One that is not finite, or whose files cannot be read, counts as
   zero.
3. The clipped gradients are summed in float64, get Gaussian noise of deviation ``noise_share * C`` from the CSPRNG on
   a common grid, and are divided by the public ``expected_batch_size``: never by the number drawn, and nothing else
   depends on how many records the site has.
4. A record's gradient does not depend by a single bit on who else was drawn, or on how many: microbatches have fixed
   shapes, and a record its own row in them unless rows and shapes are proven not to matter (:mod:`microbatches`).
5. Gradients come from a mode that was proven for the model on synthetic records (:mod:`gradient_choice`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from opacus.optimizers import DPOptimizer

from fedfuse_client.gradient_choice import FASTEST, choice_for
from fedfuse_client.gradient_modes import GradientMode, Microbatch
from fedfuse_client.microbatches import densely, microbatches
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.models.weights import flatten
from fedfuse_shared.privacy.noise import CLIP_MARGIN, NoiseSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_client.gradients import PerRecord
    from fedfuse_shared.config.federation import TrainingConfig
    from fedfuse_shared.models.classifier import MultimodalClassifier
    from fedfuse_shared.offer import RoundPrivacy


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with float64 sums, noise from the CSPRNG on a grid, and a public divisor.

    Formal guarantee: between two calls of :meth:`step`, adding or removing one record changes the sum that noise is
    added to by at most ``clip`` in L2 norm, rounding included (see :data:`CLIP_MARGIN`).

    Raises:
        ConfigError: a parameter is not float32.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        multiplier: float,
        batch: int,
        noise: NoiseSource,
    ) -> None:
        super().__init__(
            optimizer, noise_multiplier=multiplier, max_grad_norm=clip, expected_batch_size=batch
        )
        self._noise = noise
        for parameter in self.params:
            if parameter.dtype != torch.float32:
                raise ConfigError(f"private training needs float32 weights, not {parameter.dtype}")
        # One vector, so that noise is drawn and added once a step and not once a layer.
        self._sizes = [parameter.numel() for parameter in self.params]
        self._total = torch.zeros(sum(self._sizes), dtype=torch.float64)
        for parameter, part in zip(self.params, torch.split(self._total, self._sizes), strict=True):
            parameter.summed_grad = part.view(parameter.shape)

    def clip_and_accumulate(self, gradients: Sequence[PerRecord], counted: Tensor) -> None:
        """Add the clipped gradients of a batch's records to the sum.

        Args:
            gradients: For each parameter, those of every record.
            counted: Which records count, ``(batch,)`` bool; those with a gradient that is not finite never do.
        """
        norms = torch.stack([each.squared_norms() for each in gradients]).sum(dim=0).sqrt()
        bound = self.max_grad_norm * (1 - CLIP_MARGIN)
        # A NaN or infinite norm fails the comparison.
        weights = torch.where((norms < torch.inf) & counted, bound / norms.clamp(min=bound), 0.0)
        for parameter, each in zip(self.params, gradients, strict=True):
            parameter.summed_grad += each.weighted_sum(weights)

    def add_noise(self) -> None:
        """Put the noised sum over the public divisor into ``grad`` and start the next sum at zero."""
        noised = self._noise.private_sum(
            self._total.numpy(), clip=self.max_grad_norm, multiplier=self.noise_multiplier
        )
        gradient = torch.from_numpy(noised / self.expected_batch_size).to(torch.float32)
        for parameter, part in zip(self.params, torch.split(gradient, self._sizes), strict=True):
            parameter.grad = part.view(parameter.shape)
        self._total.zero_()

    def step(self) -> None:
        """Step along the noised sum of everything accumulated since the last step, be it nothing."""
        self.add_noise()
        self.original_optimizer.step()


def train_round(
    model: MultimodalClassifier,
    data: RecordTensors,
    *,
    privacy: RoundPrivacy,
    training: TrainingConfig,
    noise: NoiseSource,
    microbatch: int,
    gradients: str = FASTEST,
) -> NDArray[np.float32]:
    """Return the update of one round, new weights less old, ``(dimension,)``; the model given is left as it was.

    Raises:
        ConfigError: weights of a precision that noise cannot be added to safely, or a model for which the gradient
            mode named in ``gradients``, or none, is proven.
    """
    choice = choice_for(model, microbatch, gradients, privacy.expected_batch_size)
    before = flatten(model)
    trained = copy.deepcopy(model).train()
    wrapped = choice.mode(trained)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(trained.parameters(), lr=training.step_size(privacy.noise_share)),
        clip=privacy.clip,
        multiplier=privacy.noise_share,
        batch=privacy.expected_batch_size,
        noise=noise,
    )
    for _ in range(privacy.steps):
        drawn = np.flatnonzero(noise.poisson_mask(len(data), privacy.sampling_rate)).tolist()
        accumulate(wrapped, optimizer, data, data.usable(drawn), microbatch, choice.shapes)
        optimizer.step()
    return flatten(trained) - before


def accumulate(
    mode: GradientMode,
    optimizer: PrivateOptimizer,
    data: RecordTensors,
    drawn: Sequence[int],
    microbatch: int,
    shapes: Sequence[int] = (),
) -> None:
    """Add the clipped gradients of the records drawn.

    Args:
        mode: Wraps the model that the optimiser trains.
        optimizer: Sums them.
        data: The records.
        drawn: Indices of those that count.
        microbatch: Rows of a microbatch in which every record has its own.
        shapes: Proven for the mode and the model: these are filled densely instead.
    """
    packed = densely(drawn, shapes) if shapes else microbatches(drawn, data.places(microbatch), microbatch)
    for filled in packed:
        batch = data.batch(filled.rows)
        inputs = (batch["text"], batch["image"], batch["audio"], batch["present"])
        gradients = mode.gradients(Microbatch(inputs, batch["label"]))
        optimizer.clip_and_accumulate(gradients, torch.tensor(filled.counted))
