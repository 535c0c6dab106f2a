"""The multimodal classifier: encoders, fusion, head; right for every subset of missing modalities.

A missing modality is multiplied by zero, never branched around, so every parameter has a per-record gradient for
every record. No layer mixes records of a batch. Parameters have one fixed order, which is the update's.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.model import Fusion, ModelConfig
from fedfuse_shared.models.encoders import build_encoder
from fedfuse_shared.offer import Segment

MODALITIES: Final = (Modality.TEXT, Modality.IMAGE, Modality.AUDIO)
"""Order of the columns of ``present`` and of the arguments of ``forward``."""
_LINE: Final = 16  # float32 numbers on a cache line, the widest alignment of any kernel
_CAUTION: Final = 0.1
"""Trust moves by the square of this next to other weights, or the modality that learns first silences the rest."""


def aligned(values: Tensor) -> Tensor:
    """Return the same vectors, ``(batch, width)``, with every row on a cache line of its own.

    Matrix kernels round a row that starts off their alignment otherwise than one that starts on it, so that what a
    record gives would depend on its place among others.
    """
    width = values.shape[-1]
    if width % _LINE == 0:
        return values
    return functional.pad(values, (0, -width % _LINE))[..., :width]


class SumOfLogits(nn.Module):
    """Concatenation under one linear head: each modality's columns of it, summed."""

    def __init__(self, widths: dict[Modality, int], classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({m.value: nn.Linear(w, classes, bias=False) for m, w in widths.items()})

    def forward(self, encoded: dict[Modality, Tensor], present: dict[Modality, Tensor]) -> Tensor:
        """Per modality ``(batch, width)`` and ``(batch, 1)`` presence ``-> (batch, classes)``."""
        parts = [self.heads[m.value](aligned(values * present[m])) for m, values in encoded.items()]
        return torch.stack(parts).sum(dim=0)


class MeanOfLogits(nn.Module):
    """Late fusion: one head per modality, averaged over those present by learned weights."""

    def __init__(self, widths: dict[Modality, int], classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({m.value: nn.Linear(w, classes) for m, w in widths.items()})
        self.trust = nn.Linear(1, len(widths), bias=False)

    def forward(self, encoded: dict[Modality, Tensor], present: dict[Modality, Tensor]) -> Tensor:
        """Per modality ``(batch, width)`` and ``(batch, 1)`` presence ``-> (batch, classes)``."""
        logits = torch.stack([self.heads[m.value](aligned(values)) for m, values in encoded.items()], dim=1)
        there = torch.cat([present[m] for m in encoded], dim=1)
        # A record with nothing present gets zeros, not 0/0: its prediction is the prior alone.
        weights = self.trust(torch.full_like(there[:, :1], _CAUTION)).exp() * there
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
        mean: Tensor = (logits * weights[:, :, None]).sum(dim=1)
        return mean


class MultimodalClassifier(nn.Module):
    """A classifier over features of text, image and audio, any of which may be missing.

    Args:
        config: Its settings; ``features_of`` its encoders are what :class:`RecordTensors` computes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.modalities = tuple(m for m in MODALITIES if m in config.encoders)
        encoders = {m: build_encoder(config, m) for m in self.modalities}
        self.encoders = nn.ModuleDict({m.value: encoder.body for m, encoder in encoders.items()})
        fusion = {Fusion.CONCAT: SumOfLogits, Fusion.LATE: MeanOfLogits}[config.fusion]
        self.fusion = fusion({m: encoder.width for m, encoder in encoders.items()}, len(config.classes))
        # A linear layer of a constant input is a bias whose per-record gradient Opacus knows.
        self.prior = nn.Linear(1, len(config.classes), bias=False)

    def forward(self, text: Tensor, image: Tensor, audio: Tensor, present: Tensor) -> Tensor:
        """Return logits ``(batch, classes)``.

        Args:
            text: Features of the text encoder's front end, ``(batch, *shape)``; ignored if the model has none.
            image: The same for images.
            audio: The same for recordings.
            present: Which of text, image, audio each record has, ``(batch, 3)`` bool.
        """
        inputs = dict(zip(MODALITIES, (text, image, audio), strict=True))
        there = present.to(self.prior.weight.dtype)
        masks = {m: there[:, index : index + 1] for index, m in enumerate(MODALITIES)}
        encoded = {m: self.encoders[m.value](inputs[m]) for m in self.modalities}
        return self.fusion(encoded, masks) + self.prior(torch.ones_like(there[:, :1]))  # type: ignore[no-any-return]


def build_model(config: ModelConfig, seed: int) -> MultimodalClassifier:
    """Return a model whose initial weights depend on its settings and the seed alone.

    Encoders start at random weights, everything after them at zero: the first step then has no direction but the
    data's, and noise in one coordinate is not amplified by another.

    Raises:
        ConfigError: an unknown encoder, or a width it cannot have.
    """
    with torch.random.fork_rng(devices=[]):  # construction draws from torch's generator; leave it as it was
        model = MultimodalClassifier(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoders."):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter[0].numel()), generator=generator)
            else:
                # GroupNorm's scale is its only one-dimensional weight; all other vectors are biases.
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval()


def layout(model: MultimodalClassifier) -> tuple[Segment, ...]:
    """Return the runs of coordinates of the flat weights, in the order of the parameters.

    One segment for each encoder with something to train, one for each modality's part of the fusion, and the rest of
    fusion and head without a modality.
    """
    sizes: dict[tuple[str, Modality | None], int] = {}
    for name, parameter in model.named_parameters():
        key = _segment(name)
        if key in sizes and key != next(reversed(sizes)):
            raise AssertionError("parameters of a segment are not adjacent")
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    return tuple(Segment(name=name, size=size, modality=m) for (name, m), size in sizes.items())


def outline(config: ModelConfig) -> tuple[tuple[Segment, ...], int]:
    """Return a model's layout and the numbers it holds per record and modality at most, without allocating either.

    Raises:
        ConfigError: an unknown encoder, or a width it cannot have.
    """
    with torch.device("meta"):
        segments = layout(MultimodalClassifier(config))
        shapes = [build_encoder(config, modality).shape for modality in config.encoders]
    return segments, max(math.prod(shape) for shape in shapes)


def _segment(parameter: str) -> tuple[str, Modality | None]:
    part, *rest = parameter.split(".")
    if part == "encoders":
        return f"encoder/{rest[0]}", Modality(rest[0])
    if part == "fusion" and rest[0] == "heads":
        return f"fusion/{rest[1]}", Modality(rest[1])
    return ("fusion", None) if part == "fusion" else ("head", None)
