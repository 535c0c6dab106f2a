"""What each site spent on each data set, at every prefix of the ledger, against the cap it published.

Charged is what was reserved, whether or not a receipt or an opened round followed: there is no refund.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import Final

from fedfuse_shared.config.base import Trust
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.ledger.records import Charge, Policy, Reservation
from fedfuse_shared.ledger.verification_report import Code, Findings, SiteReport
from fedfuse_shared.privacy.accountant import epsilon_enforced, epsilon_rdp, usable_delta
from fedfuse_shared.privacy.mechanisms import Steps, charges_of, merge, steps_by_mechanism

ROUNDING: Final = 1e-6
"""Relative difference two machines' floating point may make of one epsilon."""


@dataclass(frozen=True, slots=True)
class _Spending:
    """One reservation, and what was allowed when it was written."""

    leaf: int
    charges: tuple[Charge, ...]
    draws: int
    """Integer draws on each coordinate up to here."""
    elsewhere: tuple[Charge, ...]
    cap: float | None
    delta: float
    unprotected: bool
    """Trained without a guarantee (trust = none)."""
    schedule: Schedule
    """What the policy said then; ``free`` where there was none, which counts no less."""
    counted: Schedule
    """How it counts: ``free`` from the first reservation under a free schedule on, for good."""


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
    alone_cap: float | None = None
    """Most that these may cost, by the policy of the last reservation."""
    elsewhere: Steps = field(default_factory=Counter)

    def reserve(self, leaf: int, body: Reservation, policy: Policy | None, findings: Findings) -> None:
        """Charge a reservation."""
        elsewhere = steps_by_mechanism(body.elsewhere)
        if any(elsewhere[mechanism] < steps for mechanism, steps in self.elsewhere.items()):
            detail = (
                f"reports less spent outside this ledger on data set {self.dataset[:8]}… than it did before"
            )
            findings.add(Code.ELSEWHERE_SHRANK, leaf, self.site, detail)
        self.elsewhere |= elsewhere  # of each mechanism the most that was ever reported
        if body.trust is Trust.NONE:
            self.trust = Trust.NONE
        if body.trust is Trust.AGGREGATE:
            known = body.colluders if self.colluders is None else self.colluders
            self.colluders = min(known, body.colluders)
            if self.trust is not Trust.NONE:
                self.trust = Trust.AGGREGATE
        if policy is not None:
            self.alone_cap = policy.max_epsilon_all_collude
        self.alone += steps_by_mechanism(body.own_charges)
        before = self.spendings[-1] if self.spendings else None
        schedule = policy.schedule if policy else Schedule.FREE
        # As this reservation reports it: keeping the union with every one would take the square of the ledger.
        spent_elsewhere = charges_of(elsewhere)
        # Rounds are alike: equal values share one object, so that a million leaves fit in memory.
        self.spendings.append(
            _Spending(
                leaf=leaf,
                charges=before.charges if before and before.charges == body.charges else body.charges,
                draws=(before.draws if before else 0) + body.draws,
                elsewhere=before.elsewhere
                if before and before.elsewhere == spent_elsewhere
                else spent_elsewhere,
                cap=policy.epsilon_cap if policy else None,
                delta=policy.delta if policy else body.delta,
                unprotected=body.trust is Trust.NONE,
                schedule=schedule,
                counted=before.counted if before and before.counted is Schedule.FREE else schedule,
            )
        )

    def check(self, findings: Findings) -> None:
        """Compare epsilon at every prefix with the cap that stood then.

        Epsilon never falls as charges are added, so within a stretch under one policy the last prefix answers for
        all; only where it is over the cap the first one that was is searched, by bisection.
        """
        start = 0
        for (cap, delta, unprotected, schedule, counted), stretch in groupby(
            self.spendings,
            key=lambda each: (each.cap, each.delta, each.unprotected, each.schedule, each.counted),
        ):
            end = start + len(list(stretch))
            if unprotected:
                # Whether the site's policy allowed it is checked with the offer; no cap is claimed to hold here.
                start = end
                continue
            self._check_schedule(start, end, schedule, findings)
            spent = self._spent(end, delta, counted)
            if cap is not None and over(spent, cap):
                low, high = start, end - 1
                while low < high:
                    middle = (low + high) // 2
                    too_much = over(self._spent(middle + 1, delta, counted), cap)
                    low, high = (low, middle) if too_much else (middle + 1, high)
                here = self._spent(low + 1, delta, counted)
                detail = (
                    f"brings epsilon on data set {self.dataset[:8]}… over the site's cap of {cap:g}: "
                    f"{_shown(here)} here, {_shown(spent)} by leaf "
                    f"{self.spendings[end - 1].leaf} (delta {delta:g})"
                )
                findings.add(Code.OVER_CAP, self.spendings[low].leaf, self.site, detail)
            start = end

        self._check_alone(findings)

    def _check_alone(self, findings: Findings) -> None:
        """Compare what is spent if everybody else colludes with the cap the site's last policy set for it."""
        if self.alone_cap is None or not self.spendings:
            return
        last = self.spendings[-1]
        alone = self._spent_alone(last.delta, last.counted)
        if over(alone, self.alone_cap):
            detail = (
                f"brings epsilon on data set {self.dataset[:8]}… to {_shown(alone)} if all other sites collude, over "
                f"the site's cap of {self.alone_cap:g} for that"
            )
            findings.add(Code.OVER_CAP, last.leaf, self.site, detail)

    def _check_schedule(self, start: int, end: int, schedule: Schedule, findings: Findings) -> None:
        """Find the first reservation of a stretch that changed a mechanism its policy had fixed."""
        if schedule is Schedule.FREE or len(steps_by_mechanism(self._prefix(end))) <= 1:
            return
        seen = set(steps_by_mechanism(self._prefix(start))) if start else set()
        for place in range(start, end):
            spending = self.spendings[place]
            seen |= steps_by_mechanism((*spending.charges, *spending.elsewhere)).keys()
            if len(seen) > 1:
                detail = (
                    f"charges data set {self.dataset[:8]}… for a second mechanism, and the site's schedule is fixed: "
                    "caps are compared with Renyi accounting from here on"
                )
                findings.add(Code.SCHEDULE, spending.leaf, self.site, detail)
                return

    def report(self, policy: Policy | None) -> SiteReport:
        """Return what was spent by the end of the ledger."""
        last = self.spendings[-1]
        delta = policy.delta if policy else last.delta
        charges = self._prefix(len(self.spendings))
        schedule = policy.schedule if policy else last.schedule
        counted = Schedule.FREE if Schedule.FREE in {schedule, last.counted} else Schedule.FIXED
        return SiteReport(
            site=self.site,
            dataset=self.dataset,
            trust=self.trust,
            colluders=self.colluders,
            epsilon=_finite(self._spent(len(self.spendings), delta, counted)),
            schedule=schedule,
            epsilon_rdp=_finite(epsilon_rdp(charges, usable_delta(delta, shared=last.draws > 0))),
            epsilon_all_collude=_finite(self._spent_alone(delta, counted)),
            delta=delta,
            cap=policy.epsilon_cap if policy else None,
            adjacency="add-or-remove-one-record",
            rounds=self.rounds,
            reservations=len(self.spendings),
            unmatched=len(self.spendings) - self.matched,
            mechanisms=len(steps_by_mechanism(charges)),
        )

    def _spent(self, count: int, delta: float, schedule: Schedule) -> float:
        """Return epsilon after the first reservations."""
        return epsilon_enforced(self._prefix(count), delta, schedule, self.spendings[count - 1].draws)

    def _spent_alone(self, delta: float, schedule: Schedule) -> float:
        """Return epsilon after all reservations if everybody else colludes."""
        last = self.spendings[-1]
        return epsilon_enforced([*charges_of(self.alone), *last.elsewhere], delta, schedule, last.draws)

    def _prefix(self, count: int) -> tuple[Charge, ...]:
        """Return all charges of the first reservations, and what was spent elsewhere by then."""
        here = chain.from_iterable(spending.charges for spending in islice(self.spendings, count))
        return merge(chain(here, self.spendings[count - 1].elsewhere))


def idle(site: str, policy: Policy | None) -> SiteReport:
    """Return the report of a site that never reserved anything."""
    return SiteReport(
        site=site,
        dataset=None,
        trust=None,
        colluders=None,
        epsilon=0.0,
        schedule=policy.schedule if policy else None,
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


def over(spent: float, cap: float) -> bool:
    """Return whether spending is above a cap by more than rounding."""
    return spent > cap * (1 + ROUNDING)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float) -> str:
    return f"{value:.4g}"
