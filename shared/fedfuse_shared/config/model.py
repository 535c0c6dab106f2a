"""What the model is; part of every offer, so that a site can build it and compare its hash."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from fedfuse_shared.config.base import Frozen, Label, Modality


class Fusion(StrEnum):
    """How features of the modalities become one prediction."""

    CONCAT = "concat"
    LATE = "late"


class EncoderConfig(Frozen):
    """One modality's encoder, by its name in the registry."""

    name: Label
    width: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Features the encoder gives; left out, the encoder's own choice."""
    weight: Annotated[float, Field(gt=0, le=100)] | None = None
    """Norm of the modality's features, which sets its share of each clipped gradient; left out, the encoder's own."""


class ImageInput(Frozen):
    """What every image is brought to before an encoder sees it."""

    size: Annotated[int, Field(ge=8, le=1024)] = 28
    """Height and width (pixels)."""


class AudioInput(Frozen):
    """What every recording is brought to before an encoder sees it."""

    sample_rate: Annotated[int, Field(ge=4000, le=48_000, multiple_of=50)] = 8000
    """Hz."""
    mels: Annotated[int, Field(ge=8, le=128)] = 40
    frames: Annotated[int, Field(ge=8, le=3000)] = 48
    """Columns the speech between leading and trailing silence is stretched or squeezed to."""


class TextInput(Frozen):
    """How much of a text an encoder sees."""

    words: Annotated[int, Field(ge=1, le=10_000)] = 256
    """Words from the start of the text."""


class ModelConfig(Frozen):
    """Encoders per modality, their fusion and the classes to tell apart."""

    classes: Annotated[
        tuple[Annotated[str, Field(max_length=100)], ...], Field(min_length=2, max_length=10_000)
    ]
    encoders: Annotated[dict[Modality, EncoderConfig], Field(min_length=1)]
    fusion: Fusion = Fusion.CONCAT
    image: ImageInput = ImageInput()
    audio: AudioInput = AudioInput()
    text: TextInput = TextInput()
