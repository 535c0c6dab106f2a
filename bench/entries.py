"""What is measured; design page 8 numbers the entries. Entries of later work are listed in bench/README.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


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


def masking_against_raw_aes() -> tuple[Callable[[], object], Callable[[], object]]:
    """Twenty masks over 10M words, against the same keystream by pyca in one call each, and numpy's add."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    from fedfuse_shared.crypto.keystream import apply_mask

    words, keys = np.zeros(10_000_000, np.uint32), [os.urandom(32) for _ in range(20)]
    zeros, buffer = bytes(2**18), bytearray(2**18 + 16)
    stream = np.frombuffer(buffer, "<u4", count=2**16)
    part = words[: 2**16]

    def ours() -> None:
        for key in keys:
            apply_mask(words, key, subtract=False)

    def limit() -> None:
        # The same amount of keystream and of addition, but always in the processor's cache.
        for key in keys:
            encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()
            for _ in range(-(-len(words) // 2**16)):
                encryptor.update_into(zeros, buffer)
                np.add(part, stream, out=part)

    return ours, limit


def bytes_up() -> float:
    """Bytes a site sends in one round over the bytes of its update in float32, at 100k coordinates and 6 sites."""
    from support.federation import Federation, Round, run_round

    from fedfuse_shared.offer import Segment

    federation = Federation.of(6)
    sequence = Round(federation, federation.offer(layout=(Segment(name="head", size=100_000),)))
    run_round(sequence, {n: sequence.words(np.zeros(100_000)) for n in federation.names})
    return sum(map(len, sequence.view)) / (6 * 4 * 100_000)


ENTRIES = [
    Entry(
        "P1b",
        "20 masks over 10M words, one core",
        "raw AES-256-CTR plus add in cache",
        0.8,
        lower_is_better=False,
        pair=masking_against_raw_aes,
    ),
    Entry(
        "P7",
        "bytes up per site and round, 100k coordinates, 32-bit ring",
        "float32 update",
        0.65,
        lower_is_better=True,
        exact=bytes_up,
    ),
]
