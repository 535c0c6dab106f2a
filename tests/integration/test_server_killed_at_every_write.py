"""The server is killed, as a process, at each of its durable writes in turn; the next one goes on with the run.

Every write is tried three times: killed just before it, so that what was announced until then stands; just after it,
before anybody is told; and just before it with everything lost that was not on disk, as in a power cut. What must
hold after each kill is looked at from outside, by other processes: the state and the ledger can be read, the ledger
reaches its checkpoint and verifies, no opened round is lost, and no site's store lacks a charge that the ledger has.
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
from support.written import audited, charged, closes, stored, whole_lines

from fedfuse_client.home import SiteHome
from fedfuse_server.home import ServerState
from fedfuse_shared.ledger.records import Outcome

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
        self._opened = 0

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
        return whole_lines(self.home.ledger)

    def opened(self):
        return closes(self.lines(), Outcome.OPENED)

    def stored(self, site):
        home = SiteHome(self.federation.folders[site])
        return stored(home.store, self.federation.config.federation, site)

    def check(self):
        """Nothing that was announced is lost, and nobody is charged for what it does not know of."""
        lines = self.lines()
        if not lines:
            assert not self._opened
            return
        audited(self.home)
        for site in SITES:
            assert charged(lines, site) <= self.stored(site)
        opened = self.opened()
        assert len(opened) >= self._opened
        self._opened = len(opened)
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
            assert before[site] <= charged(self.lines(), site)
        audited(self.home)


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
    every = ((write, when) for write in itertools.count(1) for when in dying_server.WHEN)
    assert kill_at(tmp_path, every) > 45


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
