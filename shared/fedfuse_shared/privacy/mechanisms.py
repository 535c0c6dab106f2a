"""What privacy is spent on, as the accountant composes it.

The one mechanism is the Poisson-sampled Gaussian (Abadi et al. 2016), described by ``ledger.records.Charge``:
sampling rate q, noise multiplier sigma, steps. That is necessary and sufficient for accounting under add/remove
adjacency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from fedfuse_shared.ledger.records import Charge

Steps = Counter[tuple[float, float]]
"""Steps by sampling rate and noise multiplier."""

MAX_STEPS: Final = 10**9
"""Most steps one ``Charge`` can state."""


def steps_by_mechanism(charges: Iterable[Charge]) -> Steps:
    """Return how many steps of each mechanism were charged."""
    steps: Steps = Counter()
    for charge in charges:
        steps[charge.sampling_rate, charge.noise_multiplier] += charge.steps
    return steps


def charges_of(steps: Steps) -> tuple[Charge, ...]:
    """Return the charges for steps of mechanisms, in a fixed order; more than one only beyond ``MAX_STEPS``."""
    return tuple(
        Charge(sampling_rate=rate, noise_multiplier=sigma, steps=min(MAX_STEPS, total - done))
        for (rate, sigma), total in sorted(steps.items())
        for done in range(0, total, MAX_STEPS)
    )


def merge(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    """Return charges with the steps of equal mechanisms added up, in a fixed order.

    Composition does not care for order, and a mechanism composed with itself is far cheaper to account than many
    separate entries.
    """
    return charges_of(steps_by_mechanism(charges))
