"""Rings of 16 to 32 bits: what a masked vector is on the wire, and which rings are wide enough."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.federation import ALL, Federation

from fedfuse_shared.errors import ConfigError, ProtocolError
from fedfuse_shared.secagg.packing import RING_BITS, add_packed, pack, packed_size
from fedfuse_shared.secagg.quantise import average, quantise
from fedfuse_shared.secagg.ring import check_rounding, largest_scale, wraps

WIDTHS = st.sampled_from(RING_BITS)


@given(WIDTHS, st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_packed_words_are_added_as_they_were(bits, count, seed):
    numbers = np.random.default_rng(seed)
    words = numbers.integers(0, 2**32, count, dtype=np.uint32)
    total = numbers.integers(0, 2**32, count, dtype=np.uint32)
    packed = pack(words, bits)
    assert len(packed) == packed_size(count, bits) == -(-count // 8) * bits
    expected = total + (words & np.uint32(2**bits - 1))
    add_packed(total, packed, bits, who="a")
    assert (total == expected).all()


@pytest.mark.parametrize("bits", RING_BITS)
def test_the_bit_stream_is_little_endian(bits):
    words = np.arange(1, 9, dtype=np.uint32)
    stream = int.from_bytes(pack(words, bits), "little")
    assert [(stream >> (bits * place)) % 2**bits for place in range(8)] == words.tolist()


@pytest.mark.parametrize("bits", RING_BITS)
def test_long_vectors_cross_every_chunk(bits):
    words = np.random.default_rng(0).integers(0, 2**32, 200_003, dtype=np.uint32)
    total = np.zeros_like(words)
    add_packed(total, pack(words, bits), bits, who="a")
    assert (total == words & np.uint32(2**bits - 1)).all()


@pytest.mark.parametrize("bits", RING_BITS)
def test_a_second_spelling_and_other_lengths_are_refused_and_change_nothing(bits):
    packed = pack(np.arange(5, dtype=np.uint32), bits)
    for wrong in (packed[:-1], packed + b"\0", b"", packed[:-1] + b"\x80"):
        total = np.zeros(5, np.uint32)
        with pytest.raises(ProtocolError, match="lyon: sent a vector"):
            add_packed(total, wrong, bits, who="lyon")
        assert not total.any()


@pytest.mark.parametrize("bits", RING_BITS)
@pytest.mark.parametrize("sites", [3, 10])
def test_updates_at_the_clamp_come_back_as_their_mean_at_every_width(bits, sites):
    offer = Federation.of(sites).offer(ring_bits=bits)
    for value in (4.0, -4.0, 9.0, 0.0):
        update = np.full(offer.dimension(), value, np.float32)
        total = np.zeros(offer.dimension() + 2, np.uint32)
        for _ in range(sites):
            add_packed(total, pack(quantise(update, ALL, offer), bits), bits, who="a")
        total &= np.uint32(2**bits - 1)
        mean, counts = average(total, offer, sites)
        assert np.abs(mean - np.clip(update, -4, 4)).max() <= 0.5 / offer.scale + 1e-6
        assert set(counts.values()) == {sites}


@given(WIDTHS, st.integers(3, 10_000), st.floats(0.01, 1000))
def test_the_finest_grid_never_wraps_and_a_finer_one_would(bits, sites, clip_range):
    try:
        scale = largest_scale(sites, clip_range, bits)
    except ConfigError:
        assert sites * clip_range > (2 ** (bits - 1) - 1) / 1.0000001
        return
    # A range that is no multiple of the step is rounded up by a step at most.
    assert not wraps(sites, math.floor(clip_range * scale) / scale, scale, bits)
    assert wraps(sites, clip_range, 4 * scale, bits)


def test_a_grid_so_coarse_that_it_costs_accuracy_is_refused_with_the_numbers():
    check_rounding(0.0625, 4.0, 64.0 * 16, 16)
    with pytest.raises(ConfigError, match=r"16 bits leaves 64 steps per unit: rounding adds 0\.52%"):
        check_rounding(0.0625, 4.0, 64.0, 16)
    with pytest.raises(ConfigError, match=r"clip_range to at least 8"):
        check_rounding(2.0, 4.0, 1024.0, 32)


def test_what_rounding_adds_is_what_was_computed():
    # 200,000 coordinates of Gaussian noise on a grid whose computed inflation is 5.2 per cent.
    scale, deviation = 2.0, 0.5 / math.sqrt(12 * 0.052) / 1.0
    noise = np.random.default_rng(1).normal(0, deviation, 200_000)
    rounded = np.rint(noise * scale) / scale
    assert rounded.var() / noise.var() - 1 == pytest.approx(1 / (12 * (scale * deviation) ** 2), rel=0.15)
