"""Whose records a plan is about, from options or a data folder, and what is assumed of the model's parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedfuse_client.data.manifest import Dataset, load_dataset
from fedfuse_shared import limits
from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.errors import ConfigError, DataError
from fedfuse_shared.privacy.planning import Part, Population

SEPARATION: Final = {
    "hashed-words": 0.14,
    "oriented-gradients": 0.37,
    "spectral-shape": 0.41,
}
"""How far class means lie from the mean of all features, over a feature's norm: see bench/README.md (digits)."""
UNMEASURED: Final = 0.3
"""The same for encoders that were not measured: a guess, and the plan says so."""


@dataclass(frozen=True, slots=True)
class Holding:
    """The records a plan is about."""

    sites: int
    records: tuple[int, ...]
    """Training records: one number for all sites, or one for each."""
    shares: dict[Modality, float]
    """Share of all records that have a modality; what is missing here is 1."""
    dataset: Dataset | None = None

    @property
    def mean(self) -> float:
        """Training records of a site on average."""
        return sum(self.records) / len(self.records)


def from_options(sites: int | None, records: int | None) -> Holding:
    """Return what two numbers say: sites of equal size whose records have every modality.

    Raises:
        ConfigError: a number is missing or impossible.
    """
    if sites is None or records is None:
        raise ConfigError(
            "a plan needs the number of sites and of training records at each",
            advice="add --sites and --records, or --data with a folder that holds all of them",
        )
    if not limits.MIN_SITES <= sites <= limits.MAX_SPARSE_SITES:
        raise ConfigError(
            f"a round has {limits.MIN_SITES} to {limits.MAX_SPARSE_SITES} sites, not {sites}",
            advice="with two, each would learn the other's update from the sum",
        )
    if records < 1:
        raise ConfigError(
            f"{records} training records at a site teach nothing", advice="give --records 1 or more"
        )
    return Holding(sites, (records,), {})


def from_folder(folder: Path) -> Holding:
    """Return what a data folder's manifest holds; images and recordings are not opened.

    Raises:
        DataError: the folder cannot be used, has too few sites, or a site without training rows.
    """
    dataset = load_dataset(folder)
    names = dataset.sites()
    if len(names) < limits.MIN_SITES:
        raise DataError(
            f"has {len(names)} sites, a round needs at least {limits.MIN_SITES}",
            who=str(folder / dataset.manifest),
            advice="with two, each would learn the other's update from the sum",
        )
    counts = tuple(len(dataset.select(name, "train")) for name in names)
    for name, count in zip(names, counts, strict=True):
        if not count:
            raise DataError(
                f"site {name} has no training rows",
                who=str(folder / dataset.manifest),
                advice="give it some or remove its rows",
            )
    rows = dataset.select(split="train")
    shares = {
        m: sum(getattr(row, m.value) is not None for row in rows) / len(rows) for m in dataset.info.modalities
    }
    return Holding(len(names), counts, shares, dataset)


def population(holding: Holding, config: RunConfig, cohort: int) -> Population:
    """Return what the formulas need of a model and its records.

    Features have the norms that the encoders give them, so a gradient's share of the clip follows from the weights.
    At the start all classes are equally likely: a gradient then has ``sqrt(1 - 1 / K)`` of its features' norm, and
    the cosine with the mean is ``separation / sqrt(K - 1)`` where K balanced classes lie equally far apart.

    Raises:
        ConfigError: an unknown encoder, or a width it cannot have.
    """
    from fedfuse_shared.models import outline  # noqa: PLC0415 - imports torch

    layout, _ = outline(config.model)
    sizes: dict[Modality, int] = {}
    for segment in layout:
        if segment.modality is not None:
            sizes[segment.modality] = sizes.get(segment.modality, 0) + segment.size
    weights = _weights(config)
    norm = math.sqrt(1.0 + sum(weight**2 for weight in weights.values()))  # 1: the prior's constant input
    classes = len(config.model.classes)
    parts = tuple(
        Part(
            name=m.value,
            size=size,
            share=holding.shares.get(m, 0.0 if holding.dataset else 1.0),
            cosine=min(1.0, separation(config, m) / math.sqrt(classes - 1)),
            clip_share=weights[m] / norm,
        )
        for m, size in sizes.items()
    )
    return Population(cohort, holding.mean, parts, math.sqrt(1 - 1 / classes) * norm, norm)


def separation(config: RunConfig, modality: Modality) -> float:
    """Return what is assumed of a modality's encoder."""
    return SEPARATION.get(config.model.encoders[modality].name, UNMEASURED)


def _weights(config: RunConfig) -> dict[Modality, float]:
    """Return the norms encoders give their features; those with trained layers state theirs per unit."""
    import torch  # noqa: PLC0415

    from fedfuse_shared.models import MODALITIES, build_encoder  # noqa: PLC0415

    found = {}
    with torch.device("meta"):
        for m in (m for m in MODALITIES if m in config.model.encoders):
            encoder = build_encoder(config.model, m)
            body: Any = encoder.body
            trained = any(True for _ in body.parameters())
            found[m] = body.weight * (math.sqrt(encoder.width) if trained else 1.0)
    return found
