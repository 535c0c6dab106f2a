"""Models: encoders by name, fusion, and weights as one flat vector."""

from fedfuse_shared.models.classifier import MODALITIES, MultimodalClassifier, build_model, layout, outline
from fedfuse_shared.models.encoders import REGISTRY, Encoder, build_encoder
from fedfuse_shared.models.weights import (
    ModelCard,
    flatten,
    load_flat,
    load_model,
    model_hash,
    save_model,
)

__all__ = [
    "MODALITIES",
    "REGISTRY",
    "Encoder",
    "ModelCard",
    "MultimodalClassifier",
    "build_encoder",
    "build_model",
    "flatten",
    "layout",
    "load_flat",
    "load_model",
    "model_hash",
    "outline",
    "save_model",
]
