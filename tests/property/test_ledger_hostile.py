"""An audit of anything ends with a report: no input makes it crash, and nothing forged passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.federation import Federation
from support.ledgers import LedgerBuilder, head_of

from fedfuse_shared.config.base import Trust
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.ledger.verification import verify_ledger

pytestmark = pytest.mark.slow

FEDERATION = Federation.of(3)
HONEST = LedgerBuilder(FEDERATION).enrol()
HONEST.round()
LINES = HONEST.lines()

POSITIVE = st.floats(5e-324, 1.7e308)
UNIT = st.floats(5e-324, 1.0)
SITES = st.integers(0, 100)
CHARGES = st.builds(Charge, sampling_rate=UNIT, noise_multiplier=POSITIVE, steps=st.integers(1, 10**9))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_bytes_of_any_kind_give_findings(data: st.DataObject) -> None:
    lines = list(LINES)
    index = data.draw(st.integers(0, len(lines) - 1))
    line = lines[index]
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, min(len(line), start + 40)))
    forged = line[:start] + data.draw(st.binary(max_size=40)) + line[end:]
    lines[index] = forged
    report = verify_ledger(lines, FEDERATION.roster, head_of(lines))
    assert report.ok == (forged == line)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_numbers_at_the_edge_of_their_range_give_a_report(data: st.DataObject) -> None:
    """Every author signs what its schema allows, however absurd."""
    builder = LedgerBuilder(FEDERATION).enrol()
    delta = data.draw(st.floats(5e-324, 1.0, exclude_max=True))
    builder.policy("site00", epsilon_cap=data.draw(POSITIVE), delta=delta, min_participants=data.draw(SITES))
    asked = builder.federation.offer().privacy.model_copy(
        update={
            "trust": data.draw(st.sampled_from(Trust)),
            "sampling_rate": data.draw(UNIT),
            "steps": data.draw(st.integers(1, 10_000)),
            "noise_multiplier": data.draw(POSITIVE),
            "noise_share": data.draw(POSITIVE),
            "noise_sites": data.draw(SITES),
            "delta": delta,
        }
    )
    offer = builder.offer(
        privacy=asked,
        threshold=data.draw(SITES),
        colluders=data.draw(SITES),
        min_survivors=data.draw(SITES),
    )
    builder.reserve("site00", offer, elsewhere=tuple(data.draw(st.lists(CHARGES, max_size=2))))
    builder.reserve("site01", offer, charge=data.draw(CHARGES))
    builder.receipt("site01", offer, steps=data.draw(st.integers(0, 10**9)))
    builder.close(offer, data.draw(st.lists(st.sampled_from(FEDERATION.names), unique=True)))
    report = builder.audit()
    assert not report.ok
    for row in report.sites:
        assert row.epsilon is None or row.epsilon >= 0
