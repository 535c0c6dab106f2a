"""A site's records and what is learned from them; torch is imported when training starts, not before."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedfuse_client.data.manifest import content_digest, load_dataset
from fedfuse_client.policy import SitePolicy
from fedfuse_client.store import SiteStore
from fedfuse_shared import limits
from fedfuse_shared.config.base import SERVER, Modality, Trust
from fedfuse_shared.crypto.keystream import Words
from fedfuse_shared.errors import DataError, PolicyError, ProtocolError
from fedfuse_shared.offer import Offer
from fedfuse_shared.secagg.quantise import as_words, quantise

if TYPE_CHECKING:
    from fedfuse_client.data.manifest import Dataset, Record
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_shared.config.model import ModelConfig
    from fedfuse_shared.models import MultimodalClassifier

log = logging.getLogger(__name__)

MICROBATCH = 64
"""Rows of the microbatches that gradients are proven in; changes memory and speed, never a guarantee.

Where rows and shapes do not matter (``row_proof``), a model with small gradients gets a larger shape too."""
GRADIENTS = "fastest"
"""How per-record gradients are computed: the fastest way proven for the model, or one by its name.

Changes speed and the last bits of an update, never a guarantee; a name makes updates equal in every process."""


class Learner:
    """The training rows of one site.

    Args:
        policy: Names the data folder and the values of the manifest's site column that belong to this site.
        threads: Threads that torch may use; left out, as many as the process was given.
    """

    def __init__(self, policy: SitePolicy, *, threads: int | None = None) -> None:
        self._policy = policy
        self._threads = threads
        self._rows: tuple[Dataset, tuple[Record, ...]] | None = None
        self._identifier: str | None = None
        self._model: MultimodalClassifier | None = None
        self._tensors: tuple[ModelConfig, RecordTensors] | None = None
        self._tests: tuple[ModelConfig, RecordTensors] | None = None

    def dataset(self, store: SiteStore) -> str:
        """Return the store's identifier of the data set, registering its records by content.

        Raises:
            DataError: the folder cannot be used, or holds no training rows of this site.
        """
        if self._identifier is None:
            dataset, rows = self._load()
            # Test rows too: they may be evaluated, and who trains on them later inherits what that cost.
            known = (*rows, *self._test_rows(dataset))
            self._identifier = store.register_dataset(content_digest(dataset, row) for row in known)
        return self._identifier

    def check_rows(self) -> None:
        """Check that there is something to train on.

        Raises:
            DataError: the folder cannot be used, or holds no training rows of this site, or too many.
        """
        self._load()

    def check_classes(self, offer: Offer) -> None:
        """Refuse a model of other classes than the data set declares.

        With fewer, a record of a missing class would decide whether this site can answer at all.

        Raises:
            PolicyError: the offer names other classes.
        """
        dataset, _ = self._load()
        if offer.model.classes != tuple(dataset.info.classes):
            raise PolicyError(
                f"round {offer.round} trains other classes than this site's data set declares",
                who=f"site {self._policy.site}",
                advice="offer the data set's own classes",
            )

    def check_weights(self, offer: Offer, raw: bytes) -> NDArray[np.float32]:
        """Return the global weights, shape ``(d,)``, if they and their layout are the ones the offer names.

        Raises:
            ProtocolError: another length, hash or layout, weights that are not finite, or a model that asks for
                more memory per record than ``limits.MAX_FEATURES``: this site is not charged for it.
        """
        from fedfuse_shared.models import model_hash, outline  # noqa: PLC0415 - imports torch

        if len(raw) != 4 * offer.dimension():
            raise ProtocolError("sent another model than its offer names", who=SERVER)
        weights = np.frombuffer(raw, dtype="<f4").astype(np.float32)
        if model_hash(weights, offer.layout) != offer.model_hash:
            raise ProtocolError("sent another model than its offer names", who=SERVER)
        if not np.isfinite(weights).all():
            raise ProtocolError("sent weights that are not finite", who=SERVER)
        layout, features = outline(offer.model)
        if layout != offer.layout:
            raise ProtocolError("offers a layout that does not fit its model", who=SERVER)
        if features > limits.MAX_FEATURES:
            raise ProtocolError(
                f"offers a model that holds {features} numbers per record, at most {limits.MAX_FEATURES} are held",
                who=SERVER,
            )
        return weights

    def check_gradients(self, offer: Offer) -> None:
        """Refuse a model whose per-record gradients cannot be had for certain; decided on synthetic records alone.

        Raises:
            ConfigError: a layer mixes records or keeps state, or no way to the gradients is proven.
        """
        from fedfuse_client.gradient_choice import choice_for  # noqa: PLC0415 - imports torch

        choice_for(self._model_for(offer), MICROBATCH, GRADIENTS, offer.privacy.expected_batch_size)

    def update(self, offer: Offer, weights: NDArray[np.float32]) -> Words:
        """Train from the global weights and return the quantised update and counts, shape ``(d + tail + counts,)``.

        Nothing refuses here any more: whether this site answers must not depend on its records. If training fails,
        for want of memory say, an update of noise alone is sent, as if no record had been drawn.
        """
        try:
            update = self._train(offer, weights, tuple(map(self._declared, self._load()[1])))
        except Exception:
            log.exception("round %s: training failed; noise alone is sent", offer.round)
            self._tensors = None
            update = self._train(offer, weights, ())
        counts = self._evaluate(offer, weights) if offer.counts else None
        declared = frozenset(self._policy.modalities)
        if offer.privacy.trust is Trust.AGGREGATE:
            return as_words(update.astype(np.int64, copy=False), declared, offer, counts)
        return quantise(update.astype(np.float32, copy=False), declared, offer, counts)

    def _evaluate(self, offer: Offer, weights: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the noised counts of this site's test rows; of no row if that fails, for the reason above."""
        from fedfuse_client.data.tensors import RecordTensors  # noqa: PLC0415 - imports torch
        from fedfuse_client.evaluation import count, noised  # noqa: PLC0415
        from fedfuse_shared.models import load_flat  # noqa: PLC0415

        try:
            if self._tests is None or self._tests[0] != offer.model:
                rows = tuple(map(self._declared, self._test_rows(self._load()[0])))
                self._tests = offer.model, RecordTensors(self._policy.data, rows, offer.model)
            model = self._model_for(offer)
            load_flat(model, weights)
            counts = count(model, self._tests[1], offer, MICROBATCH)
        except Exception:
            log.exception("round %s: evaluation failed; noise alone is sent", offer.round)
            counts = np.zeros(offer.counts, dtype=np.int64)
        return noised(counts, offer)

    def _test_rows(self, dataset: Dataset) -> tuple[Record, ...]:
        wanted = self._policy.record_sites
        return tuple(row for row in dataset.select(split="test") if row.site in wanted)

    def _train(
        self, offer: Offer, weights: NDArray[np.float32], rows: tuple[Record, ...]
    ) -> NDArray[np.float32] | NDArray[np.int64]:
        """Return a noised update or, where the noise is shared, a noised sum of gradients on the offer's grid."""
        from fedfuse_client.data.tensors import RecordTensors  # noqa: PLC0415 - imports torch
        from fedfuse_client.shared_round import gradient_sum, on_grid, with_share  # noqa: PLC0415
        from fedfuse_client.training import train_round  # noqa: PLC0415
        from fedfuse_shared.models import load_flat  # noqa: PLC0415
        from fedfuse_shared.privacy.noise import NoiseSource  # noqa: PLC0415

        if self._tensors is None or self._tensors[0] != offer.model:
            tensors = RecordTensors(self._policy.data, rows, offer.model)
            self._tensors = (offer.model, tensors) if rows else None
        else:
            tensors = self._tensors[1]
        model = self._model_for(offer)
        load_flat(model, weights)
        noise = NoiseSource.fresh()
        if offer.privacy.trust is Trust.AGGREGATE:
            total = gradient_sum(model, tensors, offer, noise, microbatch=MICROBATCH, gradients=GRADIENTS)
            return with_share(on_grid(total, offer), offer, noise)
        return train_round(
            model,
            tensors,
            privacy=offer.privacy,
            training=offer.training,
            noise=noise,
            microbatch=MICROBATCH,
            gradients=GRADIENTS,
        )

    def _model_for(self, offer: Offer) -> MultimodalClassifier:
        from torch import get_num_threads, set_num_threads  # noqa: PLC0415

        from fedfuse_shared.models import build_model  # noqa: PLC0415 - imports torch

        if self._threads is not None and get_num_threads() != self._threads:
            set_num_threads(self._threads)
        if self._model is None or self._model.config != offer.model:
            self._model = build_model(offer.model, 0)  # its weights are replaced by the offer's
        return self._model

    def _load(self) -> tuple[Dataset, tuple[Record, ...]]:
        if self._rows is None:
            dataset = load_dataset(self._policy.data)
            wanted = set(self._policy.record_sites)
            rows = tuple(row for row in dataset.select(split="train") if row.site in wanted)
            if not rows:
                raise DataError(
                    f"no training rows of {', '.join(sorted(wanted))}",
                    who=str(dataset.folder),
                    advice="check data and dataset_sites in policy.toml",
                )
            if len(rows) > limits.MAX_RECORDS:
                raise DataError(
                    f"{len(rows)} training rows, at most {limits.MAX_RECORDS} can be summed exactly enough",
                    who=str(dataset.folder),
                    advice="split them between several sites",
                )
            self._rows = dataset, rows
        return self._rows

    def _declared(self, row: Record) -> Record:
        """Return a row without the modalities this site does not declare to feed."""
        declared = self._policy.modalities
        return replace(
            row,
            text=row.text if Modality.TEXT in declared else None,
            image=row.image if Modality.IMAGE in declared else None,
            audio=row.audio if Modality.AUDIO in declared else None,
        )
