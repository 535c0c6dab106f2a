"""How many neighbours a sparse graph needs: exact tails, in integers, from n, corruption and dropout.

Three things may go wrong (Bell, Bonawitz, Gascon, Lepoint and Raykova 2020, section 3.2), each bounded by adding up
over all sites:

1. t of somebody's neighbours are corrupt: they hold enough shares of its secrets (*exposed*).
2. k/2 sites in a row on the circle are corrupt or dropped: the honest survivors may fall into two groups, whose sums
   would be opened apart (*split*).
3. fewer than t of somebody's neighbours survive: the round cannot be opened (*stuck*).

Corruption and dropouts do not depend on the graph, whose order comes from hashes over everybody's fresh keys. So the
corrupt among k neighbours are hypergeometric. 1 and 2 together stay below 2^-40, 3 below 2^-30.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from fedfuse_shared import limits
from fedfuse_shared.errors import ConfigError

SIGMA = 40
"""At most 2^-SIGMA that a round can give away more than one sum."""
ETA = 30
"""At most 2^-ETA that a round within the planned dropout cannot be opened."""


@dataclass(frozen=True)
class Chances:
    """What may go wrong on one graph, exactly.

    Attributes:
        exposed: Some honest site has t or more corrupt neighbours, at most this probability.
        split: The honest survivors may not be connected, at most this probability.
        stuck: Some site has fewer than t surviving neighbours, at most this probability.
    """

    exposed: Fraction
    split: Fraction
    stuck: Fraction

    @property
    def unsafe(self) -> Fraction:
        """At most this probability a round gives away more than one sum over all survivors."""
        return self.exposed + self.split


@dataclass(frozen=True)
class Choice:
    """A graph for n sites.

    Attributes:
        sites: n.
        neighbours: k.
        threshold: t, of a site's neighbourhood.
        colluders: c.
        min_survivors: m.
        chances: What may go wrong.
    """

    sites: int
    neighbours: int
    threshold: int
    colluders: int
    min_survivors: int
    chances: Chances


@lru_cache(maxsize=4096)
def chances(sites: int, neighbours: int, threshold: int, colluders: int, min_survivors: int) -> Chances:
    """Return what may go wrong in an offer to ``sites`` participants.

    Participants who stay away before keys are exchanged are not on the graph, so that between ``min_survivors`` and
    ``sites`` are: the worse end counts.
    """
    ends = {sites, min_survivors}
    exposed = max((size - colluders) * _at_least(size - 1, colluders, neighbours, threshold) for size in ends)
    split = max(_in_a_row(size, colluders + size - min_survivors, neighbours // 2) for size in ends)
    dropped = sites - min_survivors
    stuck = sites * _at_least(sites - 1, dropped, neighbours, neighbours - threshold + 1)
    one = Fraction(1)
    return Chances(min(one, Fraction(exposed)), min(one, split), min(one, Fraction(stuck)))


def choose_graph(
    sites: int, *, colluders: int, min_survivors: int, sigma: int = SIGMA, eta: int = ETA
) -> Choice:
    """Return the fewest neighbours, and the lowest threshold for them, that keep all chances small enough.

    Args:
        sites: n, participants of an offer.
        colluders: c, sites that may tell the server what they know.
        min_survivors: m, fewest sites whose sum may be opened.
        sigma: At most 2^-sigma that a round gives away more than one sum.
        eta: At most 2^-eta that it cannot be opened.

    Raises:
        ConfigError: no graph sparser than the complete one does.
    """
    if (
        not limits.MIN_SITES <= sites <= limits.MAX_SPARSE_SITES
        or not 0 <= colluders < min_survivors <= sites
    ):
        raise ConfigError(
            f"{sites} sites, {colluders} colluders and {min_survivors} survivors make no graph: a sparse one has "
            f"{limits.MIN_SITES} to {limits.MAX_SPARSE_SITES} sites, and some of its survivors are honest",
            advice="correct the numbers",
        )
    for neighbours in range(2, min(min_survivors, limits.MAX_SITES), 2):
        threshold = _threshold(sites, neighbours, colluders, min_survivors, sigma)
        if threshold is None:
            continue
        found = chances(sites, neighbours, threshold, colluders, min_survivors)
        if found.unsafe <= Fraction(1, 2**sigma) and found.stuck <= Fraction(1, 2**eta):
            return Choice(sites, neighbours, threshold, colluders, min_survivors, found)
    raise ConfigError(
        f"no sparse graph protects {sites} sites with {colluders} colluders and {sites - min_survivors} dropouts",
        advice=f"use the complete graph (up to {limits.MAX_SITES} sites) or expect fewer of them",
    )


def _threshold(sites: int, neighbours: int, colluders: int, survivors: int, sigma: int) -> int | None:
    """Return the one threshold worth a look: the lowest at which nobody is exposed; higher ones only get stuck."""
    for threshold in range(1, neighbours + 1):
        if chances(sites, neighbours, threshold, colluders, survivors).exposed <= Fraction(
            1, 2 ** (sigma + 1)
        ):
            return threshold
    return None


@lru_cache(maxsize=256)
def _tails(population: int, marked: int, draws: int) -> tuple[Fraction, ...]:
    """Return, for j from 0 to ``draws``, the probability that j or more of ``draws`` drawn are marked."""
    ways = [
        math.comb(marked, j) * math.comb(population - marked, draws - j) if j <= marked else 0
        for j in range(draws + 1)
    ]
    total = math.comb(population, draws)
    from_the_top = accumulate(reversed(ways))
    return tuple(Fraction(count, total) for count in from_the_top)[::-1]


def _at_least(population: int, marked: int, draws: int, least: int) -> Fraction:
    """Return the hypergeometric tail: the probability of ``least`` or more marked among ``draws``."""
    if least > draws:
        return Fraction(0)
    return _tails(population, min(marked, population), draws)[max(least, 0)]


def _in_a_row(population: int, marked: int, length: int) -> Fraction:
    """Return a bound on the probability that ``length`` neighbours on a random circle are all marked."""
    if length > marked:
        return Fraction(0)
    here = Fraction(math.comb(population - length, marked - length), math.comb(population, marked))
    return population * here
