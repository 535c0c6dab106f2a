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
from fedfuse_shared.privacy.accountant import epsilon_enforced
from fedfuse_shared.privacy.mechanisms import Steps, charges_of, merge, steps_by_mechanism

ROUNDING: Final = 1e-6
"""Relative difference two machines' floating point may make of one epsilon."""


@dataclass(frozen=True, slots=True)
class _Spending:
    """One reservation, and what was allowed when it was written."""

    leaf: int
    charges: tuple[Charge, ...]
    own_charges: tuple[Charge, ...]
    """The same as they count if everybody else colludes: the site's own share of the noise."""
    draws: int
    """Integer draws on each coordinate up to here, on this ledger."""
    elsewhere: tuple[Charge, ...]
    elsewhere_alone: tuple[Charge, ...]
    elsewhere_draws: int
    cap: float | None
    cap_alone: float | None
    """Cap on what is spent if everybody else colludes."""
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
    elsewhere: Steps = field(default_factory=Counter)
    elsewhere_draws: int = 0

    def reserve(self, leaf: int, body: Reservation, policy: Policy | None, findings: Findings) -> None:
        """Charge a reservation."""
        elsewhere = steps_by_mechanism(body.elsewhere)
        fewer = any(elsewhere[mechanism] < steps for mechanism, steps in self.elsewhere.items())
        if fewer or body.elsewhere_draws < self.elsewhere_draws:
            detail = (
                f"reports less spent outside this ledger on data set {self.dataset[:8]}… than it did before"
            )
            findings.add(Code.ELSEWHERE_SHRANK, leaf, self.site, detail)
        self.elsewhere |= elsewhere  # of each mechanism the most that was ever reported
        self.elsewhere_draws = max(self.elsewhere_draws, body.elsewhere_draws)
        if body.trust is Trust.NONE:
            self.trust = Trust.NONE
        if body.trust is Trust.AGGREGATE:
            known = body.colluders if self.colluders is None else self.colluders
            self.colluders = min(known, body.colluders)
            if (
                self.trust is not Trust.NONE
            ):  # which stays: nothing protects what was trained on without noise
                self.trust = Trust.AGGREGATE
        before = self.spendings[-1] if self.spendings else None
        schedule = policy.schedule if policy else Schedule.FREE
        # As this reservation reports it: keeping the union with every one would take the square of the ledger.
        spent_elsewhere = charges_of(elsewhere)
        alone = spent_elsewhere if body.elsewhere_alone is None else merge(body.elsewhere_alone)
        # Rounds are alike: equal values share one object, so that a million leaves fit in memory.
        self.spendings.append(
            _Spending(
                leaf=leaf,
                charges=before.charges if before and before.charges == body.charges else body.charges,
                own_charges=before.own_charges
                if before and before.own_charges == body.own_charges
                else body.own_charges,
                draws=(before.draws if before else 0) + body.draws,
                elsewhere=before.elsewhere
                if before and before.elsewhere == spent_elsewhere
                else spent_elsewhere,
                elsewhere_alone=before.elsewhere_alone
                if before and before.elsewhere_alone == alone
                else alone,
                elsewhere_draws=body.elsewhere_draws,
                cap=policy.epsilon_cap if policy else None,
                cap_alone=policy.max_epsilon_all_collude if policy else None,
                delta=policy.delta if policy else body.delta,
                unprotected=body.trust is Trust.NONE,
                schedule=schedule,
                counted=before.counted if before and before.counted is Schedule.FREE else schedule,
            )
        )

    def check(self, findings: Findings) -> None:
        """Compare epsilon at every prefix with the caps that stood then."""
        start = 0
        for (cap, cap_alone, unprotected, schedule, *_), stretch in groupby(
            self.spendings,
            key=lambda each: (
                each.cap,
                each.cap_alone,
                each.unprotected,
                each.schedule,
                each.counted,
                each.delta,
            ),
        ):
            end = start + len(list(stretch))
            if unprotected:
                # Whether the site's policy allowed it is checked with the offer; no cap is claimed to hold here.
                start = end
                continue
            self._check_schedule(start, end, schedule, findings)
            if cap is not None:
                self._check_cap(start, end, cap, findings, alone=False)
            if cap_alone is not None:
                self._check_cap(start, end, cap_alone, findings, alone=True)
            start = end

    def _check_cap(self, start: int, end: int, cap: float, findings: Findings, *, alone: bool) -> None:
        """Find the first reservation of a stretch under one policy that passed a cap.

        Epsilon never falls as charges are added, so the last prefix answers for all; only where it is over the cap
        the first one that was is searched, by bisection.
        """
        delta, counted = self.spendings[end - 1].delta, self.spendings[end - 1].counted
        spent = self._spent(end, delta, counted, alone=alone)
        if not over(spent, cap):
            return
        low, high = start, end - 1
        while low < high:
            middle = (low + high) // 2
            too_much = over(self._spent(middle + 1, delta, counted, alone=alone), cap)
            low, high = (low, middle) if too_much else (middle + 1, high)
        here = self._spent(low + 1, delta, counted, alone=alone)
        against = " if all others collude" if alone else ""
        detail = (
            f"brings epsilon{against} on data set {self.dataset[:8]}… over the site's cap of {cap:g}: "
            f"{_shown(here)} here, {_shown(spent)} by leaf {self.spendings[end - 1].leaf} (delta {delta:g})"
        )
        findings.add(Code.OVER_CAP, self.spendings[low].leaf, self.site, detail)

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
            # By the same rules as a free schedule's: at the delta that inexact draws leave.
            epsilon_rdp=_finite(
                epsilon_enforced(charges, delta, Schedule.FREE, last.draws + last.elsewhere_draws)
            ),
            epsilon_all_collude=_finite(self._spent(len(self.spendings), delta, counted, alone=True)),
            delta=delta,
            cap=policy.epsilon_cap if policy else None,
            adjacency="add-or-remove-one-record",
            rounds=self.rounds,
            reservations=len(self.spendings),
            unmatched=len(self.spendings) - self.matched,
            mechanisms=len(steps_by_mechanism(charges)),
        )

    def _spent(self, count: int, delta: float, schedule: Schedule, *, alone: bool = False) -> float:
        """Return epsilon after the first reservations."""
        last = self.spendings[count - 1]
        draws = last.draws + last.elsewhere_draws
        return epsilon_enforced(self._prefix(count, alone=alone), delta, schedule, draws)

    def _prefix(self, count: int, *, alone: bool = False) -> tuple[Charge, ...]:
        """Return all charges of the first reservations, and what was spent elsewhere by then.

        Args:
            count: How many.
            alone: As they count if everybody else colludes.
        """
        first, last = islice(self.spendings, count), self.spendings[count - 1]
        if alone:
            return merge(chain(chain.from_iterable(each.own_charges for each in first), last.elsewhere_alone))
        return merge(chain(chain.from_iterable(each.charges for each in first), last.elsewhere))


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
