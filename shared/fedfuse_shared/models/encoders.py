"""Encoders by name: how a decoded record becomes fixed features, and what is trained on top of them.

The registry is closed: a name in an offer selects code that is installed at the site, never code that travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fedfuse_shared.config.base import Modality
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.models import features

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedfuse_shared.config.model import EncoderConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class Encoder:
    """One modality's encoder: a fixed front end, and a module ``(batch, *shape) -> (batch, width)``."""

    front: Callable[[Any], Tensor]
    """From one decoded text (str), image or log-mel to the tensor ``(*shape)`` the body sees."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    body: nn.Module
    width: int


class Features(nn.Module):
    """Passes fixed features on, scaled: nothing is trained before the head."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, values: Tensor) -> Tensor:
        """``(batch, width) -> (batch, width)``."""
        return values * self.weight


class Convolutions(nn.Module):
    """Two strided convolutions with GroupNorm, pooled to 4x4 and projected: for images and spectrograms."""

    def __init__(self, channels: int, width: int, weight: float) -> None:
        super().__init__()
        self.weight = weight / width**0.5  # of tanh units, so that the norm is at most the weight
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2),
            nn.GroupNorm(4, 16),
            nn.Tanh(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GroupNorm(8, 32),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, width),
            nn.Tanh(),
        )

    def forward(self, values: Tensor) -> Tensor:
        """``(batch, channels, height, width) -> (batch, width)``."""
        encoded: Tensor = self.layers(values) * self.weight
        return encoded


class ByteConvolutions(nn.Module):
    """Byte embedding, two convolutions with GroupNorm, and the mean over time."""

    def __init__(self, width: int, weight: float) -> None:
        super().__init__()
        self.weight = weight / width**0.5
        self.embedding = nn.Embedding(257, 16)
        self.layers = nn.Sequential(
            nn.Conv1d(16, 32, 5, stride=2, padding=2),
            nn.GroupNorm(8, 32),
            nn.Tanh(),
            nn.Conv1d(32, width, 5, stride=2, padding=2),
            nn.Tanh(),
        )

    def forward(self, values: Tensor) -> Tensor:
        """``(batch, length)`` int64 ``-> (batch, width)``."""
        encoded: Tensor = self.layers(self.embedding(values).transpose(1, 2)).mean(dim=2) * self.weight
        return encoded


def _hashed_words(config: ModelConfig, encoder: EncoderConfig) -> Encoder:
    width = encoder.width or 2048
    front = partial(features.hashed_words, limit=config.text.words, buckets=width)
    # Half of what images and recordings get: words are many and rare, and most of their gradient drowns in noise.
    return Encoder(front, (width,), torch.float32, Features(encoder.weight or 1.0), width)


def _oriented_gradients(config: ModelConfig, encoder: EncoderConfig) -> Encoder:
    return _fixed(features.oriented_gradients, torch.zeros(3, config.image.size, config.image.size), encoder)


def _spectral_shape(config: ModelConfig, encoder: EncoderConfig) -> Encoder:
    return _fixed(features.spectral_shape, torch.zeros(config.audio.mels, config.audio.frames), encoder)


def _fixed(front: Callable[[Tensor], Tensor], blank: Tensor, encoder: EncoderConfig) -> Encoder:
    width = front(blank).numel()
    if encoder.width not in {None, width}:
        raise ConfigError(
            f"encoder {encoder.name} gives {width} features, not {encoder.width}", advice="leave width out"
        )
    return Encoder(front, (width,), torch.float32, Features(encoder.weight or 2.0), width)


def _text_conv(config: ModelConfig, encoder: EncoderConfig) -> Encoder:
    width, length = encoder.width or 64, _BYTES_PER_WORD * config.text.words
    front = partial(features.byte_ids, length=length)
    return Encoder(front, (length,), torch.int64, ByteConvolutions(width, encoder.weight or 1.0), width)


def _image_conv(config: ModelConfig, encoder: EncoderConfig) -> Encoder:
    width, shape = encoder.width or 64, (3, config.image.size, config.image.size)
    return Encoder(
        features.centred, shape, torch.float32, Convolutions(3, width, encoder.weight or 2.0), width
    )


def _audio_conv(config: ModelConfig, encoder: EncoderConfig) -> Encoder:
    width, shape = encoder.width or 64, (1, config.audio.mels, config.audio.frames)
    return Encoder(
        features.standardised, shape, torch.float32, Convolutions(1, width, encoder.weight or 2.0), width
    )


_BYTES_PER_WORD: Final = 4
REGISTRY: Final[dict[Modality, dict[str, Callable[[ModelConfig, EncoderConfig], Encoder]]]] = {
    Modality.TEXT: {"hashed-words": _hashed_words, "text-conv": _text_conv},
    Modality.IMAGE: {"oriented-gradients": _oriented_gradients, "image-conv": _image_conv},
    Modality.AUDIO: {"spectral-shape": _spectral_shape, "audio-conv": _audio_conv},
}


def build_encoder(config: ModelConfig, modality: Modality) -> Encoder:
    """Return the encoder a model's settings name for one of its modalities.

    Raises:
        ConfigError: no encoder of that name for the modality, or a width it cannot have.
    """
    encoder = config.encoders[modality]
    known = REGISTRY[modality]
    if encoder.name not in known:
        raise ConfigError(
            f"there is no {modality} encoder {encoder.name!r}", advice=f"choose one of {', '.join(known)}"
        )
    return known[encoder.name](config, encoder)
