"""Fixed front ends: from a decoded record to features, without parameters and without looking at any data set.

Because nothing here is learnt, a site computes features once per record and keeps them, and they cost no privacy.
Each is a function of one record alone.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

_FAINT: Final = 0.02  # gradient strength below which a cell is not brought up to full contrast
_WORD: Final = re.compile(r"\w+")


def unit(values: Tensor, *, faint: float = 1e-6) -> Tensor:
    """Return a tensor flattened and scaled to L2 norm 1, ``(n,)``, unless its norm is not far above ``faint``."""
    flat = values.flatten()
    scaled: Tensor = flat / (flat.norm() + faint)
    return scaled


def oriented_gradients(image: Tensor, *, cell: int = 4, orientations: int = 8) -> Tensor:
    """Return pooled, locally normalised gradient energy by direction, then coarse colour (Dalal & Triggs 2005).

    Args:
        image: ``(3, size, size)`` in [0, 1].
        cell: Distance between pooling windows, which are twice as wide (pixels).
        orientations: Directions of the gradient over the half circle.

    Returns:
        ``((orientations + 2) * cells**2,)`` of L2 norm 1; the two opponent colours are zero for grey images.
    """
    grey = image.mean(dim=0, keepdim=True)[None]
    padded = functional.pad(grey, (1, 1, 1, 1), mode="replicate")[0, 0]
    across = padded[1:-1, 2:] - padded[1:-1, :-2]
    down = padded[2:, 1:-1] - padded[:-2, 1:-1]
    strength = torch.hypot(across, down)
    angle = torch.atan2(down, across) % math.pi / math.pi * orientations
    low = angle.floor()
    share = angle - low  # a direction between two bins counts in both, by nearness
    bins = torch.stack((low.long() % orientations, (low.long() + 1) % orientations))
    planes = torch.zeros(orientations, *strength.shape)
    planes.scatter_(0, bins, torch.stack((strength * (1 - share), strength * share)))
    pooled = functional.avg_pool2d(planes, 2 * cell, cell, cell // 2)
    energy = pooled.square().sum(dim=0)
    nearby = functional.avg_pool2d(energy[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    shape = unit(pooled / (nearby.sqrt() + _FAINT))
    opponents = torch.stack((image[0] - image[1], (image[0] + image[1]) / 2 - image[2]))
    colour = functional.avg_pool2d(opponents, cell, cell)
    return unit(torch.cat((shape, colour.flatten())))


def spectral_shape(mel: Tensor, *, coefficients: int = 16, frames: int = 16) -> Tensor:
    """Return the course of a recording's cepstrum, its level left out and fine structure raised (liftered).

    Args:
        mel: Log-mel spectrogram ``(mels, frames)``.
        coefficients: Cosine coefficients over the mel axis that are kept, without the zeroth.
        frames: Steps in time the course is pooled to.

    Returns:
        ``(coefficients * frames,)`` of L2 norm 1.
    """
    mels = mel.shape[0]
    order = torch.arange(1, coefficients + 1, dtype=torch.float32)[:, None]
    basis = torch.cos(math.pi / mels * (torch.arange(mels) + 0.5) * order) * order.sqrt()
    course = functional.adaptive_avg_pool1d((basis @ mel)[None], frames)[0]
    return unit(course, faint=0.05)  # norms are in the hundreds; that of silence is rounding error


def words_of(text: str, limit: int) -> list[str]:
    """Return the first ``limit`` words of a text, in compatibility form and folded case."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [match.group() for _, match in zip(range(limit), _WORD.finditer(folded), strict=False)]


def hashed_words(text: str, *, limit: int, buckets: int) -> Tensor:
    """Return damped word counts in hashed buckets, ``(buckets,)`` of L2 norm 1 (Weinberger et al. 2009)."""
    counts = torch.zeros(buckets)
    for word in words_of(text, limit):
        counts[zlib.crc32(word.encode()) % buckets] += 1.0
    return unit(counts.log1p())


def byte_ids(text: str, length: int) -> Tensor:
    """Return the first UTF-8 bytes of a text as 1..256, padded with 0, ``(length,)`` int64."""
    raw = unicodedata.normalize("NFKC", text).casefold().encode()[:length]
    ids = torch.zeros(length, dtype=torch.int64)
    ids[: len(raw)] = torch.tensor(list(raw), dtype=torch.int64) + 1
    return ids


def centred(image: Tensor) -> Tensor:
    """Return an image less its own mean, shape unchanged."""
    return image - image.mean()


def standardised(mel: Tensor) -> Tensor:
    """Return a log-mel spectrogram at mean 0 and deviation 1 as one plane, ``(1, mels, frames)``."""
    return ((mel - mel.mean()) / (mel.std() + 1e-3))[None]
