"""A run that is killed at any moment goes on: model, optimiser, ledger, and budgets that are never given back."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_federation import SITES, SmallFederation, write_data

from fedfuse_server.events import RoundOpened
from fedfuse_server.home import RunHome, ServerState
from fedfuse_shared.envelope import decode
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Close, Outcome, Reservation
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def reservations(home: RunHome) -> list[bytes]:
    if not home.ledger.exists():
        return []
    return [e.raw for e in read_whole(home.ledger) if kind_of(e.raw) == Reservation.kind]


def read_whole(path: Path):
    """The ledger's whole lines; a kill may have torn the last one."""
    text = path.read_bytes()
    healed = path.with_suffix(".whole")
    healed.write_bytes(text[: text.rfind(b"\n") + 1])
    return list(read_ledger(healed))


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing after it runs but what would survive on disk."""


def test_a_run_stopped_between_model_and_close_closes_the_round_it_opened(tmp_path, monkeypatch):
    from fedfuse_server import coordinator

    federation = SmallFederation(tmp_path, {"rounds": 2})
    append = coordinator.Books.append

    def stop(self, *envelopes):
        if envelopes and envelopes[0].kind == Close.kind and envelopes[0].body.outcome is Outcome.OPENED:
            raise Killed
        append(self, *envelopes)

    with monkeypatch.context() as patch:
        patch.setattr(coordinator.Books, "append", stop)
        with pytest.raises(Killed):
            federation.run()
    assert ServerState.load(federation.home.state).round == 1
    federation.run()
    # The first process ended before it could tell of round 1; the second does.
    assert [event.round for event in federation.told(RoundOpened)] == [1, 2]
    closes = [
        decode(e.raw, Close, who="")
        for e in read_ledger(federation.home.ledger)
        if kind_of(e.raw) == Close.kind
    ]
    assert [close.body.outcome for close in closes] == [Outcome.OPENED, Outcome.OPENED]
    assert audit(federation.home).ok


def test_an_attempt_cut_short_is_closed_as_aborted_and_stays_charged(tmp_path, monkeypatch):
    from fedfuse_server import attempt

    federation = SmallFederation(tmp_path, {"rounds": 1})

    def stop(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(attempt.ServerSession, "survivors", stop)
        with pytest.raises(Killed):
            federation.run()
    federation.run()
    report = audit(federation.home)
    assert report.ok, report.findings
    assert {site.reservations for site in report.sites} == {2}
    assert {site.rounds for site in report.sites} == {1}


def simulate(*arguments: str) -> subprocess.Popen[str]:
    code = "import sys; from fedfuse_shared.cli import main; sys.argv[0] = 'fedfuse'; main()"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, "simulate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SETTINGS = """
rounds = 6

[privacy]
noise_multiplier = 4.0
expected_batch_size = 8
sampling_rate = 0.25
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_a_ledger_that_holds(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    data = write_data(tmp_path / "data")
    (tmp_path / "settings.toml").write_text(SETTINGS)
    run = tmp_path / "run"
    home = RunHome(run)
    process = simulate("--data", str(data), "--config", str(tmp_path / "settings.toml"), "--out", str(run))
    seen: list[bytes] = []
    kills = 0
    for _ in range(4):
        wait_for_lines(process, home, len(lines(home)) + chance.randrange(1, 25))
        process.kill()
        process.communicate()
        kills += 1
        now = reservations(home)
        assert now[: len(seen)] == seen, f"seed {seed}: a charge was given back"
        seen = now
        process = simulate("--resume", str(run), "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, f"seed {seed}: {err[-2000:]}"
    summary = json.loads(out)
    report = audit(home)
    assert report.ok, f"seed {seed}: {report.findings}"
    assert kills == 4
    assert summary["audit"]
    # A cut attempt is charged, so the plan may end a few rounds early; what was opened stands.
    assert summary["rounds"] == 6 or summary["stopped"]
    assert set(summary["epsilon"]) == set(SITES)
    assert reservations(home)[: len(seen)] == seen


def lines(home: RunHome) -> bytes:
    return home.ledger.read_bytes().splitlines() if home.ledger.exists() else []


def wait_for_lines(process: subprocess.Popen[str], home: RunHome, count: int) -> None:
    """Wait until the ledger has that many lines, or the run has ended."""
    while process.poll() is None and len(lines(home)) < count:
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    process = simulate("--resume", str(tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "simulation.toml" in err
    assert len(err.splitlines()) == 1


def test_a_run_killed_while_its_folders_are_written_starts_over(tmp_path, monkeypatch):
    from fedfuse_simulations import provision as provisioning
    from fedfuse_simulations.simulation import Simulation, begin, prepare

    data = write_data(tmp_path / "data")
    home = RunHome(tmp_path / "run")
    values = {"rounds": 1, "privacy": {"noise_multiplier": 4.0}}
    begin(home, Simulation(data=data, settings=values))
    save = provisioning.save_toml

    def stop(path, config):
        if path.parent.name == "oslo":
            raise Killed
        save(path, config)

    with monkeypatch.context() as patch:
        patch.setattr(provisioning, "save_toml", stop)
        with pytest.raises(Killed):
            prepare(home, Simulation.load(home), lambda _: None)
    prepared = prepare(home, Simulation.load(home), lambda _: None)
    assert sorted(prepared.sites) == list(SITES)
