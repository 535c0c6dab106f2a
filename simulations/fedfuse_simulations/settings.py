"""A run's settings from three places: options over a settings file over defaults, completed by the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedfuse_client.data.manifest import DatasetInfo
from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.files import check, read_toml

ENCODERS = {
    Modality.TEXT: "hashed-words",
    Modality.IMAGE: "oriented-gradients",
    Modality.AUDIO: "spectral-shape",
}
"""Encoders where the settings name none: fixed front ends under linear heads, which train well under noise."""


def settings(file: Path | None, changes: Mapping[str, object], info: DatasetInfo) -> RunConfig:
    """Return checked settings for a data set.

    Args:
        file: Settings in TOML, or none.
        changes: What the command line sets; None stands for an option left out.
        info: The data set's own description: its classes, and the modalities that need encoders.

    Raises:
        ConfigError: an unknown setting, or a value out of bounds.
    """
    values = _merge(read_toml(file) if file else {}, changes)
    model = values.setdefault("model", {})
    if isinstance(model, dict):
        model["classes"] = list(info.classes)
        model.setdefault("encoders", {m.value: {"name": ENCODERS[m]} for m in info.modalities})
    return check(values, RunConfig, who=str(file) if file else "settings")


def _merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = merged.get(key, {})
            merged[key] = _merge(below if isinstance(below, Mapping) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged
