"""What the server and its colluders see does not depend on honest updates beyond their sum.

The server is given everything it received and all the material of every site but two. The argument (Bonawitz et
al. 2017, section 6): between the two honest sites stands a mask F of an AES keystream under a key nobody else has.
Where F is uniform, the world with updates (x, x') and mask F shows exactly what the world with (x', x) and mask
F + x - x' shows. The first test plays both worlds and compares every byte; the second checks on the real keystream
that what is left after all strippable masks are gone looks uniform, whatever the update.
"""

import hashlib
from collections import Counter

import numpy as np
import pytest
from support.federation import Federation, Round, run_round

from fedfuse_shared.crypto.derive import End
from fedfuse_shared.crypto.keys import public_of
from fedfuse_shared.crypto.keystream import apply_masks
from fedfuse_shared.secagg import quantise
from fedfuse_shared.secagg.bounds import Bounds
from fedfuse_shared.secagg.masking import MaskOwner, inverse, pair_masks, self_mask
from fedfuse_shared.secagg.packing import add_packed, pack, packed_size

HONEST = ("site00", "site01")
UNKNOWN = b"the key only two sites have.".ljust(32)


def updates(federation, offer, numbers):
    return {n: numbers.normal(0, 0.3, offer.dimension()).astype(np.float32) for n in federation.names}


def swapped(values):
    one, two = HONEST
    return {**values, one: values[two], two: values[one]}


class HonestPairMask:
    """Stands in for the keystream between the two honest sites, which no other party has the key of."""

    def __init__(self, stream, *, removed=False):
        self.stream, self.removed = stream, removed

    def pair_masks(self, owner, peers):
        masks = zip(peers, pair_masks(owner, peers), strict=True)
        return [m._replace(key=UNKNOWN) if {owner.name, peer.name} == set(HONEST) else m for peer, m in masks]

    def apply_masks(self, words, masks):
        masks = list(masks)
        apply_masks(words, [mask for mask in masks if mask.key != UNKNOWN])
        for mask in masks:
            if mask.key == UNKNOWN and not self.removed:
                words += -self.stream if mask.subtract else self.stream


def play(monkeypatch, inputs, mask, drop, changes):
    """Return every byte the server receives in a round, and the sum it opens."""
    from fedfuse_shared.secagg import server, site

    for module in (site, server):
        monkeypatch.setattr(module, "pair_masks", mask.pair_masks)
        monkeypatch.setattr(module, "apply_masks", mask.apply_masks)
    federation = Federation(tuple(inputs))
    sequence = Round(federation, federation.offer(**changes), seed="view")
    senders = [n for n in inputs if n not in drop]
    words = {n: sequence.words(u) for n, u in inputs.items()}
    return hashlib.sha256(b"".join(sequence_view(sequence, words, senders))).hexdigest(), sequence


def sequence_view(sequence, words, senders):
    total = run_round(sequence, words, senders=senders)
    return [*sequence.view, total.tobytes()]


def coupled_worlds(monkeypatch, *, removed, drop=(), sites=6, **changes):
    federation = Federation.of(sites)
    offer = federation.offer(**changes)
    numbers = np.random.default_rng(3)
    values = updates(federation, offer, numbers)
    one, two = (quantise.quantise(values[n], frozenset(), offer) for n in HONEST)
    stream = numbers.integers(0, 2**32, len(one), dtype=np.uint32)
    # World two: the honest updates change places, and the mask nobody knows is another uniform one.
    other = stream + one - two
    first = play(monkeypatch, values, HonestPairMask(stream, removed=removed), drop, changes)
    second = play(monkeypatch, swapped(values), HonestPairMask(other, removed=removed), drop, changes)
    return first[0], second[0]


@pytest.mark.parametrize("drop", [(), ("site05",)])
def test_swapping_two_honest_updates_changes_no_byte_the_server_sees(monkeypatch, drop):
    first, second = coupled_worlds(monkeypatch, removed=False, drop=drop)
    assert first == second


@pytest.mark.parametrize("bits", [16, 20, 24])
def test_nor_does_it_on_a_narrow_ring(monkeypatch, bits):
    first, second = coupled_worlds(monkeypatch, removed=False, ring_bits=bits)
    assert first == second


def test_nor_does_it_between_neighbours_on_a_sparse_graph(monkeypatch):
    # A server that keeps to the protocol; the seed of the sessions makes the two honest sites neighbours.
    bounds = Bounds(12, 3, 0, 11, 6)
    first, second = coupled_worlds(monkeypatch, removed=False, sites=12, bounds=bounds)
    assert first == second
    changed, other = coupled_worlds(monkeypatch, removed=True, sites=12, bounds=bounds)
    assert changed != other


def test_without_the_mask_between_the_two_the_views_differ(monkeypatch):
    # The same comparison must go red when one mask is missing, or it would show nothing.
    first, second = coupled_worlds(monkeypatch, removed=True)
    assert first != second


def stripped(sequence, words):
    """Everything the server and four colluders can take off the two honest vectors; what is left of each."""
    federation, context = sequence.federation, sequence.offer.context()
    left = {}
    run_round(sequence, words)
    for name, raw in zip(federation.names, vectors(sequence), strict=True):
        if name not in HONEST:
            continue
        residue = np.zeros(quantise.vector_length(sequence.offer), np.uint32)
        add_packed(residue, raw, sequence.offer.ring_bits, who=name)
        # The round was opened, so the self seed is public; each colluder gives its own private mask key.
        masks = [inverse(self_mask(bytes.fromhex(sequence.sites[name].state.seed), context, name))]
        mine = public_of(bytes.fromhex(sequence.sites[name].state.mask_private))
        for colluder in federation.names[2:]:
            private = bytes.fromhex(sequence.sites[colluder].state.mask_private)
            # What the colluder put on for `name` is the opposite of what `name` put on for it.
            masks += pair_masks(MaskOwner(context, colluder, private), [End(name, mine)])
        apply_masks(residue, masks)
        left[name] = residue
    return left


def vectors(sequence):
    length = packed_size(quantise.vector_length(sequence.offer), sequence.offer.ring_bits)
    return [raw for raw in sequence.view if len(raw) == length]


def chi_square_of_bytes(words, bits):
    raw = pack(words, bits)
    counts = Counter(raw)
    expected = len(raw) / 256
    return sum((counts.get(value, 0) - expected) ** 2 / expected for value in range(256))


@pytest.mark.parametrize("bits", [32, 20])
def test_all_that_can_be_stripped_leaves_the_sum_and_uniform_words(bits):
    from fedfuse_shared.offer import Segment

    federation = Federation.of(6)
    offer = federation.offer(layout=(Segment(name="head", size=40_000),), ring_bits=bits)
    sequence = Round(federation, offer, seed="stripped")
    values = {n: np.full(offer.dimension(), 0.5, np.float32) for n in federation.names}
    words = {n: sequence.words(u) for n, u in values.items()}
    left = stripped(sequence, words)
    one, two = HONEST
    low = np.uint32(2**bits - 1)
    assert ((left[one] + left[two]) & low == (words[one] + words[two]) & low).all()
    for name in HONEST:
        assert ((left[name] ^ words[name]) & low == 0).mean() < 1e-3
        # 255 degrees of freedom, mean 255, deviation 22.6: 400 is 6.4 deviations, false alarms below 1e-8. The
        # updates are constant, so unmasked words would give millions.
        assert chi_square_of_bytes(left[name], bits) < 400
        assert chi_square_of_bytes(words[name], bits) > 10_000
