"""The opened sum is exact in the ring, whoever drops out, and equals a slow reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.federation import Federation, Round, run_round

from fedfuse_shared.errors import RoundAborted
from fedfuse_shared.secagg.quantise import average, vector_length


def reference_sum(inputs: dict[str, np.ndarray]) -> list[int]:
    """The sum in plain integers modulo 2^32, coordinate by coordinate."""
    return [
        sum(int(words[i]) for words in inputs.values()) % 2**32
        for i in range(len(next(iter(inputs.values()))))
    ]


@st.composite
def rounds(draw):
    size = draw(st.integers(3, 9))
    federation = Federation.of(size)
    sequence = Round(federation, federation.offer(), seed=str(draw(st.integers(0, 10**6))))
    losses = [draw(st.sets(st.sampled_from(federation.names), max_size=2)) for _ in range(4)]
    return sequence, losses, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(rounds())
def test_the_opened_sum_is_that_of_the_survivors(drawn):
    sequence, losses, seed = drawn
    numbers = np.random.default_rng(seed)
    length = vector_length(sequence.offer)
    inputs = {n: numbers.integers(0, 2**32, length, dtype=np.uint32) for n in sequence.offer.participants}
    dealers = [n for n in inputs if n not in losses[0]]
    senders = [n for n in dealers if n not in losses[1]]
    agreers = [n for n in senders if n not in losses[2]]
    revealers = [n for n in agreers if n not in losses[3]]
    least = sequence.offer.threshold
    try:
        total = run_round(
            sequence, inputs, dealers=dealers, senders=senders, agreers=agreers, revealers=revealers
        )
    except RoundAborted:
        assert len(revealers) < least
    else:
        assert len(revealers) >= least
        assert total.tolist() == reference_sum({n: inputs[n] for n in senders})


@pytest.mark.parametrize("size", [3, 20])
def test_updates_come_back_as_their_mean(size):
    federation = Federation.of(size)
    sequence = Round(federation, federation.offer())
    numbers = np.random.default_rng(5)
    updates = {n: numbers.normal(0, 0.5, sequence.offer.dimension()).clip(-4, 4) for n in federation.names}
    total = run_round(sequence, {n: sequence.words(u) for n, u in updates.items()})
    mean, _ = average(total, sequence.offer, size)
    expected = sum(updates.values()) / size
    # Each update is rounded once: half a step each.
    assert np.abs(mean - expected).max() <= 0.5 / sequence.offer.scale + 1e-7
