"""Updates as ring elements, and the divisors of the opened sum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.federation import Federation

from fedfuse_shared.config.base import Modality
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.secagg.quantise import average, quantise, tail_modalities
from fedfuse_shared.secagg.ring import largest_scale

OFFER = Federation.of(4).offer()
TEXT, IMAGE = Modality.TEXT, Modality.IMAGE


def total_of(*pairs):
    words = [
        quantise(np.full(OFFER.dimension(), value, np.float32), declared, OFFER) for value, declared in pairs
    ]
    return np.add.reduce(words, dtype=np.uint32)


def test_a_segment_is_divided_by_the_sites_that_declared_its_modality():
    both = frozenset({TEXT, IMAGE})
    mean, counts = average(total_of((1, both), (1, both), (1, frozenset({IMAGE}))), OFFER, 3)
    assert counts == {TEXT: 2, IMAGE: 3}
    # 3 contributions of 1 (the undeclared one is noise in reality) over 2, 3 and 3 contributors.
    assert mean[0] == pytest.approx(1.5)
    assert mean[70] == pytest.approx(1)
    assert mean[160] == pytest.approx(1)


def test_a_segment_with_one_contributor_is_left_unchanged():
    mean, _ = average(total_of((1, frozenset({TEXT})), (1, frozenset()), (1, frozenset())), OFFER, 3)
    assert not mean[:160].any()
    assert mean[160] == pytest.approx(1)


def test_a_tail_that_counts_more_contributors_than_survivors_leaves_its_segments_unchanged():
    total = total_of((1, frozenset({TEXT, IMAGE})), (1, frozenset({TEXT, IMAGE})), (1, frozenset({IMAGE})))
    total[-1] = 2**31
    mean, counts = average(total, OFFER, 3)
    assert counts == {IMAGE: 3, TEXT: 0}
    assert not mean[:70].any()
    assert mean[70] == pytest.approx(1)


def test_not_finite_coordinates_count_as_zero_and_large_ones_are_clamped():
    update = np.zeros(OFFER.dimension(), np.float32)
    update[:5] = [np.nan, np.inf, -np.inf, 1e30, -1e30]
    words = quantise(update, frozenset(), OFFER).view(np.int32)
    top = round(OFFER.clip_range * OFFER.scale)
    assert words[:5].tolist() == [0, 0, 0, top, -top]


def test_the_tail_is_the_static_declaration_and_nothing_else():
    one = quantise(np.ones(OFFER.dimension(), np.float32), frozenset({IMAGE}), OFFER)
    two = quantise(-np.ones(OFFER.dimension(), np.float32), frozenset({IMAGE}), OFFER)
    assert tail_modalities(OFFER.layout) == (IMAGE, TEXT)
    assert one[-2:].tolist() == two[-2:].tolist() == [1, 0]


@given(st.integers(3, 100), st.floats(1e-3, 1e4))
def test_the_worst_sum_does_not_wrap(sites, clip_range):
    scale = largest_scale(sites, clip_range, 32)
    assert sites * round(clip_range * scale) < 2**31


def test_a_range_that_does_not_fit_is_a_configuration_error_with_the_numbers():
    with pytest.raises(ConfigError, match=r"100 updates of range 1e\+09"):
        largest_scale(100, 1e9, 32)
