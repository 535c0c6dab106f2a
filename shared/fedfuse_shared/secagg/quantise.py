"""Updates as ring elements: fixed point, two's complement modulo 2^b, and back from the opened sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedfuse_shared.config.base import Modality
from fedfuse_shared.crypto.keystream import Words
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.offer import Offer, Segment

MIN_CONTRIBUTORS = 2
"""A segment that fewer sites feed is left unchanged: its average would be one site's noise."""

_CHUNK = 2**15
"""Coordinates quantised at a time: what is copied around stays in a core's own cache."""


def tail_modalities(layout: Sequence[Segment]) -> tuple[Modality, ...]:
    """Return the modalities whose contributors the tail of the vector counts, in a fixed order."""
    return tuple(sorted({segment.modality for segment in layout if segment.modality is not None}))


def vector_length(offer: Offer) -> int:
    """Return the number of ring words of one masked vector: the update, its tail, and this round's counts."""
    return offer.dimension() + len(tail_modalities(offer.layout)) + offer.counts


def quantise(
    update: NDArray[np.float32],
    declared: frozenset[Modality],
    offer: Offer,
    counts: NDArray[np.int64] | None = None,
) -> Words:
    """Return an update of shape ``(d,)`` as words ``(d + tail + counts,)``; their low ``ring_bits`` bits count.

    Each coordinate is clamped to plus or minus ``clip_range`` and rounded to the nearest of ``scale`` steps per
    unit. The tail says 1 for each modality the site *statically declares* and 0 otherwise; nothing in it comes from
    records. Non-finite coordinates count as zero: after the batch is drawn nothing may refuse. ``counts``, shape
    ``(offer.counts,)``, are noised already (``fedfuse_shared.evaluation``).

    Raises:
        ProtocolError: the update has another length than the offer's layout, or counts are missing.
    """
    dimension = offer.dimension()
    if update.shape != (dimension,):
        raise ProtocolError(f"update of shape {update.shape} for a layout of {dimension} coordinates")
    words = np.empty(vector_length(offer), dtype=np.uint32)
    signed = words.view(np.int32)
    buffer = np.empty(_CHUNK, dtype=np.float64)
    limit = offer.clip_range * offer.scale
    for start in range(0, dimension, _CHUNK):
        part = update[start : start + _CHUNK]
        grid = buffer[: len(part)]
        np.multiply(part, offer.scale, out=grid, dtype=np.float64)
        if not math.isfinite(grid.sum()):  # one cheap look at all of them; finite float32s cannot overflow it
            grid[~np.isfinite(part)] = 0.0
        np.clip(grid, -limit, limit, out=grid)
        np.rint(grid, out=grid)
        np.copyto(signed[start : start + len(part)], grid, casting="unsafe")
    _fill_tail(words, declared, offer, counts)
    return words


def as_words(
    integers: NDArray[np.int64],
    declared: frozenset[Modality],
    offer: Offer,
    counts: NDArray[np.int64] | None = None,
) -> Words:
    """Return integers of shape ``(d,)``, noise included, as words ``(d + tail + counts,)`` of the ring.

    Nothing but the ring comes after the noise: no clamp, no rounding (docs/privacy-aggregate.md).

    Raises:
        ProtocolError: another length than the offer's layout, or counts are missing.
    """
    dimension = offer.dimension()
    if integers.shape != (dimension,):
        raise ProtocolError(f"sum of shape {integers.shape} for a layout of {dimension} coordinates")
    words = np.empty(vector_length(offer), dtype=np.uint32)
    words[:dimension] = integers.astype(np.uint32)  # modulo 2^32
    _fill_tail(words, declared, offer, counts)
    return words


def _fill_tail(
    words: Words, declared: frozenset[Modality], offer: Offer, counts: NDArray[np.int64] | None
) -> None:
    start = offer.dimension()
    tail = [modality in declared for modality in tail_modalities(offer.layout)]
    words[start : start + len(tail)] = tail
    if offer.counts:
        if counts is None or counts.shape != (offer.counts,):
            raise ProtocolError(f"no {offer.counts} counts for a round that evaluates")
        words[start + len(tail) :] = counts.astype(np.uint32)


def average(total: Words, offer: Offer, survivors: int) -> tuple[NDArray[np.float32], dict[Modality, int]]:
    """Return the mean update of shape ``(d,)`` and how many survivors declared each modality.

    A segment is divided by the survivors that declared its modality, the others by all survivors. A count that
    exceeds the survivors is a lie of one of them, and nobody can tell whose: such segments are left unchanged.
    """
    dimension = offer.dimension()
    modalities = tail_modalities(offer.layout)
    spare = np.uint32(32 - offer.ring_bits)
    tail = total[dimension : dimension + len(modalities)] << spare >> spare
    counts = {modality: int(word) for modality, word in zip(modalities, tail, strict=True)}
    counts = {modality: count if count <= survivors else 0 for modality, count in counts.items()}
    mean = np.zeros(dimension, dtype=np.float32)
    start = 0
    for segment in offer.layout:
        contributors = survivors if segment.modality is None else counts[segment.modality]
        if contributors >= MIN_CONTRIBUTORS:
            part = slice(start, start + segment.size)
            # Two's complement of b bits: the sign bit is moved to the top and drawn down again.
            signed = (total[part].astype(np.uint32, copy=False) << spare).view(np.int32) >> np.int32(spare)
            mean[part] = signed / (offer.scale * contributors)
        start += segment.size
    return mean, counts
