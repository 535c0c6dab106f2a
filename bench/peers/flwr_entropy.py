"""How much of a key reaches the generator of Flower's SecAgg+ masks, and what that costs; run by ``.bench/flwr``.

    .bench/flwr/bin/python bench/peers/flwr_entropy.py           seeds, overlapping lists, bytes: seconds
    .bench/flwr/bin/python bench/peers/flwr_entropy.py --search  and opens one masked vector: minutes on one core

Nothing is taken from reading alone: the functions are theirs, what goes into numpy's generator is watched. The
search stands for a server with all but one of a client's neighbours on its side, against which secure aggregation is
meant to hold: what is left on the client's vector is one pairwise mask.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from importlib.metadata import version
from unittest.mock import patch

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState, _unmask
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation import secaggplus_utils
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.supercore.primitives.asymmetric import generate_key_pairs

CLIP, TARGET, MODULUS = 8.0, 2**22, 2**32
BATCH = 2**20


def seeds_of(secrets: list[bytes]) -> np.ndarray:
    """Return the numbers that reach numpy's generator, one for each secret."""
    seen: list[int] = []
    real = np.random.RandomState

    def watched(seed: int) -> np.random.RandomState:
        seen.append(seed)
        return real(seed)

    with patch.object(np.random, "RandomState", watched):
        for secret in secrets:
            secaggplus_utils.pseudo_rand_gen(secret, MODULUS, [(1,)])
    return np.array(seen, dtype=np.uint64)


def describe(name: str, seeds: np.ndarray) -> None:
    """Print how many bits of a seed ever change, and how evenly."""
    changing = [
        bit for bit in range(64) if 0 < int((seeds >> np.uint64(bit) & np.uint64(1)).sum()) < len(seeds)
    ]
    entropy = 0.0
    for bit in changing:
        share = float((seeds >> np.uint64(bit) & np.uint64(1)).mean())
        entropy -= share * math.log2(share) + (1 - share) * math.log2(1 - share)
    print(
        f"{name}: {len(seeds)} secrets of 256 bits; seeds below 2^{int(seeds.max()).bit_length()}, ", end=""
    )
    print(f"{len(changing)} bits ever change, at most {entropy:.1f} bits of entropy")


def first_outputs(seeds: np.ndarray, count: int) -> np.ndarray:
    """Return the first 32-bit outputs of MT19937 for many seeds at once, shape ``(count, seeds)``.

    Matsumoto and Nishimura 1998: output k of a fresh generator needs words k, k + 1 and k + 397 of its
    state.
    """
    word = seeds.astype(np.uint32)
    state = {0: word}
    for place in range(1, 397 + count):
        word = np.uint32(1812433253) * (word ^ (word >> np.uint32(30))) + np.uint32(place)
        if place <= count or place >= 397:
            state[place] = word
    found = []
    for k in range(count):
        mixed = (state[k] & np.uint32(0x80000000)) | (state[k + 1] & np.uint32(0x7FFFFFFF))
        y = state[k + 397] ^ (mixed >> np.uint32(1)) ^ ((mixed & np.uint32(1)) * np.uint32(0x9908B0DF))
        y ^= y >> np.uint32(11)
        y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
        y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
        y ^= y >> np.uint32(18)
        found.append(y)
    return np.array(found)


def candidates(bits: list[int], fixed: int, start: int, count: int) -> np.ndarray:
    """Return ``count`` seeds: numbers from ``start`` on, their bits spread over those that ever change."""
    numbers = np.arange(start, start + count, dtype=np.uint64)
    seeds = np.full(count, fixed, dtype=np.uint64)
    for place, bit in enumerate(bits):
        seeds |= (numbers >> np.uint64(place) & np.uint64(1)) << np.uint64(bit)
    return seeds


def search(seeds: np.ndarray) -> None:
    """Mask a vector with one pairwise mask as the client does, and open it by trying every seed."""
    bits = [bit for bit in range(32) if 0 < int((seeds >> np.uint64(bit) & np.uint64(1)).sum()) < len(seeds)]
    fixed = int(np.bitwise_and.reduce(seeds))
    (private, _), (_, public) = generate_key_pairs(), generate_key_pairs()
    secret = generate_shared_key(private, public)
    update = np.random.default_rng().normal(0, 0.05, 8)
    quantised = quantize([update], CLIP, TARGET)[0].astype(np.int64)
    mask = secaggplus_utils.pseudo_rand_gen(secret, MODULUS, [(8,)])[0]
    masked = (quantised + mask) % MODULUS
    seen = masked.astype(np.uint32)
    began = time.perf_counter()
    total = 2 ** len(bits)
    for start in range(0, total, BATCH):
        tried = candidates(bits, fixed, start, BATCH)
        outputs = first_outputs(tried, 3)
        # A quantised coordinate lies in [0, 2^22): a wrong seed passes three such tests once in 2^30.
        good = ((seen[:3, None] - outputs) <= TARGET).all(axis=0)
        for seed in tried[good]:
            guess = np.random.RandomState(int(seed)).randint(0, MODULUS - 1, 8, dtype=np.int64)
            opened = (masked - guess) % MODULUS
            if (opened <= TARGET).all():
                seconds = time.perf_counter() - began
                right = bool((opened == quantised).all())
                print(
                    f"search: opened one masked vector in {seconds:.0f} s on one core after {start + BATCH:,} of "
                    f"{total:,} seeds ({total / (start + BATCH) * seconds:.0f} s for all); right: {right}"
                )
                return
    print(f"search: nothing found in {time.perf_counter() - began:.0f} s")


def overlapping_lists() -> None:
    """Ask a client for shares of one peer under both headings."""
    state = SecAggPlusState()
    state.nid, state.threshold = 1, 2
    state.rd_seed_share_dict = {1: b"seed of 1", 2: b"seed of 2", 3: b"seed of 3"}
    state.sk1_share_dict = {1: b"key of 1", 2: b"key of 2", 3: b"key of 3"}
    both = {Key.ACTIVE_NODE_ID_LIST: [1, 2, 3], Key.DEAD_NODE_ID_LIST: [3]}
    answer = _unmask(state, both)  # type: ignore[arg-type]
    shares = [s for nid, s in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True) if nid == 3]
    print(f"overlapping lists: asked for node 3 as active and as dead, the client answers with {shares}")


def main() -> None:
    """Print what was measured."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--search", action="store_true")
    chosen = arguments.parse_args()
    print(f"flwr {version('flwr')}, numpy {np.__version__}")
    own = seeds_of([os.urandom(32) for _ in range(4000)])
    describe("own mask (rd_seed)", own)
    pairs = []
    for _ in range(4000):
        (private, _), (_, public) = generate_key_pairs(), generate_key_pairs()
        pairs.append(generate_shared_key(private, public))
    pairwise = seeds_of(pairs)
    describe("pairwise mask (shared key)", pairwise)
    overlapping_lists()
    vector = np.zeros(100_000, dtype=np.int64)
    print(f"bytes per parameter of a masked vector: {len(ndarray_to_bytes(vector)) / len(vector):.2f}")
    sample = np.arange(5, dtype=np.uint64)
    theirs = [np.random.RandomState(int(s)).randint(0, MODULUS - 1, 3, dtype=np.int64) for s in sample]
    if (np.array(theirs) != first_outputs(sample, 3).T).any():
        raise SystemExit("the vectorised generator is not numpy's")
    if chosen.search:
        search(pairwise)


if __name__ == "__main__":
    main()
