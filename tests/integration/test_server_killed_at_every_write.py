"""The server is killed, as a process, at each of its durable writes in turn; the next one goes on with the run.

Every write is tried twice: killed just before it, so that what was announced until then stands; and just after it,
before anybody is told. What must hold after each kill is looked at from outside, by other processes: the state and
the ledger can be read, the ledger verifies, and no site's store lacks a charge that the ledger has.
"""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import dying_server
from support.faults import AGES, LongRun
from support.small_federation import SITES, SmallFederation

from fedfuse_client.home import SiteHome
from fedfuse_server.home import ServerState
from fedfuse_shared.envelope import decode
from fedfuse_shared.ledger.checkpoint import Head, origin_of
from fedfuse_shared.ledger.log import kind_of
from fedfuse_shared.ledger.merkle import Tree
from fedfuse_shared.ledger.records import Close, Outcome, Reservation
from fedfuse_shared.ledger.verification import verify_ledger
from fedfuse_shared.ledger.verification_report import Code
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROGRAM = Path(dying_server.__file__)
SOME = 7
"""Every so many of the writes are tried in the usual tests."""


class Killed:
    """A small federation whose server is started again and again, each time to be killed."""

    def __init__(self, root):
        # More rounds than are played: what an aborted attempt is charged must not end the run.
        self.federation = SmallFederation(root, {"rounds": 400})
        self.home = self.federation.home

    def start(self, write, when):
        """Let a server run until it dies; return the writes it counted if it did not."""
        sites = json.dumps([str(folder) for folder in self.federation.folders.values()])
        words = [sys.executable, str(PROGRAM), str(write), when, "inline", str(self.home.root), sites]
        done = subprocess.run(words, capture_output=True, text=True, timeout=AGES, check=False)
        if done.returncode == -signal.SIGKILL:
            return None
        assert done.returncode == 0, done.stderr[-3000:]
        return int(done.stdout.split()[-1])

    def lines(self):
        raw = self.home.ledger.read_bytes() if self.home.ledger.exists() else b""
        return raw.split(b"\n")[:-1]  # a torn last line is healed by the next server

    def opened(self):
        closes = [decode(raw, Close, who="ledger").body for raw in self.lines() if kind_of(raw) == Close.kind]
        return [close for close in closes if close.outcome is Outcome.OPENED]

    def charges(self, lines, site):
        leaves = (decode(raw, Reservation, who=site) for raw in lines if kind_of(raw) == Reservation.kind)
        return {leaf.body.context for leaf in leaves if leaf.author == site}

    def stored(self, site):
        with SiteHome(self.federation.folders[site]).view_store() as store:
            return self.charges(store.chain(self.federation.config.federation, site).leaves_after(0), site)

    def check(self):
        """Nothing that was announced is lost, and nobody is charged for what it does not know of."""
        lines = self.lines()
        if not lines:
            return
        roster = self.home.load_roster().body
        report = verify_ledger(iter(lines), roster, Head(origin_of(roster.federation), 0, Tree().root()))
        assert {finding.code for finding in report.findings} <= {Code.BEYOND_CHECKPOINT}, report.findings
        for site in SITES:
            assert self.charges(lines, site) <= self.stored(site)
        opened = self.opened()
        if self.home.state.exists():
            state = ServerState.load(self.home.state)
            # The state with its close reaches the disk first, the ledger after it.
            assert state.round in {len(opened), len(opened) + 1}
        else:
            assert not opened

    def finish(self):
        """Go on until a round is opened by all; every charge in a store is on the ledger then."""
        before = {site: self.stored(site) for site in SITES}
        rounds = len(self.opened())
        assert self.start(10**9, "after") is not None
        assert len(self.opened()) > rounds
        assert set(self.opened()[-1].survivors) == set(SITES)
        for site in SITES:
            assert before[site] <= self.charges(self.lines(), site)
        # The process that was just ended signed a head that everything before its last attempt is under.
        findings = [one for one in audit(self.home).findings if one.code is not Code.BEYOND_CHECKPOINT]
        assert not findings, findings


def kill_at(root, writes):
    killed = Killed(root)
    kills = 0
    for write, when in writes:
        counted = killed.start(write, when)
        killed.check()
        if counted is not None:
            # Offer, leaves of sites, state, close, model, checkpoint: fewer would mean that writes are missed.
            assert counted > 15
            break
        kills += 1
    killed.finish()
    return kills


@pytest.mark.long
def test_a_server_killed_at_any_durable_write_is_gone_on_from(tmp_path):
    assert kill_at(tmp_path, itertools.product(itertools.count(1), dying_server.WHEN)) > 30


def test_a_server_killed_at_some_durable_writes_is_gone_on_from(tmp_path):
    some = zip(itertools.count(1, SOME), itertools.cycle(dying_server.WHEN), strict=False)
    assert kill_at(tmp_path, some) > 2


@pytest.mark.deployment
def test_a_deployed_server_killed_at_durable_writes_is_gone_on_from(tmp_path):
    """The same over TLS with sites in processes of their own, at every fifth write."""
    run = LongRun(tmp_path / "demo")
    try:
        run.start_sites()
        for write, when in zip(range(1, 60, 5), itertools.cycle(dying_server.WHEN), strict=False):
            run.serve(program=(sys.executable, str(PROGRAM), str(write), when, "fedfuse"))
            run.wait(lambda: not run.is_serving(), AGES, 0.1)
            assert run.server_ended() == -signal.SIGKILL, run.last_words()
        run.serve()
        run.next_round(sites=SITES)
        run.settled()
        report, _ = run.finish()
        assert report.ok
    finally:
        run.end()
