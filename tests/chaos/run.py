"""Puts random faults into a running deployment until enough rounds are opened, then checks every book.

Four sites and a server, each a process of its own over TLS. Every few seconds a fault is drawn from the seed that is
printed: a site, the server or the SuperLink is killed, a site hangs past the time an exchange may take, or a site's
wire is cut. What is drawn when is repeated by the seed; what a fault meets depends on the machine's timing.

In the end the ledger has to verify with its checkpoint, no charge in a site's store may be missing on it, and no
charge may be on it that the site's store lacks. Ctrl-C or SIGTERM ends it sooner; the books are looked at all the
same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parents[2]
sys.path.insert(0, str(HERE / "tests"))

from support.deployment import Relay, freeze, repoint  # noqa: E402 - found by the line above
from support.faults import PATIENCE, LongRun, pause  # noqa: E402
from support.small_federation import SITES  # noqa: E402

RESULTS = HERE / "bench" / "results" / "chaos.jsonl"
KINDS = {
    "site killed": 5,
    "server killed": 2,
    "SuperLink killed": 2,
    "site hangs": 1,
    "wire cut": 1,
}
"""How often each kind of fault is drawn, against the others."""
BETWEEN = (5.0, 40.0)
"""Least and longest time from one fault to the next (seconds)."""
DOWN = (0.0, 8.0)
"""How long a killed process stays down (seconds)."""
CUT = (5.0, 40.0)
"""How long a wire is cut (seconds)."""
STUCK = 600.0
"""Without a round opened for this long, the program gives up: the deployment did not survive (seconds)."""


class Chaos:
    """One run with faults.

    Args:
        root: An empty folder.
        rounds: Rounds to open.
        seed: Of the faults.
        console: Where is said what is done.
    """

    def __init__(self, root, rounds, seed, console):
        self._run = LongRun(root)
        self._rounds = rounds
        self._numbers = random.Random(seed)
        self._console = console
        self._relays = {}
        self._began = time.monotonic()
        self.faults = Counter()
        self.ended = Counter()

    def play(self):
        """Open the rounds, and return what came of it."""
        run = self._run
        try:
            for site in SITES:
                self._relays[site] = Relay(run.port)
                repoint(run.homes[site], self._relays[site].port)
            run.heal()
            run.next_round(of=0)
            self._began = last = time.monotonic()
            opened = run.rounds()
            with contextlib.suppress(KeyboardInterrupt):
                while opened < self._rounds:
                    pause(self._numbers.uniform(*BETWEEN))
                    self._count_ended()
                    self._run.heal()
                    self._fault()
                    self._run.heal()
                    if run.rounds() > opened:
                        opened, last = run.rounds(), time.monotonic()
                    if time.monotonic() - last > STUCK:
                        raise AssertionError(f"no round was opened for {STUCK:g} s\n{run.last_words()}")
            for relay in self._relays.values():
                relay.mend()  # one may have been cut just then
            seconds = time.monotonic() - self._began
            run.heal()
            run.next_round(sites=SITES)  # everybody is still able to take part
            run.settled()
            return self._summary(*run.finish(), seconds)
        finally:
            for relay in self._relays.values():
                relay.close()
            run.end()

    def _fault(self):
        kind = self._numbers.choices(list(KINDS), KINDS.values())[0]
        site = self._numbers.choice(SITES)
        down, cut, silent = (
            self._numbers.uniform(*DOWN),
            self._numbers.uniform(*CUT),
            self._numbers.random() < 0.5,
        )
        of_server = kind in {"server killed", "SuperLink killed"}
        if not (self._run.is_serving() if of_server else self._run.is_up(site)):
            return  # it ended by itself just before
        self.faults[kind] += 1
        self._console.print(
            f"{time.monotonic() - self._began:7.1f} s  round {self._run.rounds():4}  {kind}"
            + ("" if of_server else f": {site}")
        )
        match kind:
            case "site killed":
                self._run.kill(site)
                pause(down)
            case "server killed":
                self._run.kill_server()
                pause(down)
            case "SuperLink killed":
                self._run.kill_superlink()
            case "site hangs":
                freeze(self._run.running(site), PATIENCE + down)
            case "wire cut":
                self._relays[site].cut(silent=silent)
                pause(cut)
                self._relays[site].mend()

    def _count_ended(self):
        """Count what ended by itself since the last fault: a run that stopped after three aborted attempts, say."""
        self.ended["sites"] += sum(not self._run.is_up(site) for site in SITES)
        self.ended["servers"] += not self._run.is_serving()

    def _summary(self, report, missing, seconds):
        events = self._run.events()
        started = sum(event["event"] == "RoundStarted" for event in events)
        commit = subprocess.run(
            ["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        return {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit,
            "rounds": len(self._run.opened()),
            "asked": self._rounds,
            "attempts": started,
            "aborted": len(self._run.aborted()),
            "faults": dict(sorted(self.faults.items())),
            "ended_by_themselves": dict(self.ended),
            "left_out": sum(event["event"] == "SiteLeftOut" for event in events),
            "reservations": sum(site.reservations for site in report.sites),
            "ledger": "verifies" if report.ok else "does not verify",
            "not_yet_on_it": missing,
            "seconds": round(seconds, 1),
        }


def shown(summary, console):
    """Show what came of a run."""
    table = Table(title=f"{summary['rounds']} rounds, seed {summary['seed']}", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for kind, count in summary["faults"].items():
        table.add_row(kind, str(count))
    for kind, count in summary["ended_by_themselves"].items():
        table.add_row(f"{kind} that ended by themselves", str(count))
    for name in ("attempts", "aborted", "rounds", "reservations", "seconds"):
        table.add_row(name, str(summary[name]))
    table.add_row("ledger", summary["ledger"])
    table.add_row("charges of the attempt cut off last", str(summary["not_yet_on_it"]))
    console.print(table)


def main():
    """Play as the command line says; the exit code is 1 where something did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="of the faults; left out, a new one")
    asked = parser.parse_args()
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    console = Console(soft_wrap=True)
    console.print(f"make chaos ROUNDS={asked.rounds} SEED={seed}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="fedfuse-chaos-") as folder:
        summary = Chaos(Path(folder) / "demo", asked.rounds, seed, console).play()
    summary = {**summary, "seed": seed}
    shown(summary, console)
    with RESULTS.open("a") as file:
        file.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
