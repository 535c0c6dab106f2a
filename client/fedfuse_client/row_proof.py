"""Whether a record's gradient is the same, to the last bit, in every row of a microbatch and in several shapes.

Where it is, records may be packed densely: no record's part then depends on how many were drawn before it. A
difference in the order of a sum can hide at usual weights, because a softmax swallows it. A server could send weights
that show it. So weights that cancel are tried as well, at which rounding alone decides.

What is compared are all numbers that a record's part of a sum is made of, and its norm. The sum over records is in
float64, whose order ``CLIP_MARGIN`` covers. Kernels choose the order of a sum by shape, alignment and number of
threads; libraries promise the same number each time only if it is one, so with more nothing is proven.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from fedfuse_client.gradient_modes import MODES, GradientMode, Microbatch
from fedfuse_client.gradient_proof import spoilt
from fedfuse_client.gradients import Dense, Factored
from fedfuse_client.synthetic import cancelling, shaken

_SCALES: Final = (1.0, 1e6)
_KEPT: Final = 3  # records that are compared
_STEP: Final = 16  # sizes are multiples of it
_HELD: Final = 2**20
"""Numbers of float32 that a larger microbatch may hold of its records' gradients: about a processor's cache."""


def shapes_alike(
    name: str, model: nn.Module, batch: Microbatch, other: Microbatch, expected: int = 0
) -> tuple[int, ...]:
    """Return the sizes of microbatch between which, and in whose every row, a mode gives a record the same bits.

    Args:
        name: A mode in :data:`MODES` that was proven for the model.
        model: Left as it is.
        batch: Synthetic records in the shape it was proven in.
        other: As many others.
        expected: Records that a step draws on average; if their gradients are small, one shape shall hold them all.

    Returns:
        The largest first; empty if a record's row matters in the given shape already.
    """
    count = len(batch.labels)
    if torch.get_num_threads() != 1:
        return ()
    pool = _pool(batch, other)
    shapes: list[int] = []
    for weights in (shaken(model), *(cancelling(model, scale) for scale in _SCALES)):
        mode = MODES[name](weights)
        found = _numbers(mode, _rows(pool, _places(count, 0, len(pool.labels))))
        if found is None:
            return ()
        shapes = shapes or _sizes(count, expected, sum(each[0].numel() for each in found))
        known = [each[:_KEPT].clone() for each in found]
        shapes = [size for size in shapes if _same(mode, pool, known, size)]
        if count not in shapes:
            return ()
    return tuple(shapes)


def _sizes(count: int, expected: int, numbers: int) -> list[int]:
    """Return the sizes to try, the largest first.

    Args:
        count: The one that must pass.
        expected: Records that a step draws on average.
        numbers: What is held of one record.
    """
    # Draws vary by less than the root of their mean; who does not fit goes into a smaller one.
    whole = _STEP * math.ceil((expected + math.sqrt(expected)) / _STEP)
    whole = min(whole, _HELD // numbers // _STEP * _STEP)
    larger = [size for part in range(4) if (size := whole - part * _STEP) > count]
    return [*larger, count, *(count >> n for n in (1, 2) if count >> n >= _STEP)]


def _pool(batch: Microbatch, other: Microbatch) -> Microbatch:
    """Return the records to compare, two of which have every modality, and after them all of two microbatches."""
    count = len(batch.labels)
    mates = spoilt(other)
    which = torch.tensor([0, count + 8 % (count - 1), 5 % (count - 1), *range(2 * count)])
    inputs = tuple(torch.cat(pair)[which] for pair in zip(batch.inputs, mates.inputs, strict=True))
    return Microbatch(inputs, torch.cat([batch.labels, mates.labels])[which])


def _rows(pool: Microbatch, which: Tensor) -> Microbatch:
    return Microbatch(tuple(each[which] for each in pool.inputs), pool.labels[which])


def _places(size: int, shift: int, pool: int) -> Tensor:
    """Return which record of the pool is in each row: those compared in turn, and every fourth row another."""
    rows = torch.arange(size)
    turn = (rows + shift) % (_KEPT + 1)
    mates = _KEPT + (rows + shift * size) % (pool - _KEPT)
    return torch.where(turn < _KEPT, turn, mates)


def _same(mode: GradientMode, pool: Microbatch, known: list[Tensor], size: int) -> bool:
    """Return whether each record compared is what is known of it, in every row of one shape."""
    for shift in range(_KEPT + 1):
        which = _places(size, shift, len(pool.labels))
        kept = which < _KEPT
        found = _numbers(mode, _rows(pool, which))
        if found is None:
            return False
        # NaN is equal to nothing, and proves nothing.
        if not all(
            torch.equal(mine[kept], each[which[kept]]) for mine, each in zip(found, known, strict=True)
        ):
            return False
    return True


def _numbers(mode: GradientMode, batch: Microbatch) -> list[Tensor] | None:
    """Return all that records' parts of a sum are made of, and their norms, each ``(batch, ...)``, if it is known."""
    found: list[Tensor] = []
    for each in mode.gradients(batch):
        if isinstance(each, Dense):
            found.append(each.rows)
        elif isinstance(each, Factored):
            found += [each.left, each.right]
        else:
            return None
        found.append(each.squared_norms())
    return found
