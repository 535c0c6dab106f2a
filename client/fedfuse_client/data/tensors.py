"""Records as tensors: decoded and put through the fixed front ends when first asked for, then kept in memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedfuse_client.data.decoding import decode_audio, decode_image, decode_text
from fedfuse_client.microbatches import row_of
from fedfuse_shared.config.base import Modality
from fedfuse_shared.errors import DataError
from fedfuse_shared.models.classifier import MODALITIES
from fedfuse_shared.models.encoders import build_encoder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fedfuse_client.data.manifest import Record
    from fedfuse_shared.config.model import ModelConfig

_LOG: Final = logging.getLogger(__name__)


class Batch(TypedDict):
    """What a model and its loss need; features of absent modalities are zeros."""

    text: Tensor
    image: Tensor
    audio: Tensor
    present: Tensor
    label: Tensor


class RecordTensors(Dataset[Batch]):
    """Features of records for one model, computed once each.

    Args:
        folder: The data folder the records' paths are relative to.
        records: What :func:`fedfuse_client.data.manifest.load_dataset` gave, or some of it.
        config: The model, whose encoders' front ends are applied.
    """

    def __init__(self, folder: Path, records: Sequence[Record], config: ModelConfig) -> None:
        self._folder = folder
        self._records = tuple(records)
        self._config = config
        self._fronts = {m: build_encoder(config, m) for m in MODALITIES if m in config.encoders}
        count = len(self._records)
        self._features = {m: torch.zeros(count, 0) for m in MODALITIES}
        for m, encoder in self._fronts.items():
            self._features[m] = torch.zeros(count, *encoder.shape, dtype=encoder.dtype)
        self._present = torch.zeros(count, len(MODALITIES), dtype=torch.bool)
        self._labels = torch.tensor([record.label for record in self._records], dtype=torch.int64)
        self._done = bytearray(count)
        self._broken: dict[int, DataError] = {}
        self._places: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def places(self, size: int) -> tuple[int, ...]:
        """Return the row every record takes in microbatches of a size, by index (``microbatches``)."""
        if size not in self._places:
            self._places[size] = tuple(row_of(record.id, size) for record in self._records)
        return self._places[size]

    def __getitem__(self, index: int) -> Batch:
        """Return one record's features, without a batch axis.

        Raises:
            DataError: one of its files cannot be used.
        """
        batch = self.batch([index])
        return Batch(
            text=batch["text"][0],
            image=batch["image"][0],
            audio=batch["audio"][0],
            present=batch["present"][0],
            label=batch["label"][0],
        )

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the features of several records, one row each in the order given.

        Raises:
            DataError: a file of one of them cannot be used.
        """
        if not self._all_done(indices):
            for index in indices:
                self._load(index)
        rows = torch.as_tensor(indices, dtype=torch.int64)
        text, image, audio = (self._features[m].index_select(0, rows) for m in MODALITIES)
        return Batch(
            text=text,
            image=image,
            audio=audio,
            present=self._present.index_select(0, rows),
            label=self._labels.index_select(0, rows),
        )

    def usable(self, indices: Sequence[int]) -> list[int]:
        """Return those of the records whose files can be used; each of the others is logged once, at the site."""
        if self._all_done(indices):
            return list(indices)
        good = []
        for index in indices:
            try:
                known = index in self._broken
                self._load(index)
            except DataError as problem:
                if not known:
                    _LOG.warning("row %d left out of training: %s", self._records[index].row, problem)
            else:
                good.append(index)
        return good

    def _all_done(self, indices: Sequence[int]) -> bool:
        return all(map(self._done.__getitem__, indices))

    def _load(self, index: int) -> None:
        if self._done[index]:
            return
        if index in self._broken:
            raise self._broken[index]
        try:
            found = {m: self._decode(self._records[index], m) for m in self._fronts}
        except DataError as problem:
            self._broken[index] = problem
            raise
        except Exception as failure:
            # Whatever one record does, memory included, it must not take the others' part in the sum along.
            unusable = DataError(f"cannot be used ({type(failure).__name__}: {failure})")
            self._broken[index] = unusable
            raise unusable from failure
        for m, values in found.items():
            if values is not None:
                self._features[m][index] = values
                self._present[index, MODALITIES.index(m)] = True
        self._done[index] = 1

    def _decode(self, record: Record, modality: Modality) -> Tensor | None:
        front = self._fronts[modality].front
        if modality is Modality.TEXT:
            return None if record.text is None else front(decode_text(record.text))
        if modality is Modality.IMAGE:
            return (
                None
                if record.image is None
                else front(decode_image(self._folder / record.image, self._config.image))
            )
        return (
            None
            if record.audio is None
            else front(decode_audio(self._folder / record.audio, self._config.audio))
        )


def collate(items: Sequence[Batch]) -> Batch:
    """Return records as one batch, for a DataLoader over :class:`RecordTensors`."""
    return Batch(
        text=torch.stack([item["text"] for item in items]),
        image=torch.stack([item["image"] for item in items]),
        audio=torch.stack([item["audio"] for item in items]),
        present=torch.stack([item["present"] for item in items]),
        label=torch.stack([item["label"] for item in items]),
    )
