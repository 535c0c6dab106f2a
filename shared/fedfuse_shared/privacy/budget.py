"""Whether a growing list of charges still fits a cap, with few evaluations of the accountant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy import accountant
from fedfuse_shared.privacy.mechanisms import merge


@dataclass
class _Known:
    """Most steps of one mechanism known to fit a cap, and fewest known not to."""

    fit: int = 0
    unfit: int | None = None


_known: dict[tuple[float, float, float, float], _Known] = {}


def fits(charges: Iterable[Charge], delta: float, cap: float) -> bool:
    """Return whether one mechanism, charged any number of times, costs at most ``cap`` at ``delta``.

    Epsilon never falls as steps are added. So whatever takes no more steps than something known to fit fits, and
    looking ahead in doubling and halving strides answers the n prefixes of a run with O(log n) evaluations.

    Raises:
        ValueError: the charges are of several mechanisms.
        ConfigError: delta does not lie between 0 and 1.
    """
    merged = merge(charges)
    if not merged:
        return True
    if len(merged) > 1:
        raise ValueError("several mechanisms: compose them by Renyi accounting")
    (charge,) = merged
    known = _known.setdefault((charge.sampling_rate, charge.noise_multiplier, delta, cap), _Known())
    if charge.steps <= known.fit:
        return True
    if known.unfit is not None and charge.steps >= known.unfit:
        return False
    ahead = 2 * charge.steps if known.unfit is None else (charge.steps + known.unfit) // 2
    for steps in dict.fromkeys((ahead, charge.steps)):
        if accountant.epsilon([charge.model_copy(update={"steps": steps})], delta) <= cap:
            known.fit = max(known.fit, steps)
            break
        known.unfit = steps if known.unfit is None else min(known.unfit, steps)
    return charge.steps <= known.fit
