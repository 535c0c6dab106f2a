"""A run's settings from three places: options over a settings file over defaults, completed by the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def gather(file: Path | None, changes: Mapping[str, object]) -> dict[str, Any]:
    """Return what a settings file and the command line's options say, not yet checked.

    Args:
        file: Settings in TOML, or none.
        changes: What the command line sets; None stands for an option left out.

    Raises:
        ConfigError: the file cannot be read or is not TOML.
    """
    return _merge(read_toml(file) if file else {}, changes)


def complete(values: Mapping[str, Any], info: DatasetInfo | None) -> RunConfig:
    """Return checked settings, completed by a data set's classes and by encoders for its modalities.

    Args:
        values: What was gathered.
        info: The data set's description; None checks the settings before the data set is there.

    Raises:
        ConfigError: an unknown setting, or a value out of bounds.
    """
    classes = info.classes if info else ("this", "that")
    modalities = info.modalities if info else tuple(Modality)
    model = values.get("model", {})
    if isinstance(model, Mapping):
        encoders = {m.value: {"name": ENCODERS[m]} for m in modalities}
        model = {"encoders": encoders, **model, "classes": list(classes)}
    return check({**values, "model": model}, RunConfig, who="settings")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = merged.get(key, {})
            if isinstance(below, Mapping) and (inner := _merge(below, value)):
                merged[key] = inner
        elif value is not None:
            merged[key] = value
    return merged
