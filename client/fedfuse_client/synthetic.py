"""Made-up microbatches that no record has any part in, to test and time a model with.

What is measured or decided on them depends on public settings alone.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import nn

from fedfuse_client.gradient_modes import Microbatch
from fedfuse_shared.models import MODALITIES, build_encoder

if TYPE_CHECKING:
    from torch import Tensor

    from fedfuse_shared.config.model import ModelConfig
    from fedfuse_shared.models import Encoder

_SHAKE: Final = (
    0.3  # deviation of what is added to weights: new models have zeros, whose gradients show nothing
)
_STEEP: Final = 3.0
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz äßéñ漢字"

M = TypeVar("M", bound=nn.Module)


def microbatch(config: ModelConfig, count: int, seed: int) -> Microbatch:
    """Return ``count`` random records of a model's input shapes; they go through all subsets of the modalities."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.arange(count)[:, None] >> torch.arange(len(MODALITIES)) & 1 == 0
    inputs: list[Tensor] = []
    for column, modality in enumerate(MODALITIES):
        if modality not in config.encoders:
            inputs.append(torch.zeros(count, 0))
            continue
        with torch.random.fork_rng(devices=[]):  # construction draws from torch's generator
            encoder = build_encoder(config, modality)
        values = _features(encoder, count, generator)
        absent = ~present[:, column].view(-1, *[1] * (values.dim() - 1))
        inputs.append(values.masked_fill(absent, 0))
    labels = torch.randint(0, len(config.classes), (count,), generator=generator)
    return Microbatch((*inputs, present), labels)


def shaken(model: M, seed: int = 0) -> M:
    """Return a copy of a model in train mode, at random weights near its own."""
    generator = torch.Generator().manual_seed(seed)
    shaken_model = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in shaken_model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=_SHAKE
            )
    return shaken_model


def cancelling(model: M, scale: float, seed: int = 3) -> M:
    """Return a copy of a model in train mode, at weights as a hostile server may choose them.

    Every other column of a matrix is large and equal for all outputs: it means nothing but rounding, which then
    decides between them.
    """
    generator = torch.Generator().manual_seed(seed)
    hostile = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in hostile.parameters():
            deviation = _STEEP if parameter.dim() > 1 else 1.0
            parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() > 1:
                columns = parameter.flatten(1)[:, 1::2].shape[1]
                parameter.view(len(parameter), -1)[:, 1::2] = scale * torch.randn(
                    columns, generator=generator
                )
    return hostile


def _features(encoder: Encoder, count: int, generator: torch.Generator) -> Tensor:
    if encoder.dtype == torch.int64:  # only the front end knows which numbers may occur
        texts = [
            "".join(_LETTERS[i] for i in torch.randint(0, len(_LETTERS), (200,), generator=generator))
            for _ in range(count)
        ]
        return torch.stack([encoder.front(text) for text in texts])
    values = torch.randn(count, *encoder.shape, generator=generator)
    # Vectors have norm about 1, as the front ends' do; pictures have values about 1.
    return values / math.sqrt(values[0].numel()) if values.dim() == 2 else values
