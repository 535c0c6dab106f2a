"""What a site counts of its own test rows: exactly one count per row, clamped, and noised before it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fedfuse_client.microbatches import microbatches
from fedfuse_shared.config.evaluation import Detail
from fedfuse_shared.evaluation import Counts
from fedfuse_shared.privacy.integer_noise import IntegerGaussian
from fedfuse_shared.privacy.noise import NoiseSource
from fedfuse_shared.secagg.ring import most_counted

if TYPE_CHECKING:
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_shared.models.classifier import MultimodalClassifier
    from fedfuse_shared.offer import Offer


def count(model: MultimodalClassifier, data: RecordTensors, offer: Offer, batch: int) -> Counts:
    """Return how many rows fall into each count of an offer, shape ``(offer.counts,)``; this is secret.

    A record that cannot be used is in none. What is predicted for one does not depend on who else is there: each has
    its own row of a batch of one shape (``microbatches``).
    """
    classes = len(offer.model.classes)
    whole = offer.evaluation is None or offer.evaluation.detail is not Detail.ACCURACY
    # With thousands of classes a matrix that nobody asked for takes a gigabyte.
    cells = torch.zeros(classes**2 if whole else 2, dtype=torch.int64)
    rows = data.usable(range(len(data)))
    with torch.no_grad():
        for filled in microbatches(rows, data.places(batch), batch):
            shown = data.batch(filled.rows)
            logits = model(shown["text"], shown["image"], shown["audio"], shown["present"])
            label, said = shown["label"], logits.argmax(dim=1)
            cell = label * classes + said if whole else (label == said).to(torch.int64)
            cells += torch.bincount(cell[torch.tensor(filled.counted)], minlength=len(cells))
    return cells.numpy()


def noised(counts: Counts, offer: Offer) -> Counts:
    """Return counts clamped to what the ring holds, plus this site's integer noise on each.

    Formal guarantee: a row adds one to one count, and clamping moves no two counts further apart, so the sum has L2
    sensitivity 1 to adding or removing a row.

    Raises:
        ConfigError: the ring has no room, which the offer's check has refused before.
    """
    asked = offer.evaluation
    if asked is None:
        raise RuntimeError("counts of an offer that evaluates nothing")
    most = most_counted(len(offer.participants), asked.noise_share, offer.ring_bits)
    noise = IntegerGaussian(asked.noise_share).draw(NoiseSource.fresh(), len(counts))
    clamped: Counts = np.clip(counts, 0, most)
    return clamped + noise
