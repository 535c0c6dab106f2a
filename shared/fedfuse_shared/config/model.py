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
    width: Annotated[int, Field(ge=1, le=4096)] = 64


class ModelConfig(Frozen):
    """Encoders per modality, their fusion and the classes to tell apart."""

    classes: Annotated[tuple[Annotated[str, Field(max_length=100)], ...], Field(min_length=2, max_length=10_000)]
    encoders: dict[Modality, EncoderConfig]
    fusion: Fusion = Fusion.CONCAT
