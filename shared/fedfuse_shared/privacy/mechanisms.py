"""What privacy is spent on, as the accountant composes it.

The one mechanism is the Poisson-sampled Gaussian (Abadi et al. 2016), described by ``ledger.records.Charge``:
sampling rate q, noise multiplier sigma, steps. That is necessary and sufficient for accounting under add/remove
adjacency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fedfuse_shared.ledger.records import Charge


def merge(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    """Return charges with the steps of equal mechanisms added up, in a fixed order.

    Composition does not care for order, and a mechanism composed with itself is far cheaper to account than many
    separate entries.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        steps[charge.sampling_rate, charge.noise_multiplier] += charge.steps
    return tuple(
        Charge(sampling_rate=rate, noise_multiplier=sigma, steps=count)
        for (rate, sigma), count in sorted(steps.items())
    )
