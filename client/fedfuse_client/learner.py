"""A site's records and what is learned from them; torch is imported when training starts, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedfuse_client.data.manifest import content_digest, load_dataset
from fedfuse_client.policy import SitePolicy
from fedfuse_client.store import SiteStore
from fedfuse_shared.config.base import SERVER
from fedfuse_shared.crypto.keystream import Words
from fedfuse_shared.errors import DataError, ProtocolError
from fedfuse_shared.offer import Offer
from fedfuse_shared.secagg.quantise import quantise

if TYPE_CHECKING:
    from fedfuse_client.data.manifest import Dataset, Record
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_shared.config.model import ModelConfig
    from fedfuse_shared.models import MultimodalClassifier

MICROBATCH = 256
"""Records whose gradients are held at once; changes memory and speed, never a result or a guarantee."""


class Learner:
    """The training rows of one site.

    Args:
        policy: Names the data folder and the values of the manifest's site column that belong to this site.
    """

    def __init__(self, policy: SitePolicy) -> None:
        self._policy = policy
        self._rows: tuple[Dataset, tuple[Record, ...]] | None = None
        self._identifier: str | None = None
        self._model: MultimodalClassifier | None = None
        self._tensors: tuple[ModelConfig, RecordTensors] | None = None

    def dataset(self, store: SiteStore) -> str:
        """Return the store's identifier of the data set, registering its records by content.

        Raises:
            DataError: the folder cannot be used, or holds no training rows of this site.
        """
        if self._identifier is None:
            dataset, rows = self._load()
            self._identifier = store.register_dataset(content_digest(dataset, row) for row in rows)
        return self._identifier

    def check_weights(self, offer: Offer, raw: bytes) -> NDArray[np.float32]:
        """Return the global weights, shape ``(d,)``, if they and their layout are the ones the offer names.

        Raises:
            ProtocolError: another length, hash or layout: this site is shown another model than the offer's.
        """
        from fedfuse_shared.models import layout, model_hash  # noqa: PLC0415 - imports torch

        weights = np.frombuffer(raw, dtype="<f4").astype(np.float32)
        if weights.shape != (offer.dimension(),) or model_hash(weights, offer.layout) != offer.model_hash:
            raise ProtocolError("sent another model than its offer names", who=SERVER)
        if layout(self._model_for(offer)) != offer.layout:
            raise ProtocolError("offers a layout that does not fit its model", who=SERVER)
        return weights

    def update(self, offer: Offer, weights: NDArray[np.float32]) -> Words:
        """Train from the global weights and return the quantised update, shape ``(d + tail,)``."""
        from fedfuse_client.data.tensors import RecordTensors  # noqa: PLC0415 - imports torch
        from fedfuse_client.training import train_round  # noqa: PLC0415
        from fedfuse_shared.models import load_flat  # noqa: PLC0415
        from fedfuse_shared.privacy.noise import NoiseSource  # noqa: PLC0415

        if self._tensors is None or self._tensors[0] != offer.model:
            dataset, rows = self._load()
            self._tensors = offer.model, RecordTensors(dataset.folder, rows, offer.model)
        model = self._model_for(offer)
        load_flat(model, weights)
        update = train_round(
            model,
            self._tensors[1],
            privacy=offer.privacy,
            training=offer.training,
            noise=NoiseSource.fresh(),
            microbatch=MICROBATCH,
        )
        return quantise(update, frozenset(self._policy.modalities), offer)

    def _model_for(self, offer: Offer) -> MultimodalClassifier:
        from fedfuse_shared.models import build_model  # noqa: PLC0415 - imports torch

        if self._model is None or self._model.config != offer.model:
            self._model = build_model(offer.model, 0)  # its weights are replaced by the offer's
        return self._model

    def _load(self) -> tuple[Dataset, tuple[Record, ...]]:
        if self._rows is None:
            dataset = load_dataset(self._policy.data)
            wanted = set(self._policy.dataset_sites or (self._policy.site,))
            rows = tuple(r for r in dataset.select(split="train") if r.site in wanted)
            if not rows:
                raise DataError(
                    f"no training rows of {', '.join(sorted(wanted))}",
                    who=str(dataset.folder),
                    advice="check data and dataset_sites in policy.toml",
                )
            self._rows = dataset, rows
        return self._rows
