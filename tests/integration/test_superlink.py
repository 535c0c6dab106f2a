"""The same apps for real: a SuperLink and three SuperNodes, each its own process, over loopback."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from support.machines import Machines, free_ports
from support.small_federation import SmallFederation, write_data

from fedfuse_client.home import SiteHome
from fedfuse_server.home import ServerState
from fedfuse_shared.config.files import save_toml
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


def prepare(tmp_path, link):
    """Write the bundle and Flower's settings; return the bundle's folder."""
    bundle, home = tmp_path / "bundle", tmp_path / "flwr"
    for folder in (bundle, home):
        folder.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    (bundle / "pyproject.toml").write_text(BUNDLE)
    for name in ("README.md", "LICENSE"):
        (bundle / name).write_bytes((ROOT / name).read_bytes())
    return bundle


def start_superlink(machines, link):
    machines.start(
        "superlink",
        *("flower-superlink", "--insecure", "--port", str(link), "--disable-runtime-dependency-installation"),
    )


def play(machines, federation, bundle):
    """Run two rounds as soon as all sites are there, and check that they were opened and audit well."""
    # Flower's command takes a second of a processor each time it is asked.
    machines.wait(lambda: online(machines) == len(SITES), 60, pause=1)
    answer = machines.flwr("run", str(bundle), "here", "--run-config", f'home="{federation.home.root}"')
    assert answer["success"], answer
    run = str(answer["run-id"])
    status = machines.wait(lambda: ended(machines, run), 600, pause=5)

    assert status == "finished:completed", (machines.root / "superlink.log").read_text()[-5000:]
    assert ServerState.load(federation.home.state).round == 2
    raws = [entry.raw for entry in read_ledger(federation.home.ledger)]
    closes = [decode(raw, Close, who="ledger").body for raw in raws if kind_of(raw) == Close.kind]
    assert [(close.outcome, tuple(sorted(close.survivors))) for close in closes] == [
        (Outcome.OPENED, SITES),
        (Outcome.OPENED, SITES),
    ]
    assert audit(federation.home).ok


def test_two_rounds_over_a_superlink_and_three_supernodes(tmp_path, machines):
    federation = three_sites(tmp_path / "federation")
    assert tuple(federation.folders) == SITES
    link, *nodes = free_ports(1 + len(SITES))
    bundle = prepare(tmp_path, link)
    start_superlink(machines, link)
    for (site, folder), port in zip(federation.folders.items(), nodes, strict=True):
        machines.start(
            site,
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port)),
            *("--node-config", f'home="{folder}"'),
        )
    play(machines, federation, bundle)


def test_two_rounds_with_sites_that_answer_for_themselves(tmp_path, machines):
    """The same server and bundle; at the sites `fedfuse site run`, two kept warm and one with fresh processes."""
    federation = three_sites(tmp_path / "federation")
    (link,) = free_ports(1)
    bundle = prepare(tmp_path, link)
    subprocess.run(
        ["flwr", "build", "--app", str(bundle)], cwd=tmp_path, env=machines.environment, check=True
    )
    (built,) = tmp_path.glob("*.fab")
    listed = hashlib.sha256(built.read_bytes()).hexdigest()
    start_superlink(machines, link)
    for site, folder in federation.folders.items():
        home = SiteHome(folder)
        policy = home.load_policy().model_copy(update={"bundles": (listed,), "warm": site != "oslo"})
        save_toml(home.policy, policy)
        home.connection.write_text(f'address = "127.0.0.1:{link}"\n')
        machines.start(site, "fedfuse", "site", "run", str(folder), "--insecure", "--json-logs")
    play(machines, federation, bundle)
    for site in SITES:
        lines = (tmp_path / f"{site}.log").read_text().splitlines()
        told = [json.loads(line)["event"] for line in lines]
        assert told.count("answered") >= 2 * 5
        assert not {"refused", "failed"} & set(told)


def online(machines):
    answer = machines.flwr("supernode", "list", "here")
    return sum(node["status"] == "online" for node in answer.get("nodes", []))


def ended(machines, run):
    answer = machines.flwr("list", "here", "--run-id", run)
    (found,) = answer["runs"]
    return found["status"] if found["status"].startswith("finished") else None
