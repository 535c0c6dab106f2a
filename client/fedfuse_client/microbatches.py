"""Records in microbatches, so that what a record adds depends on that record alone, whoever else was drawn.

Matrix kernels may round one row of a batch otherwise than another. If records are packed one behind the other, one
more record moves all those after it, and a server that chooses the weights could make every one of them count
differently. So records are packed like that only where a row and a shape are proven to change no bit (``row_proof``).
Everywhere else a record's row is a hash of its id: records that share a row go into different microbatches.

Rows nobody fills hold copies that do not count. Other rows do not touch a record's gradient by a single bit: that is
proven at start-up for either way (``gradient_proof``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from fedfuse_shared import limits

_SPARE: Final = 4  # one part in so many of a microbatch may be left free before a smaller one is taken


@dataclass
class Filled:
    """One microbatch: who is in it, and which rows count."""

    rows: list[int]
    """A record for every row."""
    counted: list[bool] = field(default_factory=list)


def row_of(record_id: str, size: int) -> int:
    """Return the row of a microbatch of that size which a record always takes."""
    digest = hashlib.sha256(limits.LABEL_ROW + record_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % size


def microbatches(drawn: Sequence[int], places: Sequence[int], size: int) -> Iterator[Filled]:
    """Yield microbatches that hold every drawn record once, each in its own row.

    Args:
        drawn: Indices of the records.
        places: The row of every record of the data set, by index.
        size: Rows of a microbatch.
    """
    stacks: list[list[int]] = [[] for _ in range(size)]
    for index in drawn:
        stacks[places[index]].append(index)
    for depth in range(max(map(len, stacks), default=0)):
        here = [stack[depth] if depth < len(stack) else None for stack in stacks]
        filler = next(index for index in here if index is not None)
        yield Filled(
            rows=[filler if index is None else index for index in here],
            counted=[index is not None for index in here],
        )


def densely(drawn: Sequence[int], shapes: Sequence[int]) -> Iterator[Filled]:
    """Yield microbatches that hold every drawn record once, one behind the other.

    Args:
        drawn: Indices of the records.
        shapes: Sizes of microbatches, the largest first, between which no record's gradient differs by a bit.
    """
    start = 0
    while start < len(drawn):
        rest = len(drawn) - start
        size = _shape(rest, shapes)
        rows = list(drawn[start : start + size])
        spare = size - len(rows)
        yield Filled([*rows, *[rows[0]] * spare], [True] * len(rows) + [False] * spare)
        start += size


def _shape(rest: int, shapes: Sequence[int]) -> int:
    """Return the smallest shape that holds the rest with little to spare, or else the largest that is filled."""
    for size in reversed(shapes):
        if 0 <= size - rest <= size // _SPARE:
            return size
    return next((size for size in shapes if size <= rest), shapes[-1])
