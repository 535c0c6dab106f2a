"""Counts that sites release of their own test rows: where they stand in a round's vector, and what they say.

Each evaluated record adds one to exactly one count, so adding or removing a record changes the counts by 1 in L2
norm. A site adds integer Gaussian noise to every count before it is masked, also where it has no test rows; only the
sum over sites is opened. The model evaluated is the one the round starts from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedfuse_shared.config.base import Frozen
from fedfuse_shared.config.evaluation import Detail
from fedfuse_shared.crypto.keystream import Words
from fedfuse_shared.offer import Offer

Counts = NDArray[np.int64]
"""Shape ``(cells,)``, in the order of :class:`Detail`."""


def tally(total: Words, offer: Offer) -> tuple[int, ...]:
    """Return the noised counts in an opened sum, none where nothing was evaluated; one may lie below zero."""
    if not offer.counts:
        return ()
    spare = 32 - offer.ring_bits
    signed = (total[-offer.counts :] << np.uint32(spare)).view(np.int32) >> np.int32(spare)
    return tuple(int(count) for count in signed)


class Evaluated(Frozen):
    """What noised counts say of a model."""

    accuracy: float | None
    """Share classified rightly, between 0 and 1; None where noise left no rows."""
    deviation: float | None
    """Standard deviation the noise alone gives it; None likewise, or where too few rows make it meaningless."""
    rows: int
    """Evaluated rows, noised."""


def summarise(counts: Sequence[int], detail: Detail, noise: float) -> Evaluated:
    """Return accuracy, its deviation and the number of rows.

    Args:
        counts: As opened.
        detail: What they count.
        noise: Standard deviation of the noise on each opened count: a site's, times the root of the survivors.
    """
    size = math.isqrt(len(counts))
    right = counts[1:] if detail is Detail.ACCURACY else counts[:: size + 1]
    good, rows = sum(right), sum(counts)
    if rows <= 0:
        return Evaluated(accuracy=None, deviation=None, rows=rows)
    wrong, cells = rows - good, len(counts)
    # To first order: d(good / rows) = (wrong d(good) - good d(wrong)) / rows^2.
    variance = (wrong**2 * len(right) + good**2 * (cells - len(right))) * noise**2 / rows**4
    meaningful = noise * math.sqrt(cells) < rows
    return Evaluated(
        accuracy=min(1.0, max(0.0, good / rows)),
        deviation=math.sqrt(variance) if meaningful else None,
        rows=rows,
    )
