"""Weights as one flat vector, their hash, and their file: safetensors with a JSON card, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedfuse_shared import limits
from fedfuse_shared.config.base import Frozen, Hex32
from fedfuse_shared.config.model import ModelConfig
from fedfuse_shared.envelope import canonical
from fedfuse_shared.errors import ConfigError, DataError
from fedfuse_shared.files import write_durably
from fedfuse_shared.models.classifier import MultimodalClassifier, build_model, layout
from fedfuse_shared.offer import Segment

_CARD: Final = "fedfuse"
_TENSOR: Final = "weights"


class ModelCard(Frozen):
    """What a model file says of itself."""

    model: ModelConfig
    round: Annotated[int, Field(ge=0, le=10**9)]
    """Rounds the weights have been through."""
    model_hash: Hex32


def flatten(model: MultimodalClassifier) -> NDArray[np.float32]:
    """Return all weights in the order of ``layout``, ``(dimension,)``."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).numpy()


def load_flat(model: MultimodalClassifier, vector: NDArray[np.float32]) -> None:
    """Set all weights from a flat vector ``(dimension,)``.

    Raises:
        ConfigError: wrong length, wrong type, or values that are not finite; the model is unchanged.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if vector.shape != (wanted,) or vector.dtype != np.float32:
        raise ConfigError(
            f"weights have shape {vector.shape} and type {vector.dtype}, the model has {wanted} of float32"
        )
    if not np.isfinite(vector).all():
        raise ConfigError("weights are not finite")
    values, start = torch.from_numpy(vector.copy()), 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(values[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


def model_hash(vector: NDArray[np.float32], segments: Sequence[Segment]) -> str:
    """Return the SHA-256 (hexadecimal) over a layout and the weights in it as little-endian float32."""
    described = canonical([segment.model_dump(mode="json") for segment in segments])
    digest = hashlib.sha256(limits.LABEL_MODEL + len(described).to_bytes(8, "big") + described)
    digest.update(np.ascontiguousarray(vector, dtype="<f4").tobytes())
    return digest.hexdigest()


def save_model(
    path: Path, config: ModelConfig, vector: NDArray[np.float32], *, round_number: int
) -> ModelCard:
    """Write weights ``(dimension,)`` and their card to a safetensors file, all of it or nothing; return the card.

    Raises:
        ConfigError: the weights do not fit the settings.
    """
    model = build_model(config, 0)
    load_flat(model, vector)
    card = ModelCard(model=config, round=round_number, model_hash=model_hash(vector, layout(model)))
    raw = save({_TENSOR: np.ascontiguousarray(vector, dtype="<f4")}, {_CARD: canonical(card).decode()})
    write_durably(path, raw)
    return card


def load_model(path: Path) -> tuple[MultimodalClassifier, ModelCard]:
    """Return the model in a file and its card.

    Raises:
        DataError: no such file, not a model file, or weights that are not those its card states.
    """
    try:
        with safe_open(path, framework="np") as file:
            card = ModelCard.model_validate_json((file.metadata() or {}).get(_CARD, ""))
            vector = file.get_tensor(_TENSOR)
        model = build_model(card.model, 0)
        load_flat(model, vector)
    except OSError as problem:
        raise DataError(f"cannot be read ({problem})", who=str(path)) from problem
    except (SafetensorError, ValidationError, ConfigError, json.JSONDecodeError) as problem:
        raise DataError(f"is not a fedfuse model ({str(problem)[:200]})", who=str(path)) from problem
    if model_hash(vector, layout(model)) != card.model_hash:
        raise DataError("holds other weights than its card states", who=str(path), advice="fetch it again")
    return model, card
