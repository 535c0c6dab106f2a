"""The simulator's examiner: predicts its test rows with given weights, per subset of modalities."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fedfuse_client.data.manifest import Dataset
from fedfuse_client.data.tensors import Batch, RecordTensors
from fedfuse_server.home import RunHome
from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.model import ModelConfig
from fedfuse_shared.errors import DataError
from fedfuse_shared.models import MODALITIES, build_model, flatten, load_flat, load_model
from fedfuse_simulations.scoring import Labels, Scores, confusion, score, subset_name, subsets_of

_BATCH = 512


class Examiner:
    """Scores weights of one model on a data set's test rows.

    Args:
        config: The model.
        dataset: Its test rows, of all sites together, are examined.
    """

    def __init__(self, config: ModelConfig, dataset: Dataset) -> None:
        if tuple(dataset.info.classes) != tuple(config.classes):
            raise DataError(
                "has other classes than the model",
                who=str(dataset.folder),
                advice="use data of the same task",
            )
        rows = dataset.select(split="test")
        if not rows:
            raise DataError("has no test rows", who=str(dataset.folder))
        self._model = build_model(config, 0)
        self._data = RecordTensors(dataset.folder, rows, config)
        self._modalities = [m for m in MODALITIES if m in config.encoders]

    def examine(self, weights: NDArray[np.float32]) -> Scores:
        """Return the scores of weights of shape ``(d,)``.

        Raises:
            DataError: a test row's file cannot be used.
        """
        load_flat(self._model, weights)
        columns = [MODALITIES.index(m) for m in self._modalities]
        labels, present = [], []
        for batch in self._batches():
            labels.append(batch["label"].numpy())
            present.append(batch["present"][:, columns].all(dim=1).numpy())
        label, complete = np.concatenate(labels), np.concatenate(present)
        predicted = self._predict(self._modalities)
        subsets = {}
        if complete.any():
            for chosen in subsets_of(self._modalities):
                seen = predicted if len(chosen) == len(self._modalities) else self._predict(chosen)
                name = subset_name(chosen, self._modalities)
                subsets[name] = score(label[complete], seen[complete])
        return Scores(
            all_rows=score(label, predicted),
            complete_rows=score(label[complete], predicted[complete]) if complete.any() else None,
            subsets=subsets,
            confusion=confusion(label, predicted, len(self._model.config.classes)),
        )

    def examine_published(self, home: RunHome) -> Scores:
        """Return the scores of a run's published model.

        Raises:
            DataError: the model file cannot be used.
        """
        model, _ = load_model(home.model_file)
        return self.examine(flatten(model))

    def _predict(self, seen: list[Modality] | tuple[Modality, ...]) -> Labels:
        """Return the predicted classes when only some modalities are shown, the others treated as missing."""
        shown = torch.tensor([m in seen for m in MODALITIES])
        found = []
        with torch.no_grad():
            for batch in self._batches():
                present = batch["present"] & shown
                logits = self._model(batch["text"], batch["image"], batch["audio"], present)
                found.append(logits.argmax(dim=1).numpy())
        return np.concatenate(found)

    def _batches(self) -> Iterator[Batch]:
        for start in range(0, len(self._data), _BATCH):
            yield self._data.batch(range(start, min(start + _BATCH, len(self._data))))
