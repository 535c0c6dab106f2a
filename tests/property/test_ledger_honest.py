"""No audit blames the honest: whoever drops out, refuses or is late, an honest ledger has no findings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.federation import Federation
from support.ledgers import LedgerBuilder, head_of

from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import encode
from fedfuse_shared.ledger.merkle import Tree
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.ledger.verification import verify_ledger

FEDERATIONS = {size: Federation.of(size) for size in (3, 4, 5, 7)}
OUTCOMES = st.sampled_from(
    ["sends", "sends", "sends", "drops after reserving", "refuses", "is silent", "is late"]
)


def attempt(builder: LedgerBuilder, data: st.DataObject, number: int) -> tuple[bool, dict[str, str]]:
    """One attempt in which sites fare as they may; return whether it was opened, and how they fared."""
    names = builder.federation.names
    count = data.draw(st.integers(3, len(names)))
    drawn = data.draw(st.permutations(names))[:count]
    offer = builder.offer(attempt=number, participants=tuple(sorted(drawn)))
    fates = {site: data.draw(OUTCOMES) for site in offer.participants}
    for site in data.draw(st.permutations(offer.participants)):
        if fates[site] == "refuses":
            builder.refuse(site, offer)
        elif fates[site] != "is silent":
            builder.reserve(site, offer)
            if fates[site] == "sends":
                builder.receipt(site, offer)
    survivors = [site for site, fate in fates.items() if fate == "sends"]
    opened = len(survivors) >= max(offer.threshold, offer.min_survivors)
    if opened:
        agreers = data.draw(st.permutations(survivors))[
            : data.draw(st.integers(offer.threshold, len(survivors)))
        ]
        builder.close(offer, survivors, agreers=agreers)
    elif data.draw(st.booleans()):  # or the server was killed and came back
        builder.abort(offer)
    for site, fate in fates.items():
        if fate == "is late":
            builder.receipt(site, offer)
    return opened, fates


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_honest_ledgers_have_no_findings(data: st.DataObject) -> None:
    builder = LedgerBuilder(FEDERATIONS[data.draw(st.sampled_from(sorted(FEDERATIONS)))]).enrol()
    rounds = reservations = unmatched = 0
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            builder.policy(data.draw(st.sampled_from(builder.federation.names)))
        for number in (1, 2):
            opened, fates = attempt(builder, data, number)
            fared = list(fates.values())
            reservations += len(fared) - fared.count("refuses") - fared.count("is silent")
            unmatched += fared.count("drops after reserving")
            if opened:
                rounds += fared.count("sends")
                break
    report = builder.audit()
    assert report.findings == ()
    assert report.ok
    assert sum(row.rounds for row in report.sites) == rounds
    assert sum(row.reservations for row in report.sites) == reservations
    assert sum(row.unmatched for row in report.sites) == unmatched
    assert {row.site for row in report.sites} == set(builder.federation.names)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_spending_elsewhere_only_adds(data: st.DataObject) -> None:
    builder = LedgerBuilder(FEDERATIONS[3]).enrol()
    for site in builder.federation.names:
        builder.policy(site, schedule=Schedule.FREE)
    spent = 0
    for _ in range(3):
        offer = builder.offer()
        spent += data.draw(st.sampled_from([0, 0, 3]))
        elsewhere = (Charge(sampling_rate=0.5, noise_multiplier=4.0, steps=spent),) if spent else ()
        for site in offer.participants:
            builder.reserve(site, offer, elsewhere=elsewhere)
            builder.receipt(site, offer)
        builder.close(offer, offer.participants)
    report = builder.audit()
    assert report.ok
    alone = LedgerBuilder(FEDERATIONS[3]).enrol()
    for site in alone.federation.names:
        alone.policy(site, schedule=Schedule.FREE)
    for _ in range(3):
        alone.round()
    least = alone.audit().sites[0].epsilon
    for row in report.sites:
        assert row.epsilon >= least
        assert (row.epsilon > least) == (spent > 0)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_prefix_of_an_honest_ledger_is_honest(data: st.DataObject) -> None:
    builder = LedgerBuilder(FEDERATIONS[4]).enrol()
    for _ in range(2):
        attempt(builder, data, 1)
    lines = [encode(leaf) for leaf in builder.leaves]
    end = data.draw(st.integers(1, len(lines)))
    report = verify_ledger(lines[:end], builder.federation.roster, head_of(lines[:end]))
    assert report.ok
    tree = Tree()
    for line in lines[:end]:
        tree.append(line)
    assert (report.leaves, report.root) == (end, tree.root().hex())
