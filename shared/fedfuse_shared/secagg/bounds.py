"""Threshold, colluders and survivors: which combinations are safe, and the usual choice for n participants."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse_shared import limits
from fedfuse_shared.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """Who may be missing and who may lie in one round.

    Attributes:
        participants: n, sites in the offer.
        threshold: t, shares that open a secret; n - t sites may drop out.
        colluders: c, sites that may help a lying server.
        min_survivors: fewest sites whose sum may be opened.
    """

    participants: int
    threshold: int
    colluders: int
    min_survivors: int

    def check(self) -> None:
        """Refuse bounds under which a lying server with c sites could open one site's masks.

        With 2t > n + c it cannot gather t shares of one kind from one half of the honest sites and t of the
        other kind from the rest (Bonawitz et al. 2017, section 6.2 and theorem 6.5).

        Raises:
            ConfigError: the bounds do not hold, with the numbers.
        """
        n, t, c, m = self.participants, self.threshold, self.colluders, self.min_survivors
        if not limits.MIN_SITES <= n <= limits.MAX_SITES:
            raise ConfigError(
                f"{n} participants; secure aggregation needs {limits.MIN_SITES} to {limits.MAX_SITES}",
                advice="change the number of sites per round",
            )
        if 2 * t <= n + c:
            raise ConfigError(
                f"threshold {t} is too low for {n} participants and {c} colluders: 2t > n + c must hold",
                advice=f"set it to at least {(n + c) // 2 + 1}",
            )
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
