"""Ray's workers play the sites: the same model as in one process, an orderly end, and nothing left running."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import seeded_client
from support.small_federation import SmallFederation, write_data

from fedfuse_client.app import app as client_app
from fedfuse_server.app import app as server_app
from fedfuse_server.events import RoundOpened, SiteLeftOut, observing
from fedfuse_shared.errors import ConfigError
from fedfuse_simulations.engines.inline import run_inline
from fedfuse_simulations.engines.ray import check_address, run_on_ray
from fedfuse_simulations.session import audit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]

FEDFUSE = [sys.executable, "-c", "from fedfuse_shared.cli import main; main()"]
CHANGES = {
    "rounds": 2,
    "seed": 7,
    "privacy": {"epsilon": 60.0, "noise_multiplier": 1.0, "sampling_rate": 0.5, "steps_per_round": 2},
}


def play(federation, engine, app):
    with observing(federation.events.append):
        engine((server_app, app), federation.home.root, list(federation.folders.values()), threads=1)
    return federation.told(RoundOpened)


def test_engines_agree_to_the_last_bit(tmp_path, capfd):
    """Noise and draws seeded, keys not: the opened sum is exact, so the model does not depend on the engine."""
    opened = {}
    path = os.environ.get("PYTHONPATH")
    for name, engine, app in (
        ("inline", run_inline, seeded_client.app),
        ("ray", run_on_ray, seeded_client.app),
        ("real", run_inline, client_app),
    ):
        federation = SmallFederation(tmp_path / name, CHANGES)
        opened[name] = [event.published.tobytes() for event in play(federation, engine, app)]
        assert len(opened[name]) == 2
        assert not federation.told(SiteLeftOut)
        assert audit(federation.home).ok
    assert opened["inline"] == opened["ray"]
    assert opened["inline"][1] != opened["real"][1]  # it is the seeded noise that agrees, not its absence
    assert capfd.readouterr().out == ""  # standard output is the caller's, also where Ray prints
    assert os.environ.get("PYTHONPATH") == path


def test_a_broken_site_is_left_out_and_the_servers_error_arrives(tmp_path):
    federation = SmallFederation(tmp_path, CHANGES)
    for site in ("lyon", "rome"):
        (federation.folders[site] / "policy.toml").write_text("nonsense = 1\n")
    with pytest.raises(ConfigError, match="2 enrolled sites answered"):
        play(federation, run_on_ray, client_app)
    assert len(federation.told(SiteLeftOut)) == 2


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:x", ":6379"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="no address of a Ray cluster"):
        check_address(address)


def test_a_cluster_that_is_not_there_is_told_before_anything_is_written(tmp_path):
    write_data(tmp_path / "data")
    options = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--engine", "ray"]
    done = subprocess.run(
        [*FEDFUSE, "simulate", *options, "--ray-address", "127.0.0.1:1"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Ray at 127.0.0.1:1: does not answer" in done.stderr
    assert not (tmp_path / "run").exists()


# Brings loopback up in a network namespace of its own, then becomes the command.
ALONE = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lo:
    fcntl.ioctl(lo, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x8 | 0x40))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_run_without_a_network_prints_one_json_object(tmp_path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    write_data(tmp_path / "data")
    options = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--engine", "ray", "--json"]
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", ALONE, *FEDFUSE[1:], "simulate", *options, "--rounds", "2"],
        check=False,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rounds"] == 2
    assert said["audit"] is True
    assert "WARNING" not in done.stderr


def alive(session):
    """Processes of a session that still run; zombies do not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.1)


def test_an_interrupted_run_leaves_no_process_and_can_be_resumed(tmp_path):
    write_data(tmp_path / "data")
    progress = tmp_path / "run" / "progress.jsonl"
    options = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--engine", "ray"]
    process = subprocess.Popen(
        [*FEDFUSE, "simulate", *options, "--rounds", "10", "--epsilon", "8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: process.poll() is not None or progress.exists(), 90)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone in the foreground
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1, err
        assert f"Stopped. Go on with: fedfuse simulate --resume {tmp_path / 'run'}" in out + err
        assert "Traceback" not in err
        wait_for(lambda: not alive(process.pid), 30)
    finally:
        for left in alive(process.pid):
            os.kill(int(left), signal.SIGKILL)
    done = subprocess.run(
        [*FEDFUSE, "simulate", "--resume", tmp_path / "run", "--json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rounds"] == 10
    assert said["audit"] is True
    assert all(epsilon <= 8 for epsilon in said["epsilon"].values())
