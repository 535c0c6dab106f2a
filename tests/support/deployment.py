"""A whole federation as it is deployed: provisioned by the commands, every site and the server a process, TLS."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import tomllib
from pathlib import Path

import tomli_w
from typer.testing import CliRunner

from fedfuse_client.home import SiteHome
from fedfuse_server.home import RunHome
from fedfuse_shared.cli import app
from fedfuse_shared.envelope import decode
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Close, Outcome, Reservation
from fedfuse_simulations.session import audit
from support.machines import Machines, free_ports
from support.small_federation import SITES, write_data

FEDFUSE = str(Path(sys.executable).with_name("fedfuse"))


def call(*words: object) -> str:
    """Run a command of fedfuse in this process, and return what it printed."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


class Deployment(Machines):
    """Three sites or four and a server, over loopback with TLS and node authentication.

    Args:
        root: An empty folder.
        rounds: Rounds of the run.
        sites: Names of the sites; one that has no rows of its own trains on another's.
        patience: Seconds an exchange may take.
        cap: Privacy every site allows, for attempts beyond the planned ones; none: what the run asks for.
        changes: Further settings of the run.
    """

    def __init__(self, root, *, rounds=3, sites=SITES[:3], patience=60.0, cap=None, changes=None):
        root.mkdir(exist_ok=True)
        super().__init__(root)
        self.sites = sites
        self.server = RunHome(root / "kits" / "server")
        self.homes = {site: SiteHome(root / site) for site in sites}
        (self.port,) = free_ports(1)
        self._processes = {}
        write_data(root / "data")
        (root / "requests").mkdir()
        for site, home in self.homes.items():
            call("site", "init", home.root, "--site", site, "--federation", "demo")
            shutil.copy(home.request, root / "requests" / f"{site}.json")
        (root / "federation.toml").write_text(tomli_w.dumps(self._settings(rounds, patience, changes or {})))
        call("provision", root / "federation.toml", "--out", root / "kits")
        self.roster_hash = self.server.load_roster().body.hash()
        for number, (site, home) in enumerate(self.homes.items()):
            more = () if cap is None else ("--epsilon-cap", cap)
            if site not in SITES:
                more += ("--dataset-site", SITES[number % len(SITES)])
            kit = root / "kits" / "sites" / site
            data = root / "data"
            call(
                "site",
                "join",
                home.root,
                kit,
                "--roster-hash",
                self.roster_hash,
                "--data",
                data,
                "--yes",
                *more,
            )

    def _settings(self, rounds, patience, changes):
        run = {
            "rounds": rounds,
            "performance": {"exchange_timeout": patience},
            "model": {
                "classes": ["0", "1"],
                "encoders": {"text": {"name": "hashed-words"}, "image": {"name": "oriented-gradients"}},
            },
            **changes,
        }
        address = f"127.0.0.1:{self.port}"
        return {
            "federation": "demo",
            "address": address,
            "coordinators": {"anna": ""},
            "auditors": {"erik": ""},
            "run": run,
        }

    # --- processes ------------------------------------------------------------------------------------------
    def start_site(self, site, *, folder=None, name=None, **environment):
        """Start a site's process."""
        name = name or site
        home = folder or self.homes[site].root
        self._processes[name] = self.start(
            name, FEDFUSE, "site", "run", str(home), "--json-logs", **environment
        )
        return self._processes[name]

    def start_sites(self, *, but=()):
        """Start every site's process."""
        for site in self.sites:
            if site not in but:
                self.start_site(site)

    def start_server(self, *more, officer="coordinator/anna", program=(FEDFUSE,)):
        """Start the server's process."""
        key = self.root / "kits" / f"{officer}.key"
        command = [
            *program,
            "server",
            "run",
            str(self.server.root),
            "--as",
            str(key),
            "--port",
            str(self.port),
        ]
        name = f"server-{len([n for n in self._processes if n.startswith('server')])}"
        self._processes[name] = self.start(name, *command, "--host", "127.0.0.1", "--wait", "90", *more)
        return self._processes[name]

    def kill(self, name):
        """End a process at once (``kill -9``); its children end with it."""
        process = self._processes[name]
        process.kill()
        process.wait()

    def running(self, name):
        """Return a process that was started."""
        return self._processes[name]

    def superlink(self):
        """Return the process of the SuperLink."""
        return json.loads(self.server.standing.read_text())["superlink"]

    # --- what happened --------------------------------------------------------------------------------------
    def events(self, kind=None):
        """Return what the server's log says, oldest first."""
        path = self.server.logs / "server.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        said = [json.loads(line) for line in lines if line.endswith("}")]
        return [line for line in said if "event" in line and kind in {None, line["event"]}]

    def said(self, site):
        """Return what a site's own log says, oldest first."""
        path = self.homes[site].logs / "site.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def opened(self):
        """Return the rounds that were opened, by the ledger, with their survivors."""
        if not self.server.ledger.exists():
            return []
        leaves = [entry.raw for entry in read_ledger(self.server.ledger)]
        closes = [decode(raw, Close, who="ledger").body for raw in leaves if kind_of(raw) == Close.kind]
        return [tuple(sorted(close.survivors)) for close in closes if close.outcome is Outcome.OPENED]

    def answered(self, site, step):
        """Return how often a site answered a step."""
        return sum(line.get("step") == step for line in self.said(site) if line.get("event") == "answered")

    def wait_for_end(self, process, seconds):
        """Wait for a server to end, and return its exit code."""
        return (
            self.wait(lambda: process.poll() is not None and (process.returncode + 1000), seconds, 0.2) - 1000
        )

    def check(self):
        """The ledger holds, and every site's own store counts nothing that the ledger does not count."""
        report = audit(self.server)
        assert report.ok, report.findings
        charged = {site: set() for site in self.sites}
        for entry in read_ledger(self.server.ledger):
            if kind_of(entry.raw) == Reservation.kind:
                leaf = decode(entry.raw, Reservation, who="ledger")
                charged[leaf.author].add(leaf.body.context)
        return report, charged


class Relay:
    """A wire between sites and a server that can be cut: bytes go through, or nothing does.

    Cut, it breaks what is open and refuses what comes; or it is silent: all stays open and nothing arrives.

    Args:
        port: Of the server, on this machine.
    """

    def __init__(self, port):
        self._target = port
        self._open = []
        self._cut = threading.Event()
        self._silent = threading.Event()
        self._heard = threading.Event()
        self._heard.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, silent=False):
        """Let nothing through any more."""
        if silent:
            self._heard.clear()
            self._silent.set()
            return
        self._cut.set()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # closing alone would leave it to whoever reads from it
            each.close()
        self._open.clear()

    def mend(self):
        """Let new connections through; what was open is broken, as the far end gave it up meanwhile."""
        if self._silent.is_set():
            self.cut()
            self._silent.clear()
            self._heard.set()
        self._cut.clear()

    def close(self):
        """Take the wire away."""
        self.cut()
        self._listener.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._cut.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self._heard.wait()
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def repoint(home, port):
    """Have a site reach its server by another port of this machine."""
    values = tomllib.loads(home.connection.read_text())
    home.connection.write_text(tomli_w.dumps({**values, "address": f"127.0.0.1:{port}"}))


def freeze(process, seconds):
    """Stop a process and all its children where they are, and let them go on after a while."""
    group = [process.pid, *_children(process.pid)]
    for pid in group:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)

    def go_on():
        for pid in group:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue

    timer = threading.Timer(seconds, go_on)
    timer.daemon = True
    timer.start()
    return timer


def _children(pid):
    found = []
    with contextlib.suppress(OSError):  # it ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found
