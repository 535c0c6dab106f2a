"""What a stranger with the authority's certificate can do at a SuperLink: everything at a stock one, nothing here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, StartRunRequest
from support.served import free_port, three_sites, with_certificates, with_officers

from fedfuse_server.link import LinkGrid, LinkLost
from fedfuse_server.supervisor import Listening, SuperLink
from fedfuse_shared.bundle import bundle
from fedfuse_shared.parcel import Parcel, pack

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

APP = """
[project]
name = "hostile"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "stranger"

[tool.flwr.app.components]
serverapp = "hostile:server"
clientapp = "hostile:client"
"""
CODE = """
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()
"""


class Stranger:
    """Has Flower's own command, the address and the authority's certificate."""

    def __init__(self, folder, port, authority):
        self.home, self.app = folder / "flwr", folder / "app"
        for each in (self.home, self.app):
            each.mkdir(parents=True)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "there"\n\n[superlink.there]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{authority}"\n'
        )
        (self.app / "pyproject.toml").write_text(APP)
        (self.app / "hostile.py").write_text(CODE)
        (folder / "stranger.pub").write_bytes(
            ec.generate_private_key(ec.SECP384R1())
            .public_key()
            .public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        )
        self.key = folder / "stranger.pub"

    def tries(self):
        """Start all four commands at once, and return whether each succeeded."""
        commands = {
            "run": ["run", str(self.app), "there"],
            "register": ["supernode", "register", str(self.key), "there"],
            "nodes": ["supernode", "list", "there"],
            "runs": ["list", "there"],
        }
        environment = {
            **os.environ,
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        started = {
            name: subprocess.Popen(
                [sys.executable, "-c", "from flwr.cli.app import app; app()", *command, "--format", "json"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name, command in commands.items()
        }
        said = {name: process.communicate(timeout=60)[0] for name, process in started.items()}
        return {name: json.loads(text[text.index("{") :]) for name, text in said.items()}


@pytest.fixture
def prepared(tmp_path):
    federation = three_sites(tmp_path / "federation")
    with_officers(federation)
    with_certificates(federation.home)
    return federation


@pytest.fixture
def ours(prepared):
    superlink = SuperLink(prepared.home, Listening("127.0.0.1", free_port(), insecure=False))
    grid = LinkGrid(superlink, prepared.home.load_roster().body)
    yield superlink, grid
    grid.finish(completed=True)
    superlink.stop()
    assert not superlink.alive


def keys_registered(grid):
    with grid._control() as control:
        return {bytes(node.public_key) for node in control.ListNodes(ListNodesRequest()).nodes_info}


def test_a_stranger_is_refused_everything(ours, prepared, tmp_path):
    superlink, grid = ours
    assert grid.get_node_ids() == []
    before = keys_registered(grid)
    assert before == set(grid._keys)
    answers = Stranger(tmp_path, superlink.listening.port, prepared.home.authority).tries()
    assert {name: answer["success"] for name, answer in answers.items()} == dict.fromkeys(answers, False)
    assert all("uthentication" in str(answer) for answer in answers.values()), answers
    assert keys_registered(grid) == before
    with grid._control() as control:
        assert len(control.ListRuns(ListRunsRequest()).run_dict) == 1

    # Nor is anything else open: documentation, logging in, tasks; a wrong token is no better than none.
    trust = superlink.trust
    with httpx.Client(verify=trust, base_url=superlink.base_url) as client:
        for path in (
            "/docs",
            "/openapi.json",
            "/v1/control/list-nodes",
            "/v1/control/get-login-details",
            "/v1/control/refresh-auth-tokens",
            "/v1/runtime/acquire-task",
            "/v1/runtime/pull-task-input",
            "/v1/runtime/responses",
            "/V1/fleet/../control/list-nodes",
            "//v1/control/list-nodes",
        ):
            for headers in ({}, {"authorization": "Bearer " + "0" * 64}, {"authorization": superlink.token}):
                assert client.post(path, headers=headers).status_code in {401, 404}, path
        # The Fleet API is there, and wants a registered key.
        assert client.post("/v1/fleet/pull-messages").status_code in {400, 401, 415, 422}
        assert client.get("/health").is_success


def test_the_same_stranger_is_let_do_everything_at_a_stock_superlink(prepared, tmp_path):
    home, port = prepared.home, free_port()
    stock = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from flwr.superlink.cli.flower_superlink import flower_superlink as run; run()",
            *("--ssl-ca-certfile", home.authority, "--ssl-certfile", home.certificate),
            *("--ssl-keyfile", home.certificate_key, "--enable-supernode-auth", "--isolation", "process"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(verify=str(home.authority)) as client:
            wait_until(lambda: answers(client, f"https://127.0.0.1:{port}/health"))
        tried = Stranger(tmp_path, port, home.authority).tries()
        assert {name: answer["success"] for name, answer in tried.items()} == dict.fromkeys(tried, True)
    finally:
        stock.terminate()
        stock.wait(timeout=20)


def test_nobody_elses_run_is_executed(ours):
    _, grid = ours
    grid.get_node_ids()
    with grid._control() as control:  # as one who has stolen the token
        request = StartRunRequest()
        request.fab.content = bundle()
        other = control.StartRun(request).run_id
    assert other
    grid.get_node_ids()
    with grid._control() as control:
        found = control.ListRuns(ListRunsRequest(run_id=other)).run_dict[other].status
        mine = control.ListRuns(ListRunsRequest(run_id=grid.run.run_id)).run_dict[grid.run.run_id].status
    assert (found.status, found.sub_status) == ("finished", "failed")
    assert mine.status == "running"


def test_a_superlink_that_is_killed_comes_back_with_the_same_nodes(ours):
    superlink, grid = ours
    grid.get_node_ids()
    with grid._control() as control:
        before = {bytes(n.public_key): n.node_id for n in control.ListNodes(ListNodesRequest()).nodes_info}
    run, token = grid.run.run_id, superlink.token
    os.kill(superlink.pid, signal.SIGKILL)
    wait_until(lambda: not superlink.alive)
    with pytest.raises(LinkLost):
        grid.send_and_receive(
            [grid.create_message(pack(Parcel()), "query.hello", 1, "hello", ttl=5)], timeout=5
        )
    assert grid.get_node_ids() == []
    assert grid.run.run_id != run
    assert superlink.token != token
    with grid._control() as control:
        after = {bytes(n.public_key): n.node_id for n in control.ListNodes(ListNodesRequest()).nodes_info}
    assert after == before


def test_an_excluded_sites_node_is_registered_no_more(ours):
    _, grid = ours
    grid.get_node_ids()
    grid.exclude({"oslo"})
    with grid._control() as control:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
    there = {grid._keys[bytes(node.public_key)] for node in nodes if node.status != "unregistered"}
    assert there == {"bern", "lyon"}


PARENT = """
import sys
from pathlib import Path
from fedfuse_server.home import RunHome
from fedfuse_server.supervisor import Listening, SuperLink
superlink = SuperLink(RunHome(Path(sys.argv[1])), Listening("127.0.0.1", int(sys.argv[2]), False))
superlink.ensure()
print(superlink.pid, flush=True)
sys.stdin.read()
"""


def test_the_superlink_dies_with_a_coordinator_that_is_killed(prepared):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(prepared.home.root), str(free_port())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    wait_until(lambda: not running(child))


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def answers(client, url):
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)
