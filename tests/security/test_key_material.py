"""What reaches AES: 256 bits, different for every pair, site and context, and nothing of it folded away."""

import itertools

import numpy as np
from support.federation import Federation, Round, run_round

from fedfuse_shared.crypto import keystream


def keys_used(monkeypatch, sequence):
    """Return every key that reached the cipher while a round was played, in order."""
    seen = []
    real = keystream.AES256

    def watched(key):
        seen.append(bytes(key))
        return real(key)

    monkeypatch.setattr(keystream, "AES256", watched)
    names = list(sequence.offer.participants)
    run_round(sequence, {n: sequence.words(np.zeros(200)) for n in names})
    return seen


def test_every_pair_and_every_site_has_a_key_of_256_bits_of_its_own(monkeypatch):
    federation = Federation.of(6)
    used = keys_used(monkeypatch, Round(federation, federation.offer()))
    assert {len(key) for key in used} == {32}
    # Fifteen pairs, each from both ends, and six self masks, put on and taken off.
    assert len(set(used)) == 15 + 6
    assert len(used) == 2 * 15 + 2 * 6


def test_no_key_serves_in_two_contexts(monkeypatch):
    federation = Federation.of(5)
    # The same "random" bytes: even then the context alone makes the keys differ.
    rounds = [Round(federation, federation.offer(attempt=attempt), seed="same") for attempt in (1, 2)]
    one, two = (set(keys_used(monkeypatch, sequence)) for sequence in rounds)
    assert not one & two


def test_every_bit_of_a_key_changes_and_halves_of_the_keys_agree_in_half_of_them(monkeypatch):
    keys = set()
    for attempt in range(1, 13):
        federation = Federation.of(6)
        keys |= set(
            keys_used(monkeypatch, Round(federation, federation.offer(attempt=attempt), seed=str(attempt)))
        )
    bits = np.unpackbits(np.array([np.frombuffer(key, np.uint8) for key in sorted(keys)]), axis=1)
    assert bits.shape == (12 * 21, 256)
    # 252 fair coins per bit: mean 126, deviation 7.9; 6.5 deviations, 256 bits: a false alarm in 5e7 runs.
    assert (abs(bits.sum(axis=0, dtype=int) - 126) < 52).all()
    distances = [int((one != two).sum()) for one, two in itertools.combinations(bits[:60], 2)]
    # 256 fair coins: mean 128, deviation 8; seven deviations, 1,770 pairs: a false alarm in 2e8 runs.
    assert min(distances) > 72
    assert max(distances) < 184


def test_a_mask_is_as_long_as_the_vector_and_never_repeats(monkeypatch):
    words = np.zeros(2**18, np.uint32)
    keystream.apply_masks(words, [keystream.Mask(b"k" * 32, subtract=False)])
    # Repeats of any 16-byte block within 1 MiB of keystream: CTR never repeats a counter.
    assert len(np.unique(words.reshape(-1, 4), axis=0)) == 2**16
