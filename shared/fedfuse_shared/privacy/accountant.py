"""How much privacy a sequence of mechanisms costs: upper bounds only.

Adjacency: add or remove one record. The number stated is the pessimistic privacy-loss-distribution bound of Google's
dp-accounting (Doroshenko et al. 2022), and beside it that of Renyi differential privacy (Mironov 2017), which is
never below it and holds for more (``epsilon_enforced``). The normal approximation ("GDP") is not offered: it
underestimates.

What is accounted may come from somebody else's ledger. So work is bounded: beyond ``MAX_EPSILON`` or ``MAX_STEPS``,
where the distribution would take gigabytes or hours, the Renyi bound stands in for it; beyond ``MAX_MECHANISMS`` the
rarer ones are charged together, at their largest sampling rate and smallest noise. Both hold, and cost more.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy.mechanisms import Steps, charges_of, merge, steps_by_mechanism

if TYPE_CHECKING:
    from dp_accounting.privacy_accountant import PrivacyAccountant

MAX_EPSILON: Final = 100.0
"""Renyi epsilon above which no privacy loss distribution is computed."""
MAX_MECHANISMS: Final = 8
"""Most different mechanisms that are composed one by one."""
MAX_STEPS: Final = 10**6
"""Most steps of one mechanism whose privacy loss distribution is composed."""

SLACK: Final = 2.0**-10
"""Share of delta that is kept for the distance of drawn integers from their ideal law."""

_FINE, _COARSE = 1e-4, 1e-3
"""Grid of the privacy loss, below and above ``_COARSE_ABOVE``; either is rounded up, never down."""
_COARSE_ABOVE: Final = 16.0
_LEAST_NOISE: Final = 1e-3
"""Noise multiplier below which nothing is protected and the formulas overflow."""
_MOST_NOISE: Final = 1e6
_LEAST_RATE: Final = 1e-9
_LEAST_DELTA: Final = 1e-11
"""Delta below which the rounding of the distribution's Fourier transform is no longer small beside it."""


def epsilon(charges: Iterable[Charge], delta: float) -> float:
    """Return an upper bound on epsilon at ``delta`` for everything charged together; 0 for nothing.

    Raises:
        ConfigError: delta does not lie between 0 and 1.
    """
    return _pld(_bounded(merge(charges)), _checked(delta))


def epsilon_rdp(charges: Iterable[Charge], delta: float) -> float:
    """Return the upper bound that Renyi accounting gives, by the conversion of dp-accounting; 0 for nothing.

    Raises:
        ConfigError: delta does not lie between 0 and 1.
    """
    return _rdp(_bounded(merge(charges)), _checked(delta))


def epsilon_enforced(charges: Iterable[Charge], delta: float, schedule: Schedule, draws: int = 0) -> float:
    """Return the number that caps are compared with, under the schedule a site fixed before its first charge.

    With one mechanism for good only the number of its steps is left to choose, and the privacy loss distribution
    bounds that. Where mechanisms may be chosen after seeing results it is no filter; the Renyi bound is one (Lecuyer
    2021, "Practical privacy filters and odometers with Renyi differential privacy", section 4). Choosing between the
    two on the way would be neither, so the policy chooses beforehand; several mechanisms under a fixed schedule,
    which no site charges, count by Renyi.

    Args:
        charges: Everything charged, in any order.
        delta: The delta it is meant at.
        schedule: What the site's policy fixed.
        draws: Integer draws of noise on each coordinate (``Reservation.draws``). They are not exactly what they stand
            for, and their distance comes out of delta; where it does not fit, the bound is infinite.

    Raises:
        ConfigError: delta does not lie between 0 and 1.
    """
    merged = merge(charges)
    usable = usable_delta(_checked(delta), shared=draws > 0)
    one = len(steps_by_mechanism(merged)) <= 1
    bound = (epsilon if one and schedule is Schedule.FIXED else epsilon_rdp)(merged, usable)
    return bound if room_for_draws(bound, delta, draws) else math.inf


def room_for_draws(bound: float, delta: float, draws: int) -> bool:
    """Return whether what inexact draws add to delta at an epsilon fits in what was kept for it."""
    if not draws:
        return True
    from fedfuse_shared.privacy.aggregate import slack_of_draws  # noqa: PLC0415 - numpy, only where needed

    return slack_of_draws(bound, draws) <= delta - usable_delta(delta, shared=True)


def usable_delta(delta: float, *, shared: bool) -> float:
    """Return the delta that mechanisms may use up; where noise is shared, the rest is for inexact sampling.

    ``aggregate.slack`` is compared with ``delta - usable_delta(delta, shared=True)`` wherever a cap is.
    """
    return delta * (1 - SLACK) if shared else delta


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta} does not lie between 0 and 1", advice="1e-5 is usual")
    return delta


def _bounded(charges: tuple[Charge, ...]) -> tuple[Charge, ...]:
    """Return charges of few mechanisms that cost no less."""
    if len(charges) <= MAX_MECHANISMS:
        return charges
    common = sorted(charges, key=lambda charge: -charge.steps)
    kept, rest = common[: MAX_MECHANISMS - 1], common[MAX_MECHANISMS - 1 :]
    rate = max(charge.sampling_rate for charge in rest)
    sigma = min(charge.noise_multiplier for charge in rest)
    steps = Steps({(rate, sigma): sum(charge.steps for charge in rest)})
    return merge([*kept, *charges_of(steps)])


@lru_cache(maxsize=4096)
def _pld(charges: tuple[Charge, ...], delta: float) -> float:
    renyi = _rdp(charges, delta)
    if delta < _LEAST_DELTA:
        return renyi
    if not charges or renyi > MAX_EPSILON or max(charge.steps for charge in charges) > MAX_STEPS:
        return renyi
    # A second to import: nobody waits for it who does not account.
    from dp_accounting import pld  # noqa: PLC0415

    accountant = pld.PLDAccountant(value_discretization_interval=_COARSE if renyi > _COARSE_ABOVE else _FINE)
    _compose(accountant, charges)
    bound = float(accountant.get_epsilon(delta))
    # Both are upper bounds. Over very many steps the grid's rounding adds up and Renyi's is the smaller; where delta
    # is smaller than the tails that were cut off, the distribution says infinity.
    return min(bound, renyi)


@lru_cache(maxsize=4096)
def _rdp(charges: tuple[Charge, ...], delta: float) -> float:
    if not charges:
        return 0.0
    if min(charge.noise_multiplier for charge in charges) < _LEAST_NOISE:
        return math.inf
    from dp_accounting import rdp  # noqa: PLC0415

    accountant = rdp.RdpAccountant()
    # It warns, order by order, of orders it leaves out; leaving one out only makes the bound larger.
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        _compose(accountant, charges)
        return float(accountant.get_epsilon(delta))
    finally:
        logger.setLevel(before)


def _compose(accountant: PrivacyAccountant, charges: tuple[Charge, ...]) -> None:
    import dp_accounting  # noqa: PLC0415

    for charge in charges:
        # Beyond these the formulas over- or underflow; less noise or more sampling only makes the bound larger.
        rate, sigma = max(charge.sampling_rate, _LEAST_RATE), min(charge.noise_multiplier, _MOST_NOISE)
        event = dp_accounting.GaussianDpEvent(sigma)
        if rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, charge.steps)
