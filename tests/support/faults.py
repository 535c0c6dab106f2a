"""A deployment whose rounds go on and on while faults are put in, and what must hold after each of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time

from fedfuse_shared.ledger.records import Outcome
from fedfuse_shared.messages import Step
from fedfuse_shared.offer import Offer
from support.deployment import FEDFUSE, Deployment
from support.small_federation import SITES
from support.written import audited, charged, closes, leaves_of, stored, whole_lines

STEPS = (Step.KEYS, Step.SHARES, Step.UPDATE, Step.AGREE, Step.UNMASK)
PATIENCE = 25.0
"""Seconds an exchange may take: what a site that hangs costs."""
AGES = 240
"""Longest that anything is waited for (seconds): a busy machine, and three attempts that wait for a lost site."""


class LongRun(Deployment):
    """Four sites, of which a round can do without one, and more rounds than are ever played.

    Args:
        root: An empty folder.
        patience: Seconds an exchange may take.
        wait: Seconds a round waits for a missing site.
    """

    def __init__(self, root, *, patience=PATIENCE, wait=20):
        changes = {
            "privacy": {"noise_multiplier": 4.0, "expected_batch_size": 8},
            "secure_aggregation": {"min_survivors": 3},
        }
        super().__init__(root, rounds=5000, sites=SITES, patience=patience, cap=1000, changes=changes)
        self._wait = str(wait)
        self._server = None

    # --- processes ------------------------------------------------------------------------------------------
    def serve(self, *, program=(FEDFUSE,)):
        """Start the server, or the next one, which goes on with the run."""
        more = ("--resume",) if self.server.state.exists() else ()
        self._server = self.start_server("--wait", self._wait, *more, program=program)

    def is_serving(self):
        """Return whether the server runs."""
        return self._server is not None and self._server.poll() is None

    def server_ended(self):
        """Return the exit code of the server that ended last."""
        return self._server.returncode

    def kill_server(self):
        """Kill the server at once (``kill -9``)."""
        self._server.kill()
        self._server.wait()

    def stop_server(self):
        """Ask the server to end, and wait until it has."""
        self._server.send_signal(signal.SIGTERM)
        self._server.wait(AGES)

    def last_words(self):
        """Return the end of what the last server showed."""
        number = len([name for name in self._processes if name.startswith("server")]) - 1
        return (self.root / f"server-{number}.log").read_text()[-2000:]

    def stop_site(self, site):
        """Ask a site to end, and wait until it has."""
        self.running(site).terminate()
        self.running(site).wait(AGES)

    def is_up(self, site):
        """Return whether a site's process runs."""
        return site in self._processes and self.running(site).poll() is None

    def heal(self):
        """Start whatever does not run."""
        for site in self.sites:
            if not self.is_up(site):
                self.start_site(site)
        if not self.is_serving():
            self.serve()

    def kill_superlink(self):
        """Kill the SuperLink, and return its process; None where the server ended before it told of one."""

        def told():
            return not self.is_serving() or (self.server.standing.exists() and self.superlink())

        self.wait(told, AGES, 0.05)
        if not self.is_serving():
            return None
        pid = self.superlink()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return pid

    # --- moments --------------------------------------------------------------------------------------------
    def until(self, condition, seconds=AGES):
        """Wait for something; the server must not end meanwhile."""

        def holds():
            found = condition()
            assert found or self.is_serving(), f"the server ended\n{self.last_words()}"
            return found

        return self.wait(holds, seconds, 0.02)

    def rounds(self):
        """Return how many rounds were opened, as the server tells."""
        return len(self.told())

    def told(self):
        """Return what the server told of each opened round; a server that goes on tells its last one again."""
        return list({event["round"]: event for event in self.events("RoundOpened")}.values())

    def next_round(self, *, of=None, sites=None):
        """Wait for one more round than ``of`` (now, if left out), in which ``sites`` are; return its survivors."""
        before = self.rounds() if of is None else of

        def opened():
            for event in self.told()[before:]:
                if sites is None or set(sites) <= set(event["survivors"]):
                    return tuple(event["survivors"])
            return None

        return self.until(opened)

    def in_step(self, step):
        """Wait until an attempt with everybody in it is just in a step."""
        seen = len(self.events("RoundStarted"))

        def there():
            events = self.events()
            starts = [i for i, event in enumerate(events) if event["event"] == "RoundStarted"]
            if len(starts) <= seen or tuple(sorted(events[starts[-1]]["participants"])) != tuple(self.sites):
                return False
            ended = [e["step"] for e in events[starts[-1] :] if e["event"] == "ExchangeEnded"]
            return len(ended) == STEPS.index(step)

        self.until(there)

    def left_out(self, site, since=0):
        """Return what the server said when it left a site out, after so many events."""
        return [
            (event["step"], event["reason"])
            for event in self.events()[since:]
            if event["event"] == "SiteLeftOut" and event["site"] == site
        ]

    def log_of(self, site):
        """Return the lines of what a site's processes showed or logged, of this start and those before."""
        shown = (self.root / f"{site}.log").read_text(errors="replace").splitlines()
        return [*shown, *(json.dumps(line) for line in self.said(site))] if site in self.homes else shown

    def server_log(self):
        """Return what the server's log says beside events."""
        path = self.server.logs / "server.jsonl"
        lines = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
        return [line["message"] for line in lines if "event" not in line]

    def preflight(self, site, **environment):
        """Return what ``fedfuse site preflight`` finds, by check."""
        done = subprocess.run(
            [FEDFUSE, "site", "preflight", str(self.homes[site].root), "--json"],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=AGES,
            check=False,
        )
        return {line["check"]: line for line in json.loads(done.stdout)["checks"]}

    # --- what must hold -------------------------------------------------------------------------------------
    def on_ledger(self, site):
        """Return the attempts that a site is charged for on the ledger."""
        return charged(whole_lines(self.server.ledger), site)

    def in_store(self, site, *, home=None):
        """Return the attempts that a site charged itself for in its own store."""
        return stored((home or self.homes[site]).store, "demo", site)

    def aborted(self):
        """Return why attempts were aborted, by the ledger."""
        return [close.reason for close in closes(whole_lines(self.server.ledger), Outcome.ABORTED)]

    def settled(self):
        """Nothing is undercounted: every charge in a store reaches the ledger, none is there that its store lacks.

        It also checks the ledger as an auditor does.
        """
        before = {site: self.in_store(site) for site in self.sites}
        self.until(lambda: all(before[site] <= self.on_ledger(site) for site in self.sites))
        for site in self.sites:
            known = self.on_ledger(site)
            assert known <= self.in_store(site), f"the ledger charges {site} for what it does not know of"
        return audited(self.server)

    def finish(self):
        """End the server and the sites; check ledger, checkpoint and stores once nothing moves any more.

        Returns:
            What an auditor says, and how many charges in the sites' stores the ledger lacks: of the last attempt
            alone, which the end cut off and whose charges come with the sites' next answers.
        """
        self.stop_server()
        for site in self.sites:
            self.stop_site(site)
        report, known = self.check()
        last = leaves_of(whole_lines(self.server.ledger), Offer)[-1].body
        missing = 0
        for site in self.sites:
            mine = self.in_store(site)
            assert known[site] <= mine, f"the ledger charges {site} for what it does not know of"
            lacks = mine - known[site]
            assert lacks <= {last.context()}, f"{site} has charges that the ledger lacks"
            missing += len(lacks)
        return report, missing


def pause(seconds):
    """Let a fault last; nothing is asserted on the time."""
    time.sleep(seconds)
