"""Whoever may submit a run to a server ships Python with it; Flower runs it at a site, fedfuse does not."""

import json
import signal
import sqlite3

import pytest
from support.deployed_site import write_site
from support.lone_site import Around
from support.machines import Machines, free_ports

from fedfuse_client.store import SiteStore

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Its package has the name of ours, and is found first by Flower, which puts the unpacked bundle ahead of all else.
PROJECT = """
[project]
name = "fedfuse"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedfuse"

[tool.flwr.app.components]
serverapp = "hostile:app"
clientapp = "fedfuse_client.app:app"

[tool.flwr.app.config]
home = ""
replies = ""
"""
CLIENT = """
import os
from pathlib import Path

Path(os.environ["MARKS"], os.environ["AT"]).write_text("your records, please")

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("settle")
def settle(message, context):
    return Message(RecordDict(), reply_to=message)
"""
SERVER = """
import json
import time
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import ServerApp

from fedfuse_shared.parcel import Parcel, pack

app = ServerApp()


@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    messages = [Message(pack(Parcel()), node, "query.settle", ttl=60) for node in nodes]
    replies = grid.send_and_receive(messages, timeout=60)
    said = [reply.error.reason if reply.has_error() else "content" for reply in replies]
    Path(context.run_config["replies"]).write_text(json.dumps(said))
"""


@pytest.fixture
def machines(tmp_path):
    started = Machines(tmp_path)
    yield started
    started.end()
    assert not started.left()


def write_bundle(folder):
    package = folder / "fedfuse_client"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "hostile.py").write_text(SERVER)
    (package / "__init__.py").write_text("")
    (package / "app.py").write_text(CLIENT)


def rows(store):
    with sqlite3.connect(store) as database:
        return list(database.iterdump())


def events(machines):
    lines = (machines.root / "site.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_a_bundle_with_a_package_of_our_name_runs_under_flower_and_not_under_fedfuse(tmp_path, machines):
    """One run, sent to two nodes: Flower's own, and a site's."""
    home = write_site(tmp_path / "lyon", Around())
    before = rows(home.store)
    marks, bundle, replies = tmp_path / "marks", tmp_path / "bundle", tmp_path / "replies.json"
    marks.mkdir()
    write_bundle(bundle)
    link, port = free_ports(2)
    home.connection.write_text(f'address = "127.0.0.1:{link}"\n')
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    machines.start(
        "superlink",
        *("flower-superlink", "--insecure", "--port", str(link), "--disable-runtime-dependency-installation"),
    )
    machines.start(
        "flower",
        *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port)),
        MARKS=str(marks),
        AT="flower",
    )
    site = machines.start(
        "site",
        *("fedfuse", "site", "run", str(home.root), "--insecure", "--json-logs"),
        MARKS=str(marks),
        AT="fedfuse",
    )
    machines.wait(lambda: answers(link), 60, pause=0.2)
    settings = f'home="{tmp_path / "elsewhere"}" replies="{replies}"'
    answer = machines.flwr("run", str(bundle), "here", "--run-config", settings)
    assert answer["success"], answer
    machines.wait(lambda: replies.exists() and replies.read_text(), 90, pause=0.2)

    assert [mark.name for mark in marks.iterdir()] == ["flower"], "the attack is real; and only there"
    said = sorted(json.loads(replies.read_text()), key=len)
    assert said[0] == "content"
    assert "is not one this site answers under; nothing was run" in said[1]
    assert said[1] in [event.get("text") for event in events(machines) if event["event"] == "refused"]
    site.send_signal(signal.SIGTERM)
    assert site.wait(30) == 0
    assert events(machines)[-1]["event"] == "stopped"
    assert rows(home.store) == before
    SiteStore.open(home.store, wait=0).close()
    assert not (tmp_path / "elsewhere").exists()
    # Nowhere below the site's folder does anything of the bundle lie, not even unpacked.
    assert not [path for path in home.root.rglob("*") if path.suffix == ".py"]


def answers(port):
    """Return whether somebody listens."""
    import socket

    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0
