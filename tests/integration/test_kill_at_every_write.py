"""A site dies at each of its durable writes in turn, comes back, is asked again, and the round is finished by all."""

from contextlib import contextmanager

import pytest
from support.small_federation import SITES, SmallFederation

from fedfuse_client.round import close_sites
from fedfuse_client.store_database import Database
from fedfuse_server.events import RoundOpened, SiteLeftOut
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Receipt, Reservation
from fedfuse_simulations.engines.inline import InlineGrid
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

VICTIM = "lyon"


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but what would survive on disk."""


class Dying(InlineGrid):
    """A site that dies comes back in a fresh process and is sent the same message again."""

    def _deliver(self, message):
        try:
            return super()._deliver(message)
        except Killed:
            close_sites()
            return super()._deliver(message)


def dying_at(monkeypatch, write, *, before):
    """Let the victim die at its n-th durable write, just before it or just after; return how many it came to."""
    real = Database.transaction
    count = [0]

    @contextmanager
    def transaction(self):
        outermost = not self.in_transaction and VICTIM in self.path.parts
        with real(self):
            yield
            if outermost:
                count[0] += 1
            if outermost and before and count[0] == write:
                raise Killed
        if outermost and not before and count[0] == write:
            raise Killed

    monkeypatch.setattr(Database, "transaction", transaction)
    return count


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_site_killed_at_any_durable_write_finishes_the_round(tmp_path, monkeypatch, before):
    write = 0
    while True:
        write += 1
        federation = SmallFederation(tmp_path / str(write), {"rounds": 1})
        with monkeypatch.context() as patch:
            count = dying_at(patch, write, before=before)
            federation.run(federation.grid(grid_type=Dying))
        assert not federation.told(SiteLeftOut)
        assert [event.survivors for event in federation.told(RoundOpened)] == [SITES]
        kinds = [kind_of(entry.raw) for entry in read_ledger(federation.home.ledger)]
        assert kinds.count(Reservation.kind) == kinds.count(Receipt.kind) == len(SITES)
        report = audit(federation.home)
        assert report.ok, report.findings
        if count[0] < write:
            break
    # Policy, data set, keys, shares, reservation, vector, agreement, reveal: fewer would mean that writes are missed.
    assert write > 7
