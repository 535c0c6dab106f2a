"""`fedfuse site status` looks at a site, also at work, and takes nothing from it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import pytest
from support.federation import Federation
from support.joined_site import write_site
from support.lone_site import NAME, PEERS
from support.tls_server import Authority
from typer.testing import CliRunner

from fedfuse_client.home import SiteHome
from fedfuse_client.learner import Learner
from fedfuse_client.leaving import leave
from fedfuse_client.run_lock import only_one
from fedfuse_client.site_command import app
from fedfuse_client.status import SHOWN, Stage, status
from fedfuse_client.store import SiteStore
from fedfuse_shared.errors import ConfigError, StateError
from fedfuse_shared.ledger.records import Receipt, Refusal


@pytest.fixture
def federation() -> Federation:
    return Federation((NAME, *PEERS))


@pytest.fixture
def home(tmp_path, federation) -> SiteHome:
    return write_site(tmp_path / "site", federation, Authority().pem, epsilon_cap=4.0)


def work(home: SiteHome, federation: Federation, store: SiteStore, rounds: int = 1) -> None:
    """Write what a site at work writes: rounds that were sent, one reserved, one refused."""
    policy, key = home.load_policy(), federation.keys[NAME]
    chain, dataset = store.chain("lab", NAME), Learner(policy).dataset(store)
    for number in range(1, rounds + 1):
        offer = federation.offer(round=number)
        chain.reserve(policy, offer, dataset, key)
        chain.append(
            lambda seq, prev, offer=offer: Receipt(
                seq=seq, prev=prev, context=offer.context(), steps=1, vector_hash="a" * 64
            ),
            key,
        )
    chain.reserve(policy, federation.offer(round=rounds + 1), dataset, key)
    context = federation.offer(round=rounds + 2).context()
    chain.append(
        lambda seq, prev: Refusal(seq=seq, prev=prev, context=context, reason="too [red]much[/red]"), key
    )


def test_a_site_that_has_done_nothing_yet(home):
    found = status(home)
    assert (found.site, found.federation, found.process, found.left) == (NAME, "lab", None, None)
    assert (found.leaves, found.attempts, found.budgets) == (0, (), ())
    assert found.authority_expires is not None


def test_a_site_at_work_is_seen_as_it_is(home, federation):
    with only_one(home), home.open_store() as store:
        work(home, federation, store, rounds=2)
        found = status(home)
        assert found.process is not None
        assert [attempt.stage for attempt in found.attempts] == [
            Stage.SENT,
            Stage.SENT,
            Stage.RESERVED,
            Stage.REFUSED,
        ]
        assert found.attempts[-1].reason == "too [red]much[/red]"
        assert found.leaves == 6
        assert found.budgets[0].shares[0].rounds == 3
        assert 0 < found.budgets[0].epsilon < found.budgets[0].cap
    assert status(home).process is None


def test_only_the_last_attempts_are_told(home, federation):
    with home.open_store() as store:
        work(home, federation, store, rounds=SHOWN + 3)
    found = status(home)
    assert len(found.attempts) == SHOWN
    assert found.attempts[-1].leaf == found.leaves


def test_a_look_writes_nothing_and_keeps_nobody_out(home, federation):
    with SiteStore.view(home.store) as view:
        with SiteStore.open(home.store, wait=0) as store:  # whoever looks holds nothing
            work(home, federation, store)
            assert view.chain("lab", NAME).head() == store.chain("lab", NAME).head()
            store.erase("b" * 64)  # what is deleted leaves the log, though somebody looks
            assert home.store.with_name("store.db-wal").read_bytes() == b""
            with pytest.raises(StateError):
                SiteStore.open(home.store, wait=0)  # and nothing is let in that was kept out before
        for attempt in (view.stored_contexts, lambda: view.chain("lab", NAME).leaves_after(0)):
            attempt()
        before = home.store.read_bytes()
        with pytest.raises((StateError, sqlite3.Error)):
            view.erase("c" * 64)
        with pytest.raises((StateError, sqlite3.Error)):
            view.save_step("d" * 64, "keys", b"state", b"reply")
    assert home.store.read_bytes() == before


def test_a_backup_is_made_beside_a_site_at_work_without_its_secrets(home, federation, tmp_path):
    target = tmp_path / "backup.db"
    with only_one(home), home.open_store() as store:
        work(home, federation, store)
        store.save_step("f" * 64, "keys", b"secret of a round", b"reply")
        assert CliRunner().invoke(app, ["backup", str(home.root), str(target)]).exit_code == 0
        assert CliRunner().invoke(app, ["budget", str(home.root)]).exit_code == 0
        leaves = store.chain("lab", NAME).leaves_after(0)
    assert b"secret of a round" not in target.read_bytes()
    assert target.stat().st_mode & 0o077 == 0
    with SiteStore.open(target) as copy:
        assert copy.chain("lab", NAME).leaves_after(0) == leaves
        assert copy.is_finished("f" * 64)


def test_what_a_killed_site_left_in_its_log_is_seen_and_kept(home, federation):
    program = (
        "import os, signal, sys; from pathlib import Path; from fedfuse_client.home import SiteHome\n"
        "store = SiteHome(Path(sys.argv[1])).open_store()\n"
        "store.save_step('e' * 64, 'keys', b'secret of a round', b'reply')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, home.root], check=False)
    assert done.returncode == -9
    log = home.store.with_name("store.db-wal")
    assert log.stat().st_size > 0
    assert status(home).in_progress
    assert log.stat().st_size > 0  # whoever looks does not write it back
    with home.open_store() as store:
        assert store.stored_contexts() == ["e" * 64]
        store.erase("e" * 64)
    assert not status(home).in_progress
    everything = b"".join(path.read_bytes() for path in home.root.iterdir() if path.is_file())
    assert b"secret of a round" not in everything


def test_the_files_it_leaves_are_the_owners_alone(home):
    status(home)
    assert {path.stat().st_mode & 0o077 for path in home.root.iterdir()} == {0}


def test_a_site_that_left_says_why(home):
    leave(home, "the study has ended")
    assert status(home).left == "the study has ended"
    assert "left: the study has ended" in CliRunner().invoke(app, ["status", str(home.root)]).stdout


def test_the_command_fits_a_terminal_and_shows_a_reason_as_it_was_given(home, federation, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with home.open_store() as store:
        work(home, federation, store)
        result = CliRunner().invoke(app, ["status", str(home.root)])
    assert result.exit_code == 0
    assert "too [red]much[/red]" in result.stdout
    assert "charged, its update was sent" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_command_as_json(home, federation):
    with home.open_store() as store:
        work(home, federation, store)
    result = CliRunner().invoke(app, ["status", str(home.root), "--json"])
    answer = json.loads(result.stdout)
    assert answer["attempts"][0]["stage"] == "receipt"
    assert answer["process"] is None


def test_no_site_there(tmp_path, home):
    with pytest.raises(ConfigError, match=r"policy.toml: cannot be read"):
        status(SiteHome(tmp_path))
    home.store.unlink()
    with pytest.raises(StateError, match="does not exist"):
        status(home)
