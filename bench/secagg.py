"""Secure aggregation: masks, quantising and bytes, against Flower's SecAgg+ or a limit of the machine."""

from __future__ import annotations

import copy
import os
import tracemalloc
from collections.abc import Callable

import numpy as np

Pair = tuple[Callable[[], object], Callable[[], object]]

DIMENSION = 10_000_000
NEIGHBOURS = 20


def masking_against_flower() -> Pair:
    """One vector's masks, keys agreed anew, by one core: ours, and Flower's client functions."""
    from peers.environment import Peer

    from fedfuse_shared.crypto.derive import End
    from fedfuse_shared.crypto.keys import public_of
    from fedfuse_shared.crypto.keystream import apply_masks
    from fedfuse_shared.secagg.masking import MaskOwner, pair_masks, self_mask

    words = np.zeros(DIMENSION, np.uint32)
    owner = MaskOwner("ab" * 32, "site50", os.urandom(32))
    # Half of the names sort before the site's own, so that half of the masks are subtracted.
    peers = [End(f"site{number}", public_of(os.urandom(32))) for number in range(40, 40 + NEIGHBOURS + 1)]
    peers = [peer for peer in peers if peer.name != owner.name]
    seed = os.urandom(32)

    def ours() -> None:
        masks = [self_mask(seed, owner.context, owner.name), *pair_masks(owner, peers)]
        apply_masks(words, masks, threads=1)

    return ours, Peer("flwr", "flwr_secagg.py", "mask", DIMENSION, NEIGHBOURS).run


def masking_against_raw_aes() -> Pair:
    """Twenty masks over 10M words, against the same keystream and additions on one chunk in the core's cache."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    from fedfuse_shared.crypto.keystream import CHUNK, Mask, apply_masks

    words, keys = np.zeros(DIMENSION, np.uint32), [os.urandom(32) for _ in range(NEIGHBOURS)]
    zeros, buffer = bytes(4 * CHUNK), bytearray(4 * CHUNK + 16)
    stream = np.frombuffer(buffer, "<u4", count=CHUNK)
    part = words[:CHUNK]

    def ours() -> None:
        apply_masks(words, [Mask(key, subtract=False) for key in keys], threads=1)

    def limit() -> None:
        for key in keys:
            encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()
            for _ in range(-(-DIMENSION // CHUNK)):
                encryptor.update_into(zeros, buffer)
                np.add(part, stream, out=part)

    return ours, limit


def two_cores_against_one() -> Pair:
    """The same masks by two threads, against one."""
    from fedfuse_shared.crypto.keystream import Mask, apply_masks

    words = np.zeros(DIMENSION, np.uint32)
    masks = [Mask(os.urandom(32), subtract=False) for _ in range(NEIGHBOURS)]
    return lambda: apply_masks(words, masks, threads=2), lambda: apply_masks(words, masks, threads=1)


def quantising_against_numpy() -> Pair:
    """Ten million coordinates to ring words, against the same steps on whole arrays."""
    from support.federation import Federation

    from fedfuse_shared.offer import Segment
    from fedfuse_shared.secagg.quantise import quantise

    offer = Federation.of(3).offer(layout=(Segment(name="head", size=DIMENSION),))
    update = np.random.default_rng(0).normal(0, 0.5, DIMENSION).astype(np.float32)

    def naive() -> None:
        wide = np.nan_to_num(update.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        steps = np.rint(np.clip(wide, -offer.clip_range, offer.clip_range) * offer.scale)
        (steps.astype(np.int64) % 2**32).astype(np.uint32)

    return lambda: quantise(update, frozenset(), offer), naive


def before_opening(sites: int, dropped: int, dimension: int) -> object:
    """Return a server session that has everything but opened the sum: sites dropped after they dealt their shares."""
    from support.federation import Federation, Round

    from fedfuse_shared.offer import Segment

    federation = Federation.of(sites)
    sequence = Round(federation, federation.offer(layout=(Segment(name="head", size=dimension),)))
    everyone = list(federation.names)
    deliveries = sequence.shares(everyone, sequence.keys(everyone))
    senders = everyone[dropped:]
    words = sequence.words(np.zeros(dimension))
    for name in senders:
        sequence.send(name, words, deliveries[name])
    unmasking = sequence.agree(senders)
    for name in senders:
        sequence.server.receive_reveal(name, sequence.sites[name].reveal(unmasking[name]))
    return sequence.server


def opened(session: object) -> np.ndarray:
    """Open a session that can be opened again: its one array is copied first."""
    again = copy.copy(session)
    again._sum = session._sum.copy()  # type: ignore[attr-defined]
    return again.open()  # type: ignore[attr-defined, no-any-return]


def unmasking_against_flower() -> Pair:
    """The server's unmasking at n = 50, complete graph, 10 % dropped, a million words."""
    from peers.environment import Peer

    session = before_opening(50, 5, 1_000_000)
    if opened(session).any():
        raise RuntimeError("the sum of zeros is not zero")
    return lambda: opened(session), Peer("flwr", "flwr_secagg.py", "unmask", 50, 5, 1_000_000).run


def memory_of_opening() -> float:
    """Memory that opening takes at n = 50 over what it takes at n = 10, at a million words: 1 if it is O(d)."""

    def peak(sites: int) -> int:
        session = before_opening(sites, sites // 10, 1_000_000)
        tracemalloc.start()
        opened(session)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    return peak(50) / peak(10)


def bytes_up() -> float:
    """Bytes a site sends in one round over the bytes of its update in float32: 100k coordinates, 6 sites, 20 bits."""
    from support.federation import Federation, Round, run_round

    from fedfuse_shared.offer import Segment

    federation = Federation.of(6)
    offer = federation.offer(layout=(Segment(name="head", size=100_000),), ring_bits=20)
    sequence = Round(federation, offer)
    run_round(sequence, {n: sequence.words(np.zeros(100_000)) for n in federation.names})
    return sum(map(len, sequence.view)) / (6 * 4 * 100_000)
