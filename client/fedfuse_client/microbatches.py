"""Records in microbatches of one shape, each record always in the same row, whoever else was drawn.

Matrix kernels may round one row of a batch otherwise than another. If records were packed one behind the other, one
more record would move all those after it, and a server that chooses the weights could make every one of them count
differently: what a record adds has to depend on that record alone. So its row is a hash of its id. Records that share
a row go into different microbatches; rows nobody fills hold copies that do not count. Other rows do not touch a
record's gradient by a single bit: that is proven at start-up (``gradient_proof``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fedfuse_shared import limits


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
