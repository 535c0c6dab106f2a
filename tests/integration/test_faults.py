"""The faults a deployment has to survive, put into real processes: after each, rounds go on and nothing is forgotten.

One federation of four sites plays rounds all the time; a round can do without one of them. Every test puts in one
fault, says who has to notice it and how, waits until everybody takes part again, and looks at the books: the ledger
verifies, and no charge in a site's own store is missing on it.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.deployment import FEDFUSE, Relay, freeze, repoint
from support.faults import AGES, PATIENCE, STEPS, LongRun, pause
from support.small_federation import SITES

from fedfuse_client.home import SiteHome
from fedfuse_client.run_lock import holder
from fedfuse_shared.messages import Step

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

VICTIM = "oslo"
OTHERS = tuple(site for site in SITES if site != VICTIM)
MINUTE = 60


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    started = LongRun(tmp_path_factory.mktemp("faults") / "demo")
    yield started
    try:
        if started.is_serving():
            report, _ = started.finish()
            assert report.ok
    finally:
        started.end()
    assert not started.left()


@pytest.fixture
def run(running):
    """Everybody is there and took part in the last round."""
    running.heal()
    opened = running.events("RoundOpened")
    if not opened or set(opened[-1]["survivors"]) != set(SITES):
        running.next_round(sites=SITES)
    return running


def everybody_is_back(run):
    """A round is opened with all four, and the books are in order."""
    run.next_round(sites=SITES)
    run.settled()


# --- processes that are killed --------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.value.rpartition(".")[2])
def test_a_site_is_killed_in_an_exchange(run, step):
    run.in_step(step)
    seen, before = len(run.events()), run.rounds()
    run.kill(VICTIM)
    run.start_site(VICTIM)

    assert set(OTHERS) <= set(run.next_round(of=before))
    for said, reason in run.left_out(VICTIM, seen):  # nobody is left out if its answer had left it
        assert said == step.value or STEPS.index(step) < STEPS.index(Step(said)), (said, reason)
        assert "not answer" in reason, reason
    everybody_is_back(run)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.value.rpartition(".")[2])
def test_the_server_is_killed_in_an_exchange_and_goes_on(run, step):
    run.in_step(step)
    before = run.aborted()
    run.kill_server()
    run.serve()

    everybody_is_back(run)
    # In the last exchange the round may have been opened just before.
    cut_off = run.aborted()[len(before) :]
    assert all(reason == "the server was stopped during this attempt" for reason in cut_off)
    assert len(cut_off) == 1 or step is Step.UNMASK


def test_the_superlink_is_killed(run):
    run.in_step(Step.UPDATE)
    seen = len(run.aborted())
    pid = run.kill_superlink()

    everybody_is_back(run)
    assert run.superlink() != pid
    assert all("SuperLink was lost" in reason for reason in run.aborted()[seen:])
    assert any("the SuperLink ended with code -9 and is started again" in line for line in run.server_log())


# --- a site or the wire stands still --------------------------------------------------------------------------------
def test_a_site_hangs_past_the_time_to_live_of_its_message(run):
    run.in_step(Step.UPDATE)
    seen, before = len(run.events()), run.rounds()
    freeze(run.running(VICTIM), PATIENCE + 10)

    assert set(OTHERS) <= set(run.next_round(of=before))
    everybody_is_back(run)
    assert "did not answer in time" in {reason for _, reason in run.left_out(VICTIM, seen)}


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_the_network_is_cut_for_a_minute(run, silent):
    """Connections are broken and refused, as by a firewall; or nothing arrives any more, as by a pulled plug."""
    relay = Relay(run.port)
    home = run.homes[VICTIM]
    run.stop_site(VICTIM)
    repoint(home, relay.port)
    run.start_site(VICTIM)
    try:
        run.next_round(sites=SITES)
        run.in_step(Step.UPDATE)
        seen, before = len(run.events()), run.rounds()
        relay.cut(silent=silent)
        pause(MINUTE)
        relay.mend()

        assert set(OTHERS) <= set(run.next_round(of=before))
        everybody_is_back(run)
        assert run.left_out(VICTIM, seen)
        assert run.is_up(VICTIM)
    finally:
        run.stop_site(VICTIM)
        repoint(home, run.port)
        run.start_site(VICTIM)
        relay.close()


# --- the site's machine ---------------------------------------------------------------------------------------------
def test_the_disk_of_a_site_is_full(run):
    """The site's folder lies on a small disk of its own, which somebody else fills."""
    run.stop_site(VICTIM)
    home = run.homes[VICTIM]
    aside = home.root.with_name("aside")
    home.root.rename(aside)
    home.root.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "tmpfs", str(home.root)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        home.root.rmdir()
        aside.rename(home.root)
        pytest.skip("needs a small file system of its own, which only root can mount")
    try:
        shutil.copytree(aside, home.root, dirs_exist_ok=True)
        run.start_site(VICTIM)
        run.next_round(sites=SITES)

        before = run.rounds()
        ballast = home.root / "ballast"
        said = len(run.log_of(VICTIM))
        fill(ballast)
        assert set(OTHERS) <= set(run.next_round(of=before))
        run.until(lambda: "disk is full" in "".join(run.log_of(VICTIM)[said:]))
        preflight = run.preflight(VICTIM)
        assert preflight["disk"]["state"] == "fail"

        ballast.unlink()
        run.heal()
        everybody_is_back(run)
    finally:
        run.stop_site(VICTIM)
        shutil.copytree(home.root, aside, dirs_exist_ok=True)
        subprocess.run(["umount", str(home.root)], check=True)
        home.root.rmdir()
        aside.rename(home.root)
        run.start_site(VICTIM)


def fill(path):
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 2**9, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


FAKETIME = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "faketime" / "libfaketimeMT.so.1"


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs libfaketime: as root, apt-get install faketime")
@pytest.mark.parametrize("offset", ["+1h", "-1h"], ids=["ahead", "behind"])
def test_the_clock_of_a_site_is_off_by_an_hour(run, offset):
    wrong = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": offset, "DONT_FAKE_MONOTONIC": "1"}
    run.stop_site(VICTIM)
    before, said = run.rounds(), len(run.said(VICTIM))
    run.start_site(VICTIM, **wrong)
    try:
        assert set(OTHERS) <= set(run.next_round(of=before))
        run.until(lambda: any("clock" in line.get("text", "") for line in run.said(VICTIM)[said:]))
        found = run.preflight(VICTIM, **wrong)
        named = [found[name] for name in ("tls", "clock") if found[name]["state"] == "fail"]
        assert any("clock" in f"{one['check']} {one['advice']}" for one in named), found
    finally:
        run.stop_site(VICTIM)
        run.start_site(VICTIM)
    everybody_is_back(run)


def test_a_corrupted_store(run):
    """The site does not start on it and says why; the others go on. Here the disk can be mended."""
    run.stop_site(VICTIM)
    store = run.homes[VICTIM].store
    whole = store.read_bytes()
    before = run.rounds()
    damaged = bytearray(whole)
    for page in range(4096, len(damaged), 4096):
        damaged[page + 100 : page + 1100] = os.urandom(1000)
    store.write_bytes(damaged)
    try:
        process = run.start_site(VICTIM)
        assert run.until(lambda: process.poll() is not None)
        assert process.returncode == 1
        shown = (run.root / f"{VICTIM}.log").read_text()
        assert "damaged" in shown
        assert "do not start afresh without telling the operator" in " ".join(shown.split())
        assert set(OTHERS) <= set(run.next_round(of=before))
    finally:
        store.write_bytes(whole)
        run.start_site(VICTIM)
    everybody_is_back(run)


# --- two sites of one kit -------------------------------------------------------------------------------------------
def test_a_site_is_started_twice_in_one_folder(run):
    first = holder(run.homes[VICTIM])
    done = subprocess.run(
        [FEDFUSE, "site", "run", str(run.homes[VICTIM].root)],
        env=run.environment,
        capture_output=True,
        text=True,
        timeout=AGES,
        check=False,
    )
    assert done.returncode == 1
    assert f"is served already, by process {first}" in " ".join((done.stdout + done.stderr).split())
    assert run.is_up(VICTIM)
    everybody_is_back(run)


def test_a_copy_of_a_sites_folder_is_started_as_well(run):
    """The server lets one of the two in; the other lacks what that one did meanwhile and refuses when it comes in."""
    copy = SiteHome(run.root / "copy")
    run.stop_site(VICTIM)
    shutil.copytree(run.homes[VICTIM].root, copy.root)
    run.start_site(VICTIM)
    run.next_round(sites=SITES)
    run.start_site(VICTIM, name="copy", folder=copy.root)
    run.until(lambda: any("a second copy of this site runs" in line for line in run.log_of("copy")))

    run.stop_site(VICTIM)
    run.until(lambda: any("or a second copy of the site is running" in line for line in run.log_of("copy")))
    run.stop_site("copy")
    assert run.in_store(VICTIM, home=copy) < run.on_ledger(VICTIM)  # it stood still
    run.start_site(VICTIM)
    everybody_is_back(run)
