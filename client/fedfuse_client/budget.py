"""What a site's data sets have spent, by whom, what is left, and how far that goes; from the site's store alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from fedfuse_client.datasets import Spent, counted
from fedfuse_client.policy import SitePolicy
from fedfuse_client.store import SiteStore
from fedfuse_shared.config.base import Hex32, Label
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy.accountant import epsilon_enforced

POINTS = 12
"""Places on the curve of what was spent: each costs an evaluation of the accountant."""
_MOST_ROUNDS = 10**6


@dataclass(frozen=True)
class Share:
    """What one federation spent of a budget.

    Attributes:
        federation: Its name.
        rounds: Attempts that were charged.
        steps: Steps of DP-SGD in them.
        epsilon: What they cost alone; the shares of several federations do not add up to the whole.
    """

    federation: Label
    rounds: int
    steps: int
    epsilon: float


@dataclass(frozen=True)
class Statement:
    """The budget of one pool of data sets.

    Attributes:
        datasets: Random identifiers of the data sets that share it, the oldest first.
        epsilon: Spent in all, by the bound the cap is compared with.
        cap: The policy's.
        delta: The policy's.
        shares: By federation.
        curve: Epsilon after some of the charges: their number and the bound, the last after all.
        more_rounds: Further rounds like the last one that fit under the cap; None where nothing was charged.
    """

    datasets: tuple[Hex32, ...]
    epsilon: float
    cap: float
    delta: float
    shares: tuple[Share, ...]
    curve: tuple[tuple[int, float], ...]
    more_rounds: int | None


def statements(store: SiteStore, policy: SitePolicy) -> list[Statement]:
    """Return one statement for each budget in a store.

    Raises:
        StateError: the store is damaged.
    """
    return [_statement(pool, store.reservations(pool[0]), policy) for pool in store.pools()]


def _statement(pool: tuple[Hex32, ...], spent: Sequence[Spent], policy: SitePolicy) -> Statement:
    shares = []
    for federation in sorted({item.federation for item in spent}):
        own = [item for item in spent if item.federation == federation]
        # The training's mechanism stands first; evaluation takes no steps.
        steps = sum(item.charges[0].steps for item in own)
        shares.append(Share(federation, len(own), steps, _epsilon(own, policy)))
    places = sorted({-(-len(spent) * point // POINTS) for point in range(1, POINTS + 1)}) if spent else []
    curve = tuple((place, _epsilon(spent[:place], policy)) for place in places)
    return Statement(
        datasets=pool,
        epsilon=curve[-1][1] if curve else 0.0,
        cap=policy.epsilon_cap,
        delta=policy.delta,
        shares=tuple(shares),
        curve=curve,
        more_rounds=_more(spent, policy) if spent else None,
    )


def _epsilon(spent: Sequence[Spent], policy: SitePolicy, *further: Charge) -> float:
    charges = chain.from_iterable(item.charges for item in spent)
    draws = sum(item.draws for item in spent)
    return epsilon_enforced(chain(charges, further), policy.delta, counted(spent, policy.schedule), draws)


def _more(spent: Sequence[Spent], policy: SitePolicy) -> int:
    """Return how often rounds that cost what the last one did fit under the cap."""

    def fits(rounds: int) -> bool:
        last = [charge.model_copy(update={"steps": charge.steps * rounds}) for charge in spent[-1].charges]
        return _epsilon(spent, policy, *last) <= policy.epsilon_cap

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _MOST_ROUNDS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
