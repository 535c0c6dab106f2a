"""``fedfuse site run`` as a process: what it demands, what it supervises, and how it ends."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from support.deployed_site import write_site
from support.lone_site import Around
from support.machines import Machines, free_ports

from fedfuse_client.connection import Connection
from fedfuse_client.home import SiteHome
from fedfuse_client.journal import Event, Journal
from fedfuse_client.run_command import run_site
from fedfuse_client.store import SiteStore
from fedfuse_client.supervisor import SuperNode
from fedfuse_shared.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def machines(tmp_path):
    started = Machines(tmp_path)
    yield started
    started.end()
    assert not started.left()


@pytest.fixture
def home(tmp_path) -> SiteHome:
    (port,) = free_ports(1)  # nobody listens there: the SuperNode tries again and again
    written = write_site(tmp_path / "lyon", Around())
    written.connection.write_text(f'address = "127.0.0.1:{port}"\n')
    return written


def events(machines, name="site"):
    lines = (machines.root / f"{name}.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def nodes(machines):
    return [event["process"] for event in events(machines) if event["event"] == "node-started"]


def start(machines, home, name="site"):
    return machines.start(name, "fedfuse", "site", "run", str(home.root), "--insecure", "--json-logs")


def has_come_up(process):
    """Return whether the launcher has become the SuperNode, so that it is tied to its parent."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"fedfuse_client.supernode" in words and b"fedfuse_shared.tied" not in words


# --- what it demands ------------------------------------------------------------------------------------------------
def test_without_encryption_only_this_machine_is_reached(home):
    home.connection.write_text('address = "fl.example.org:8000"\n')
    with pytest.raises(ConfigError, match="another machine"):
        run_site(home.root, insecure=True, json_logs=False)


def test_with_encryption_the_kit_is_needed(home):
    with pytest.raises(ConfigError, match=r"node\.key: is missing"):
        run_site(home.root, insecure=False, json_logs=False)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("10.0.0.1:1", False),
        ("[::]:1", False),
        ("0.0.0.0:1", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
    ],
)
def test_what_this_machine_is(address, loopback):
    assert Connection(address=address).is_loopback is loopback


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":8000", "http://host:1", "a b:1", "host:1/path", "--x:1"]
)
def test_an_address_is_a_host_and_a_port(home, address):
    home.connection.write_text(f'address = "{address}"\n')
    with pytest.raises(ConfigError, match="address"):
        run_site(home.root, insecure=True, json_logs=False)


# --- as a process ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_ends_when_told_to_and_leaves_nothing_behind(machines, home):
    site = start(machines, home)
    machines.wait(lambda: nodes(machines), 60, pause=0.05)
    secret = home.root / "supernode.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_bytes()) == 32
    machines.wait(lambda: has_come_up(nodes(machines)[0]), 60, pause=0.05)
    site.send_signal(signal.SIGINT)
    assert site.wait(30) == 0
    assert [event["event"] for event in events(machines)][-2:] == ["stopping", "stopped"]
    assert not secret.exists()
    assert not machines.left()
    SiteStore.open(home.store, wait=0).close()


@pytest.mark.slow
def test_killed_it_takes_its_supernode_with_it_and_can_be_started_again(machines, home):
    site = start(machines, home)
    machines.wait(lambda: nodes(machines), 60, pause=0.05)
    (node,) = nodes(machines)
    machines.wait(lambda: has_come_up(node), 60, pause=0.05)
    first = (home.root / "supernode.secret").read_bytes()
    site.kill()
    site.wait()
    machines.wait(lambda: not machines.left(), 10, pause=0.05)
    start(machines, home, "again")
    machines.wait(
        lambda: [e for e in events(machines, "again") if e["event"] == "node-started"], 60, pause=0.05
    )
    assert (home.root / "supernode.secret").read_bytes() != first


@pytest.mark.slow
def test_a_supernode_that_dies_is_started_again(machines, home):
    start(machines, home)
    machines.wait(lambda: nodes(machines), 60, pause=0.05)
    os.kill(nodes(machines)[0], signal.SIGKILL)
    machines.wait(lambda: len(nodes(machines)) == 2, 60, pause=0.05)
    (ended,) = [event for event in events(machines) if event["event"] == "node-ended"]
    assert ended["code"] == -signal.SIGKILL
    assert "started again in 1 s" in ended["text"]


@pytest.mark.slow
def test_a_folder_is_served_once(machines, home):
    site = start(machines, home)
    machines.wait(lambda: nodes(machines), 60, pause=0.05)
    second = start(machines, home, "second")
    assert second.wait(60) == 1
    said = (machines.root / "second.log").read_text()
    assert f"is served already, by process {site.pid}; one site runs once" in said
    assert site.poll() is None


# --- pauses ---------------------------------------------------------------------------------------------------
class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_pauses_between_starts_grow_to_a_minute_and_shrink_after_a_steady_run(tmp_path):
    clock = Clock()
    journal = Journal("lyon", tmp_path / "logs", shown=io.StringIO())
    node = SuperNode(
        lambda port: [sys.executable, "-c", "pass"], os.environ, tmp_path / "logs" / "n.log", journal, clock
    )

    def pause():
        """Return how long after its end it is started again."""
        node._process.wait()
        assert node.tend() is None
        ended = clock.now
        while node.tend() is None:
            clock.now += 0.5
        return clock.now - ended

    assert node.tend() is not None
    assert [pause() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    clock.now += 61
    assert pause() == 1
    node.end()
    journal.close()


# --- the journal ----------------------------------------------------------------------------------------------
def test_lines_are_for_people_or_for_a_collector(tmp_path, capsys):
    for json_lines in (False, True):
        journal = Journal("lyon", tmp_path / "logs", json_lines=json_lines)
        journal.say(Event.ANSWERED, step="train.keys", seconds=0.12345)
        journal.close()
    plain, collected = capsys.readouterr().out.splitlines()
    assert plain.endswith("lyon answered step=train.keys seconds=0.123")
    assert json.loads(collected)["seconds"] == 0.12345
    assert len((tmp_path / "logs" / "site.jsonl").read_text().splitlines()) == 2
