"""Who shares masks and secrets with whom in one round: everybody, or a k-regular graph that nobody chose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from fedfuse_shared import limits

COMPLETE = 0
"""Number of neighbours that stands for the complete graph."""


class Graph:
    """The graph over U1: complete, or the members on a circle in random order, each next to k/2 on either side.

    The order comes from hashes of the context and of everybody's signed keys together with each name (Bell et al.
    2020, section 3.1, a Harary graph under a random permutation). A lying server can try many sets of members
    until it likes the order: beyond the complete graph only semi-honest servers are covered.

    Args:
        seed: Hash of U1 and all its keys in one context (hexadecimal).
        members: U1.
        neighbours: k, even; ``COMPLETE`` for the complete graph.
    """

    def __init__(self, seed: str, members: Iterable[str], neighbours: int) -> None:
        self._half = neighbours // 2
        head = limits.LABEL_GRAPH + b"\0" + bytes.fromhex(seed)
        names = sorted(members)
        if neighbours != COMPLETE:
            names.sort(key=lambda name: hashlib.sha256(head + name.encode()).digest())
        self._order = tuple(names)
        self._places = {name: place for place, name in enumerate(names)}
        self._complete = neighbours == COMPLETE or neighbours >= len(names) - 1

    def around(self, name: str) -> frozenset[str]:
        """Return a member's neighbourhood: its neighbours and itself."""
        if self._complete:
            return frozenset(self._order)
        here = self._places[name]
        size = len(self._order)
        steps = range(-self._half, self._half + 1)
        return frozenset(self._order[(here + step) % size] for step in steps)
