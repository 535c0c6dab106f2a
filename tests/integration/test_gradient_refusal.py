"""A site that cannot prove its gradients says so before anything is charged."""

import logging

import pytest
from support.small_federation import SITES, SmallFederation

from fedfuse_client import learner
from fedfuse_server.events import RoundOpened, SiteLeftOut
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Reservation
from fedfuse_shared.messages import Step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def test_without_proven_gradients_no_site_trains_and_none_is_charged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(learner, "GRADIENTS", "quick")
    federation = SmallFederation(tmp_path, {"rounds": 1})
    with caplog.at_level(logging.ERROR):
        federation.run()
    assert not federation.told(RoundOpened)
    left_out = federation.told(SiteLeftOut)
    assert {event.site for event in left_out} == set(SITES)
    assert {event.step for event in left_out} == {Step.UPDATE}
    assert not any("quick" in event.reason for event in left_out)
    assert "there is no gradient mode 'quick'" in caplog.text
    assert Reservation.kind not in {kind_of(entry.raw) for entry in read_ledger(federation.home.ledger)}
