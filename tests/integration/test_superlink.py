"""The same apps for real: a SuperLink and three SuperNodes, each its own process, over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.small_federation import SmallFederation, write_data

from fedfuse_server.home import ServerState
from fedfuse_shared.envelope import decode
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Close, Outcome
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
SITES = ("bern", "lyon", "oslo")

# Thin: it carries no code, so what runs at a site is what the site installed.
BUNDLE = """
[project]
name = "fedfuse-bundle"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedfuse"
fab-include = ["/README.md", "/LICENSE"]

[tool.flwr.app.components]
serverapp = "fedfuse_server.app:app"
clientapp = "fedfuse_client.app:app"

[tool.flwr.app.config]
home = ""
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Machines:
    """Flower's processes, one environment and one log each; nothing of them is left in the end."""

    def __init__(self, root):
        self.root = root
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(root / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name, *command):
        with (self.root / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment)

    def flwr(self, *command):
        done = subprocess.run(
            ["flwr", *command, "--format", "json"],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return json.loads(done.stdout[done.stdout.index("{") :])

    def wait(self, condition, seconds, pause):
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                logs = "\n".join(
                    f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.root.glob("*.log")
                )
                raise AssertionError(f"not within {seconds} s\n{logs}")
            time.sleep(pause)
        return found

    def left(self):
        """Return what still runs of all that was started, by the environment it inherited: some detach."""
        mark = f"FLWR_HOME={self.root / 'flwr'}".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
            except OSError:  # somebody else's, or gone
                continue
        return found

    def end(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.left():
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + 15
            while self.left() and time.monotonic() < end:
                time.sleep(0.1)


@pytest.fixture
def machines(tmp_path):
    started = Machines(tmp_path)
    yield started
    started.end()
    assert not started.left()


def three_sites(folder):
    """A prepared run of three sites: the fourth's rows are not in the manifest."""
    write_data(folder / "data")
    manifest = folder / "data" / "manifest.csv"
    rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(row for row in rows if ",rome," not in row))
    return SmallFederation(folder, {"rounds": 2})


def test_two_rounds_over_a_superlink_and_three_supernodes(tmp_path, machines):
    federation = three_sites(tmp_path / "federation")
    assert tuple(federation.folders) == SITES
    link, *nodes = free_ports(1 + len(SITES))
    bundle, home = tmp_path / "bundle", tmp_path / "flwr"
    for folder in (bundle, home):
        folder.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    (bundle / "pyproject.toml").write_text(BUNDLE)
    for name in ("README.md", "LICENSE"):
        (bundle / name).write_bytes((ROOT / name).read_bytes())

    machines.start(
        "superlink",
        *("flower-superlink", "--insecure", "--port", str(link), "--disable-runtime-dependency-installation"),
    )
    for (site, folder), port in zip(federation.folders.items(), nodes, strict=True):
        machines.start(
            site,
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port)),
            *("--node-config", f'home="{folder}"'),
        )
    # Flower's command takes a second of a processor each time it is asked.
    machines.wait(lambda: online(machines) == len(SITES), 60, pause=1)
    answer = machines.flwr("run", str(bundle), "here", "--run-config", f'home="{federation.home.root}"')
    assert answer["success"], answer
    run = str(answer["run-id"])
    status = machines.wait(lambda: ended(machines, run), 600, pause=5)

    assert status == "finished:completed", (tmp_path / "superlink.log").read_text()[-5000:]
    assert ServerState.load(federation.home.state).round == 2
    raws = [entry.raw for entry in read_ledger(federation.home.ledger)]
    closes = [decode(raw, Close, who="ledger").body for raw in raws if kind_of(raw) == Close.kind]
    assert [(close.outcome, tuple(sorted(close.survivors))) for close in closes] == [
        (Outcome.OPENED, SITES),
        (Outcome.OPENED, SITES),
    ]
    assert audit(federation.home).ok


def online(machines):
    answer = machines.flwr("supernode", "list", "here")
    return sum(node["status"] == "online" for node in answer.get("nodes", []))


def ended(machines, run):
    answer = machines.flwr("list", "here", "--run-id", run)
    (found,) = answer["runs"]
    return found["status"] if found["status"].startswith("finished") else None
