"""What each site spent on each data set, at every prefix of the ledger, against the cap it published.

Charged is what was reserved, whether or not a receipt or an opened round followed: there is no refund.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from fedfuse_shared.config.base import Trust
from fedfuse_shared.ledger.records import Charge, Policy, Reservation
from fedfuse_shared.ledger.verification_report import Code, Findings, SiteReport
from fedfuse_shared.privacy.accountant import epsilon, epsilon_rdp

ROUNDING: Final = 1e-6
"""Relative difference two machines' floating point may make of one epsilon."""

Steps = Counter[tuple[float, float]]
"""Steps by sampling rate and noise multiplier."""


@dataclass(frozen=True, slots=True)
class _Spending:
    """One reservation, and what was allowed when it was written."""

    leaf: int
    charge: Charge
    elsewhere: tuple[Charge, ...]
    cap: float | None
    delta: float


@dataclass
class Budget:
    """One site's spending on one data set."""

    site: str
    dataset: str
    trust: Trust
    colluders: int | None = None
    matched: int = 0
    rounds: int = 0
    spendings: list[_Spending] = field(default_factory=list)
    alone: Steps = field(default_factory=Counter)
    """The charges as they count if everybody else colludes: the site's own share of the noise."""
    elsewhere: Steps = field(default_factory=Counter)
    _interned: dict[object, object] = field(default_factory=dict)

    def reserve(self, leaf: int, body: Reservation, policy: Policy | None, findings: Findings) -> None:
        """Charge a reservation."""
        elsewhere = _steps(body.elsewhere)
        if any(elsewhere[mechanism] < steps for mechanism, steps in self.elsewhere.items()):
            detail = f"reports less spent outside this ledger on data set {self.dataset[:8]}… than it did before"
            findings.add(Code.ELSEWHERE_SHRANK, leaf, self.site, detail)
        self.elsewhere |= elsewhere  # of each mechanism the most that was ever reported
        if body.trust is Trust.AGGREGATE:
            known = body.colluders if self.colluders is None else self.colluders
            self.trust, self.colluders = Trust.AGGREGATE, min(known, body.colluders)
        self.alone[body.charge.sampling_rate, body.noise_share] += body.charge.steps
        self.spendings.append(
            _Spending(
                leaf=leaf,
                charge=self._same(body.charge),
                elsewhere=self._same(_charges(self.elsewhere)),
                cap=policy.epsilon_cap if policy else None,
                delta=policy.delta if policy else body.delta,
            )
        )

    def check(self, findings: Findings) -> None:
        """Compare epsilon at every prefix with the cap that stood then.

        Epsilon never falls as charges are added, so within a stretch under one policy the last prefix answers for
        all; only where it is over the cap the first one that was is searched, by bisection.
        """
        start = 0
        for (cap, delta), stretch in groupby(self.spendings, key=lambda spending: (spending.cap, spending.delta)):
            end = start + len(list(stretch))
            spent = epsilon(self._prefix(end), delta)
            if cap is not None and _over(spent, cap):
                low, high = start, end - 1
                while low < high:
                    middle = (low + high) // 2
                    over = _over(epsilon(self._prefix(middle + 1), delta), cap)
                    low, high = (low, middle) if over else (middle + 1, high)
                detail = (
                    f"brings epsilon on data set {self.dataset[:8]}… over the site's cap of {cap:g}: "
                    f"{_shown(epsilon(self._prefix(low + 1), delta))} here, {_shown(spent)} by leaf "
                    f"{self.spendings[end - 1].leaf} (delta {delta:g})"
                )
                findings.add(Code.OVER_CAP, self.spendings[low].leaf, self.site, detail)
            start = end

    def report(self, policy: Policy | None) -> SiteReport:
        """Return what was spent by the end of the ledger."""
        last = self.spendings[-1]
        delta = policy.delta if policy else last.delta
        charges = self._prefix(len(self.spendings))
        return SiteReport(
            site=self.site,
            dataset=self.dataset,
            trust=self.trust,
            colluders=self.colluders,
            epsilon=_finite(epsilon(charges, delta)),
            epsilon_rdp=_finite(epsilon_rdp(charges, delta)),
            epsilon_all_collude=_finite(epsilon([*_charges(self.alone), *last.elsewhere], delta)),
            delta=delta,
            cap=policy.epsilon_cap if policy else None,
            adjacency="add-or-remove-one-record",
            rounds=self.rounds,
            reservations=len(self.spendings),
            unmatched=len(self.spendings) - self.matched,
            mechanisms=len(charges),
        )

    def _prefix(self, count: int) -> tuple[Charge, ...]:
        """Return all charges of the first reservations, and what was spent elsewhere by then."""
        spent = _steps(spending.charge for spending in self.spendings[:count])
        return _charges(spent + _steps(self.spendings[count - 1].elsewhere))

    def _same[V](self, value: V) -> V: ...


def idle(site: str, policy: Policy | None) -> SiteReport:
    """Return the report of a site that never reserved anything."""
    return SiteReport(
        site=site,
        dataset=None,
        trust=None,
        colluders=None,
        epsilon=0.0,
        epsilon_rdp=0.0,
        epsilon_all_collude=0.0,
        delta=policy.delta if policy else None,
        cap=policy.epsilon_cap if policy else None,
        adjacency="add-or-remove-one-record",
        rounds=0,
        reservations=0,
        unmatched=0,
        mechanisms=0,
    )
