"""The sparse graph, and the exact chances that decide how sparse it may be."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
from support.federation import Federation, Round, run_round

from fedfuse_shared import limits
from fedfuse_shared.errors import ConfigError, RoundAborted
from fedfuse_shared.secagg.bounds import Bounds
from fedfuse_shared.secagg.graph import COMPLETE, Graph
from fedfuse_shared.secagg.sparse import chances, choose_graph

NAMES = tuple(f"site{number:04}" for number in range(40))
SEED = "ab" * 32


# --- the graph ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("neighbours", [2, 6, 12])
def test_every_site_has_k_neighbours_and_neighbourhood_is_mutual(neighbours):
    graph = Graph(SEED, NAMES, neighbours)
    for name in NAMES:
        around = graph.around(name)
        assert len(around) == neighbours + 1
        assert name in around
        assert all(name in graph.around(other) for other in around)


def test_on_the_complete_graph_everybody_is_a_neighbour():
    assert Graph(SEED, NAMES, COMPLETE).around(NAMES[3]) == set(NAMES)


def test_so_many_neighbours_that_all_are():
    assert Graph(SEED, NAMES[:7], 6).around(NAMES[0]) == set(NAMES[:7])


def test_the_graph_follows_from_context_and_keys_and_from_nothing_else():
    one = {name: Graph(SEED, NAMES, 6).around(name) for name in NAMES}
    shuffled = list(NAMES)
    random.Random(1).shuffle(shuffled)
    assert one == {name: Graph(SEED, shuffled, 6).around(name) for name in NAMES}
    assert one != {name: Graph("cd" * 32, NAMES, 6).around(name) for name in NAMES}


# --- the chances --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "k", "t", "c", "m"), [(7, 4, 2, 2, 6), (8, 4, 3, 3, 6), (7, 2, 1, 1, 5)])
def test_the_chances_are_those_of_counting_every_choice(n, k, t, c, m):
    found = chances(n, k, t, c, m)

    def at_least(population, marked, draws, least):
        hits = [
            sum(pick < marked for pick in drawn) >= least
            for drawn in itertools.combinations(range(population), draws)
        ]
        return Fraction(sum(hits), len(hits))

    def in_a_row(size, marked, length):
        hits = [
            {0, *range(1, length)} <= set(chosen) for chosen in itertools.combinations(range(size), marked)
        ]
        return size * Fraction(sum(hits), len(hits))

    exposed = max((size - c) * at_least(size - 1, c, k, t) for size in (n, m))
    split = max(in_a_row(size, c + size - m, k // 2) for size in (n, m))
    stuck = n * at_least(n - 1, n - m, k, k - t + 1)
    assert found.exposed == min(1, exposed)
    assert found.split == min(1, split)
    assert found.stuck == min(1, stuck)


def test_the_bound_on_split_rounds_is_one():
    # Random circles: how often do the honest survivors really fall apart?
    n, k, c, m = 20, 4, 3, 16
    chance = random.Random(7)
    apart = 0
    for _ in range(4000):
        order = list(range(n))
        chance.shuffle(order)
        good = [place for place in range(n) if order[place] >= c + n - m]
        reached, todo = {good[0]}, [good[0]]
        while todo:
            here = todo.pop()
            for step in (-2, -1, 1, 2):
                there = (here + step) % n
                if there in good and there not in reached:
                    reached.add(there)
                    todo.append(there)
        apart += len(reached) < len(good)
    assert 0 < apart / 4000 <= float(chances(n, k, 2, c, m).split)


@pytest.mark.parametrize(("n", "expected"), [(1000, (34, 18)), (10_000, (38, 21))])
def test_the_choice_for_five_percent_corruption_and_dropout(n, expected):
    # Design page 2, Scale; for n = 100 the exact chance of k/2 in a row allows 22 neighbours instead of 30.
    choice = choose_graph(n, colluders=n // 20, min_survivors=n - n // 20)
    assert (choice.neighbours, choice.threshold) == expected
    assert choice.chances.unsafe <= Fraction(1, 2**40)
    assert choice.chances.stuck <= Fraction(1, 2**30)


@pytest.mark.parametrize("n", [10, 60, 100, 333, 2000])
def test_two_neighbours_fewer_do_not_do(n):
    choice = choose_graph(n, colluders=n // 20, min_survivors=n - n // 20)
    k = choice.neighbours - 2
    for threshold in range(1, k + 1):
        found = chances(n, k, threshold, choice.colluders, choice.min_survivors)
        assert found.unsafe > Fraction(1, 2**41) or found.stuck > Fraction(1, 2**30)


@pytest.mark.parametrize(
    "numbers", [(5, 1, 4), (2, 0, 2), (10_001, 0, 10_000), (20, 18, 18), (1000, 330, 900)]
)
def test_no_graph_where_none_protects(numbers):
    sites, colluders, least = numbers
    with pytest.raises(ConfigError):
        choose_graph(sites, colluders=colluders, min_survivors=least)


def test_bounds_of_a_sparse_graph_are_checked_anew():
    choice = choose_graph(1000, colluders=50, min_survivors=950)
    Bounds(1000, choice.threshold, 50, 950, choice.neighbours).check()
    for unsafe in (
        Bounds(1000, choice.threshold - 1, 50, 950, choice.neighbours),
        Bounds(1000, choice.threshold, 80, 950, choice.neighbours),
        Bounds(1000, choice.threshold, 50, 700, choice.neighbours),
        Bounds(1000, 5, 50, 950, 10),
        Bounds(1000, choice.threshold, 50, 950, choice.neighbours + 1),
        Bounds(1000, choice.threshold, 50, 950, 100),
    ):
        with pytest.raises(ConfigError, match="fedfuse graph"):
            unsafe.check()


# --- rounds on it -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", [0, 3])
def test_a_round_on_a_sparse_graph_opens_the_sum_of_its_survivors(lost):
    federation = Federation.of(60)
    choice = choose_graph(60, colluders=3, min_survivors=57)
    assert choice.neighbours < limits.MAX_SITES
    bounds = Bounds(60, choice.threshold, 3, 57, choice.neighbours)
    offer = federation.offer(bounds=bounds, ring_bits=20)
    sequence = Round(federation, offer)
    numbers = random.Random(3)
    words = {name: sequence.words(_uniform(numbers, offer.dimension())) for name in federation.names}
    senders = list(federation.names)[lost:]
    total = run_round(sequence, words, senders=senders)
    expected = sum(words[name].astype(int) for name in senders) % 2**20
    assert total.tolist() == expected.tolist()
    # Each site dealt to its neighbourhood and to nobody else.
    assert {len(session.state.peers) for session in sequence.sites.values()} == {choice.neighbours + 1}


def test_too_many_dropouts_end_a_sparse_round():
    federation = Federation.of(60)
    choice = choose_graph(60, colluders=3, min_survivors=57)
    bounds = Bounds(60, choice.threshold, 3, 57, choice.neighbours)
    sequence = Round(federation, federation.offer(bounds=bounds))
    words = {name: sequence.words(_uniform(random.Random(1), 200)) for name in federation.names}
    with pytest.raises(RoundAborted, match="56 of 60"):
        run_round(sequence, words, senders=list(federation.names)[4:])


def _uniform(numbers, size):
    return np.array([numbers.uniform(-1, 1) for _ in range(size)])


@pytest.mark.parametrize(
    ("participants", "threshold", "colluders", "least", "neighbours"),
    [(50, 5, 60, 40, 10), (50, 5, 39, 40, 10), (50, 5, 0, 51, 10), (50, 0, 0, 50, 10), (3, 1, 0, 3, 2)],
)
def test_hostile_numbers_are_refused_and_nothing_else_is_raised(
    participants, threshold, colluders, least, neighbours
):
    # An offer is a server's word: a site, and an auditor, check its bounds whatever they are.
    bounds = Bounds(participants, threshold, colluders, least, neighbours)
    try:
        bounds.check()
    except ConfigError:
        return
    assert (participants, colluders) == (3, 0)
