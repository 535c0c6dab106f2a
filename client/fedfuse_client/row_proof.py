"""Whether a record's gradient is the same, to the last bit, in every row of a microbatch and in several shapes.

Where it is, records may be packed densely: no record's part then depends on how many were drawn before it. A
difference in the order of a sum can hide at usual weights, because a softmax swallows it. A server could send weights
that show it. So weights that cancel are tried as well, at which rounding alone decides.

What is compared are all numbers that a record's part of a sum is made of, and its norm. The sum over records is in
float64, whose order ``CLIP_MARGIN`` covers. Kernels choose the order of a sum by shape, alignment and number of
threads; libraries do not promise the same number of threads each time unless it is one, so with more nothing is proven.
"""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor, nn

from fedfuse_client.gradient_modes import MODES, GradientMode, Microbatch
from fedfuse_client.gradients import Dense, Factored
from fedfuse_client.synthetic import cancelling, shaken

_SCALES: Final = (1.0, 1e6)
_SHAPES: Final = 4  # each half the one before
_SMALLEST: Final = 16


def shapes_alike(name: str, model: nn.Module, batch: Microbatch, other: Microbatch) -> tuple[int, ...]:
    """Return the sizes of microbatch between which, and in whose every row, a mode gives a record the same bits.

    Args:
        name: A mode in :data:`MODES` that was proven for the model.
        model: Left as it is.
        batch: Synthetic records in the largest shape.
        other: As many others.

    Returns:
        The largest shape first; empty if a record's row matters in that one already.
    """
    count = len(batch.labels)
    if torch.get_num_threads() != 1:
        return ()
    shapes = [count, *(size for part in range(1, _SHAPES) if (size := count >> part) >= _SMALLEST)]
    records = _records(batch, other)
    first = torch.arange(count) % len(records.labels)
    for weights in (shaken(model), *(cancelling(model, scale) for scale in _SCALES)):
        mode = MODES[name](weights)
        found = _numbers(mode, _rows(records, first))
        if found is None:
            return ()
        known = [each[: len(records.labels)].clone() for each in found]
        shapes = [size for size in shapes if _same(mode, records, known, size)]
        if count not in shapes:
            return ()
    return tuple(shapes)


def _records(batch: Microbatch, other: Microbatch) -> Microbatch:
    """Return three records, two of which have every modality if the microbatches are synthetic ones."""
    places = [(batch, 0), (other, 8 % len(other.labels)), (other, 5 % len(other.labels))]
    inputs = tuple(
        torch.stack([source.inputs[column][row] for source, row in places])
        for column in range(len(batch.inputs))
    )
    return Microbatch(inputs, torch.stack([source.labels[row] for source, row in places]))


def _rows(records: Microbatch, which: Tensor) -> Microbatch:
    return Microbatch(tuple(each[which] for each in records.inputs), records.labels[which])


def _same(mode: GradientMode, records: Microbatch, known: list[Tensor], size: int) -> bool:
    """Return whether each record is what is known of it in every row of one shape."""
    kinds = len(records.labels)
    for shift in range(kinds):
        which = (torch.arange(size) + shift) % kinds
        found = _numbers(mode, _rows(records, which))
        if found is None or not all(map(torch.equal, found, (each[which] for each in known))):
            return False  # NaN is equal to nothing, and proves nothing
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
