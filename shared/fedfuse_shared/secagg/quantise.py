"""Updates as ring elements: fixed point, two's complement modulo 2^32, and back from the opened sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedfuse_shared.config.base import Modality
from fedfuse_shared.crypto.keystream import Words
from fedfuse_shared.errors import ConfigError, ProtocolError
from fedfuse_shared.offer import Offer, Segment

MIN_CONTRIBUTORS = 2
"""A segment that fewer sites feed is left unchanged: its average would be one site's noise."""

_CHUNK = 2**16


def largest_scale(participants: int, clip_range: float, ring_bits: int) -> float:
    """Return the finest power-of-two grid (steps per unit) on which a sum of n clamped updates cannot wrap.

    Raises:
        ConfigError: not even a grid of one step per unit fits.
    """
    room = (2 ** (ring_bits - 1) - 1) / (participants * clip_range)
    if room < 1:
        raise ConfigError(
            f"{participants} updates of range {clip_range:g} do not fit a ring of {ring_bits} bits",
            advice="lower secure_aggregation.clip_range",
        )
    return float(2 ** (int(room).bit_length() - 1))


def tail_modalities(layout: Sequence[Segment]) -> tuple[Modality, ...]:
    """Return the modalities whose contributors the tail of the vector counts, in a fixed order."""
    return tuple(sorted({segment.modality for segment in layout if segment.modality is not None}))


def vector_length(offer: Offer) -> int:
    """Return the number of ring words of one masked vector: the update and its tail."""
    return offer.dimension() + len(tail_modalities(offer.layout))


def quantise(update: NDArray[np.float32], declared: frozenset[Modality], offer: Offer) -> Words:
    """Return an update of shape ``(d,)`` as words of shape ``(d + tail,)``.

    The tail says 1 for each modality the site *statically declares* and 0 otherwise; nothing in it comes from
    records. Non-finite coordinates count as zero: after the batch is drawn nothing may refuse.

    Raises:
        ProtocolError: the update has another length than the offer's layout.
    """
    dimension = offer.dimension()
    if update.shape != (dimension,):
        raise ProtocolError(f"update of shape {update.shape} for a layout of {dimension} coordinates")
    words = np.empty(vector_length(offer), dtype=np.uint32)
    for start in range(0, dimension, _CHUNK):
        part = np.nan_to_num(
            update[start : start + _CHUNK].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0
        )
        np.clip(part, -offer.clip_range, offer.clip_range, out=part)
        np.rint(part * offer.scale, out=part)
        words[start : start + len(part)] = part.astype(np.int64).astype(np.uint32)
    words[dimension:] = [modality in declared for modality in tail_modalities(offer.layout)]
    return words


def average(total: Words, offer: Offer, survivors: int) -> tuple[NDArray[np.float32], dict[Modality, int]]:
    """Return the mean update of shape ``(d,)`` and how many survivors declared each modality.

    A segment is divided by the survivors that declared its modality, the others by all survivors. A count that
    exceeds the survivors is a lie of one of them, and nobody can tell whose: such segments are left unchanged.
    """
    dimension = offer.dimension()
    modalities = tail_modalities(offer.layout)
    counts = {modality: int(word) for modality, word in zip(modalities, total[dimension:], strict=True)}
    counts = {modality: count if count <= survivors else 0 for modality, count in counts.items()}
    signed = total[:dimension].astype(np.uint32).view(np.int32)
    mean = np.zeros(dimension, dtype=np.float32)
    start = 0
    for segment in offer.layout:
        contributors = survivors if segment.modality is None else counts[segment.modality]
        if contributors >= MIN_CONTRIBUTORS:
            part = slice(start, start + segment.size)
            mean[part] = signed[part] / (offer.scale * contributors)
        start += segment.size
    return mean, counts
