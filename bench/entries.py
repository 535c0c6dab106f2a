"""What is measured; design page 8 numbers the entries. Entries of later work are listed in bench/README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import privacy
import secagg
import training


@dataclass(frozen=True)
class Entry:
    """One figure: either the ratio of two timed calls, or an exact count."""

    name: str
    what: str
    peer: str
    goal: float
    lower_is_better: bool
    unit: str = "x"
    pair: Callable[[], tuple[Callable[[], object], Callable[[], object]]] = lambda: (
        lambda: None,
        lambda: None,
    )
    exact: Callable[[], float] | None = None

    def ratio(self, ours: float, theirs: float) -> float:
        """Return the figure of one pair of runs, in seconds."""
        return ours / theirs if self.lower_is_better else theirs / ours


ENTRIES = [
    Entry(
        "P1",
        "masking 10M words for 20 neighbours, one core",
        "flwr 1.41.0 SecAgg+",
        8,
        lower_is_better=False,
        pair=secagg.masking_against_flower,
    ),
    Entry(
        "P1b",
        "20 masks over 10M words, one core",
        "raw AES-256-CTR plus add in cache",
        0.8,
        lower_is_better=False,
        pair=secagg.masking_against_raw_aes,
    ),
    Entry(
        "P1c",
        "the same on two cores",
        "one core",
        1.3,
        lower_is_better=False,
        pair=secagg.two_cores_against_one,
    ),
    Entry(
        "P1q",
        "quantising 10M coordinates",
        "numpy on whole arrays",
        5,
        lower_is_better=False,
        pair=secagg.quantising_against_numpy,
    ),
    Entry(
        "P2",
        "server unmasking, 50 sites, complete graph, 10 % dropped, 1M words",
        "flwr 1.41.0 SecAgg+",
        20,
        lower_is_better=False,
        pair=secagg.unmasking_against_flower,
    ),
    Entry(
        "P2m",
        "memory of unmasking 1M words at 50 sites",
        "at 10 sites",
        1.1,
        lower_is_better=True,
        exact=secagg.memory_of_opening,
    ),
    *(
        Entry(
            f"P4.{name}",
            f"DP-SGD step, {name}, 640 rows at q = 0.5, one thread",
            "plain SGD step",
            2,
            lower_is_better=True,
            pair=training.against_plain(name),
        )
        for name in training.MODELS
    ),
    *(
        Entry(
            f"P4h.{name}",
            f"DP-SGD step, {name}, 640 rows at q = 0.5, one thread",
            "Opacus 1.6.0, default hooks",
            1,
            lower_is_better=True,
            pair=training.against_hooks(name),
        )
        for name in training.MODELS
    ),
    Entry(
        "P7",
        "bytes up per site and round, 100k coordinates, 20-bit ring",
        "float32 update",
        0.65,
        lower_is_better=True,
        exact=secagg.bytes_up,
    ),
    Entry(
        "P11",
        "integer noise of deviation 10^6, one core",
        "float64 normals of the same AES generator",
        0.5,
        lower_is_better=False,
        pair=privacy.integers_against_floats,
    ),
    Entry(
        "P11s",
        "the same, per second (depends on the machine)",
        "10M integers per second",
        10,
        lower_is_better=False,
        unit="M/s",
        exact=privacy.millions_a_second,
    ),
]
