"""Threshold, colluders and survivors: which combinations are safe, and the usual choice for n participants."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from fedfuse_shared import limits
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.secagg.graph import COMPLETE
from fedfuse_shared.secagg.sparse import SIGMA, chances


@dataclass(frozen=True)
class Bounds:
    """Who may be missing and who may lie in one round.

    Attributes:
        participants: n, sites in the offer.
        threshold: t, shares that open a secret; of n on the complete graph, of a neighbourhood on a sparse one.
        colluders: c, sites that may help the server: a lying one on the complete graph, one that keeps to the
            protocol on a sparse one.
        min_survivors: fewest sites whose sum may be opened.
        neighbours: k; ``COMPLETE`` for the complete graph.
    """

    participants: int
    threshold: int
    colluders: int
    min_survivors: int
    neighbours: int = COMPLETE

    def check(self) -> None:
        """Refuse bounds under which one site's masks could be opened.

        Raises:
            ConfigError: the bounds do not hold, with the numbers.
        """
        n, t, c, m = self.participants, self.threshold, self.colluders, self.min_survivors
        most = limits.MAX_SITES if self.neighbours == COMPLETE else limits.MAX_SPARSE_SITES
        if not limits.MIN_SITES <= n <= most:
            raise ConfigError(
                f"{n} participants; secure aggregation needs {limits.MIN_SITES} to {most}",
                advice='change sites_per_round, or see secure_aggregation.graph = "sparse"',
            )
        if self.neighbours == COMPLETE:
            self._check_complete()
        if not t <= m <= n:
            raise ConfigError(
                f"min_survivors {m} must lie between the threshold {t} and the participants {n}",
                advice="correct secure_aggregation.min_survivors",
            )
        if m - c < 2:
            raise ConfigError(
                f"{m} survivors with {c} colluders leave fewer than two honest sites: a sum of one is no sum",
                advice="raise min_survivors or lower colluders",
            )
        if self.neighbours != COMPLETE:
            self._check_sparse()

    def _check_complete(self) -> None:
        """With 2t > n + c nobody gathers t shares of both kinds (Bonawitz et al. 2017, theorem 6.5).

        A lying server would need t of one kind from one part of the honest sites and t of the other from the rest.
        """
        n, t, c = self.participants, self.threshold, self.colluders
        if 2 * t <= n + c:
            raise ConfigError(
                f"threshold {t} is too low for {n} participants and {c} colluders: 2t > n + c must hold",
                advice=f"set it to at least {(n + c) // 2 + 1}",
            )

    def _check_sparse(self) -> None:
        """The chance that a random graph gives anybody away is at most 2^-SIGMA, recomputed from the numbers."""
        k, t = self.neighbours, self.threshold
        if k % 2 or not 2 <= k < min(self.min_survivors, limits.MAX_SITES) or not 1 <= t <= k:
            raise ConfigError(
                f"{k} neighbours with threshold {t} among {self.participants} sites make no sparse graph",
                advice="choose them with: fedfuse graph",
            )
        found = chances(self.participants, k, t, self.colluders, self.min_survivors)
        if found.unsafe > Fraction(1, 2**SIGMA):
            raise ConfigError(
                f"{k} neighbours with threshold {t} give {self.participants} sites with {self.colluders} colluders "
                f"away with probability {float(found.unsafe):.2g}, at most 2^-{SIGMA} is accepted",
                advice="choose them with: fedfuse graph",
            )


def choose(
    participants: int,
    *,
    threshold: int | None = None,
    colluders: int | None = None,
    min_survivors: int | None = None,
) -> Bounds:
    """Return checked bounds, filling what is left out: c = ceil(n/3) - 1, t = floor(2n/3) + 1, survivors = t.

    Raises:
        ConfigError: the given values do not go together.
    """
    n = participants
    c = -(-n // 3) - 1 if colluders is None else colluders
    t = max(2 * n // 3 + 1, (n + c) // 2 + 1) if threshold is None else threshold
    bounds = Bounds(n, t, c, t if min_survivors is None else min_survivors)
    bounds.check()
    return bounds
