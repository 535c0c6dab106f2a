"""The fast implementation against the slow, obvious one: same bytes, same sums, same secrets."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import reference
from support.federation import ALL, Federation, Round, SeededBytes, run_round

from fedfuse_shared.crypto import shamir
from fedfuse_shared.crypto.keystream import CHUNK, Mask, apply_masks
from fedfuse_shared.offer import Segment
from fedfuse_shared.secagg.bounds import Bounds
from fedfuse_shared.secagg.packing import RING_BITS, pack
from fedfuse_shared.secagg.quantise import quantise

SHORT = (Segment(name="head", size=13),)


@st.composite
def rounds(draw):
    bits = draw(st.sampled_from(RING_BITS))
    if draw(st.booleans()):
        size = draw(st.integers(3, 7))
        federation, bounds = Federation.of(size), {}
    else:
        federation, bounds = Federation.of(12), Bounds(12, 3, 0, 11, 6)
    offer = federation.offer(bounds=bounds, ring_bits=bits, layout=SHORT)
    sequence = Round(federation, offer, seed=str(draw(st.integers(0, 10**6))))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = len(federation.names) - offer.min_survivors
    lost = draw(st.sets(st.sampled_from(federation.names), max_size=most))
    return sequence, numbers, lost


@settings(max_examples=40, deadline=None)
@given(rounds())
def test_masked_vectors_and_opened_sums_are_those_of_the_reference(drawn):
    sequence, numbers, lost = drawn
    offer, names = sequence.offer, sequence.offer.participants
    words = {n: numbers.integers(0, 2**32, 13, dtype=np.uint32) for n in names}
    senders = [n for n in names if n not in lost]
    total = run_round(sequence, words, senders=senders)
    bits = offer.ring_bits
    assert total.tolist() == [sum(int(words[n][i]) for n in senders) % 2**bits for i in range(13)]
    sent = [raw for raw in sequence.view if len(raw) == 2 * bits]
    for name, raw in zip(senders, sent, strict=True):
        state = sequence.sites[name].state
        publics = {p: bytes.fromhex(k.mask) for p, k in state.peers.items() if p != name}
        expected = reference.masked(
            offer.context(),
            name,
            bytes.fromhex(state.seed),
            bytes.fromhex(state.mask_private),
            publics,
            [int(word) for word in words[name]],
            bits,
        )
        assert raw == reference.packed(expected, bits)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3 * CHUNK // 2),
    st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 5),
)
@example(CHUNK, [(b"k" * 32, False)], 1)
@example(4 * CHUNK + 3, [(b"k" * 32, False)] * 9, 3)
def test_threads_and_chunks_put_on_the_same_masks(length, masks, threads):
    words = np.arange(length, dtype=np.uint32)
    apply_masks(words, [Mask(key, subtract=sign) for key, sign in masks], threads=threads)
    places = {0, length // 2, length - 1, min(CHUNK, length - 1), min(CHUNK - 1, length - 1)}
    streams = [(reference.keystream(key, length), sign) for key, sign in masks]
    for place in places:
        expected = place + sum(-s[place] if sign else s[place] for s, sign in streams)
        assert int(words[place]) == expected % 2**32


def test_many_threads_on_a_long_vector_are_one(monkeypatch):
    monkeypatch.setattr("fedfuse_shared.crypto.keystream._WORTH_A_THREAD", 1)
    masks = [Mask(bytes([n]) * 32, subtract=bool(n % 2)) for n in range(3)]
    for length in (1, 3, 4, 5, 1001, 2 * CHUNK + 1):
        one = np.zeros(length, np.uint32)
        apply_masks(one, masks, threads=1)
        for threads in (2, 3, 7):
            many = np.zeros(length, np.uint32)
            apply_masks(many, masks, threads=threads)
            assert (one == many).all()


@given(st.sampled_from(RING_BITS), st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_packing_is_one_big_integer(bits, words):
    assert pack(np.array(words, np.uint32), bits) == reference.packed(words, bits)


FLOATS = st.one_of(
    st.floats(width=32),
    st.sampled_from(
        [0.0, -0.0, 4.0, -4.0, math.nextafter(4, 5), 1e-45, 3e38, -3e38, 0.5 / 2**16, 1.5 / 2**16]
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(RING_BITS), st.integers(3, 40), st.lists(FLOATS, min_size=13, max_size=13))
def test_every_float_is_quantised_as_exact_arithmetic_says(bits, sites, values):
    offer = Federation.of(sites).offer(ring_bits=bits, layout=SHORT)
    update = np.array(values, np.float32)
    words = quantise(update, ALL, offer)[:13]
    expected = [reference.quantised(float(v), offer.clip_range, offer.scale, bits) for v in update]
    assert (words & np.uint32(2**bits - 1)).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 8), st.binary(min_size=32, max_size=32), st.integers(0, 10**6))
def test_shares_are_points_of_one_polynomial(threshold, spare, secret, seed):
    points = list(range(1, threshold + spare + 1))
    shares = shamir.split(secret, threshold, points, SeededBytes(str(seed)))
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    chosen = dict(list(values.items())[-threshold:])
    assert reference.restored(chosen) == int.from_bytes(secret, "big")
    assert shamir.combine({p: shares[p] for p in chosen}, who="a") == secret
    # Every further share lies on the polynomial through these: threshold points determine it.
    for point, value in values.items():
        moved = {p - point: v for p, v in chosen.items() if p != point}
        if len(moved) == threshold:
            assert reference.restored({p % reference.FIELD: v for p, v in moved.items()}) == value


@pytest.mark.parametrize("missing", [1, 2])
def test_fewer_shares_than_the_threshold_say_nothing(missing):
    # With one share less every secret is as likely: some polynomial of that degree fits each of them.
    shares = shamir.split(b"s" * 32, 5, [1, 2, 3, 4, 5], SeededBytes("x"))
    known = {p: int.from_bytes(shares[p], "big") for p in range(1, 6 - missing)}
    for guess in (0, 1, int.from_bytes(b"s" * 32, "big")):
        through = {0: guess, **known}
        assert reference.restored(through) == guess
