"""A site that left takes part in nothing, and still hands its last leaf over."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.data_folder import rows, write_folder
from support.federation import Federation
from support.lone_site import NAME, PEERS, Around, write_home
from typer.testing import CliRunner

from fedfuse_client.home import SiteHome
from fedfuse_client.learner import Learner
from fedfuse_client.leaving import leave
from fedfuse_client.round import Site
from fedfuse_client.run_lock import holder, only_one
from fedfuse_client.site_command import app
from fedfuse_client.store import SiteStore
from fedfuse_shared.envelope import decode, verify
from fedfuse_shared.errors import ConfigError, PolicyError, StateError
from fedfuse_shared.ledger.log import kind_of
from fedfuse_shared.ledger.records import Leave, link_of
from fedfuse_shared.messages import Step


@pytest.fixture
def federation():
    return Federation((NAME, *PEERS))


@pytest.fixture
def home(tmp_path, federation):
    records = [{**row, "label": "b" if row["label"] == "dog" else "a"} for row in rows(12)]
    data = write_folder(tmp_path / "data", records)
    info = data / "dataset.toml"
    info.write_text(info.read_text().replace('["cat", "dog"]', '["a", "b"]'))
    return write_home(tmp_path / "site", federation, data)


def greeted(site: Site, around: Around) -> Around:
    for _ in around.greet(site.answer):
        pass
    return around


def test_it_says_so_on_its_chain_and_refuses_every_offer(home: SiteHome, federation: Federation):
    site, around = Site(home), Around(federation)
    greeted(site, around)
    offer = federation.offer()
    assert not site.answer(Step.KEYS, around.parcel(offer, around.signed(offer))).problem
    site.close()

    leaf = leave(home, "the study has ended")
    verify(leaf, federation.keys[NAME].public_key().public_bytes_raw())
    with SiteStore.open(home.store) as store:
        assert not store.stored_contexts()  # the attempt it was in is over, its secrets are gone
        before = store.chain("lab", NAME).leaves_after(0)
    assert decode(before[-1], Leave, who="site").body.reason == "the study has ended"
    assert leaf.body.prev == link_of(before[-2])

    site = Site(home)
    for step, said in ((Step.SHARES, offer), (Step.UPDATE, offer), (Step.KEYS, federation.offer(attempt=2))):
        answer = site.answer(step, around.parcel(said, around.signed(said)))
        assert "left federation lab for good" in answer.problem
        assert answer.leaves[-1] == before[-1]
        assert not answer.body
        assert not answer.vector
    site.close()
    with SiteStore.open(home.store) as store:
        chain = store.chain("lab", NAME)
        assert chain.leaves_after(0) == before  # no refusal, no reservation: nothing follows the last word
        policy = home.load_policy()
        with pytest.raises(PolicyError, match="left federation lab"):
            chain.reserve(policy, offer, "0" * 64, federation.keys[NAME])


def test_it_still_greets_and_settles_even_under_an_edited_policy(home: SiteHome, federation: Federation):
    leave(home, "moving")
    home.policy.write_text(home.policy.read_text().replace("epsilon_cap = 100.0", "epsilon_cap = 90.0"))
    site, around = Site(home), Around(federation)
    greeted(site, around)
    site.close()
    assert [kind_of(leaf) for leaf in around.leaves] == [Leave.kind]


def test_a_store_from_before_it_left_is_not_used(home: SiteHome, federation: Federation, tmp_path):
    with home.open_store() as store:
        store.backup(tmp_path / "old.db")
    leave(home, "moving")
    site, around = Site(home), Around(federation)
    greeted(site, around)
    site.close()
    (tmp_path / "old.db").replace(home.store)
    site = Site(home)
    offer = federation.offer()
    assert site.answer(Step.KEYS, around.parcel(offer, around.signed(offer))).problem
    site.close()
    with SiteStore.open(home.store) as store:
        assert "reservation" not in [kind_of(leaf) for leaf in store.chain("lab", NAME).leaves_after(0)]
        public = federation.keys[NAME].public_key().public_bytes_raw()
        with pytest.raises(StateError, match="was rolled back"):
            store.chain("lab", NAME).check_head(around.leaves[-1], public)


def test_what_was_spent_comes_along_to_another_federation(home: SiteHome, federation: Federation, tmp_path):
    def reserved(home: SiteHome, federation: Federation):
        policy = home.load_policy()
        with home.open_store() as store:
            dataset = Learner(policy).dataset(store)
            offer = federation.offer(federation=policy.federation)
            leaf = store.chain(policy.federation, NAME).reserve(policy, offer, dataset, federation.keys[NAME])
            return leaf.body, store.reservations(dataset)

    before, _ = reserved(home, federation)
    leave(home, "changing keys")
    second = Federation((NAME, *PEERS), seed="second")
    second.roster = second.roster.model_copy(update={"federation": "lab2"})
    moved = write_home(tmp_path / "new", second, home.load_policy().data)
    home.store.replace(moved.store)
    Site(moved).close()
    after, spent = reserved(moved, second)
    assert after.elsewhere == (before.charge,)
    assert len(spent) == 2


def test_it_leaves_once(home: SiteHome):
    leave(home, "moving")
    with pytest.raises(PolicyError, match=r"left federation lab for good .leaf 1 .*enrol it anew"):
        leave(home, "moving on")
    with SiteStore.open(home.store) as store:
        assert len(store.chain("lab", NAME).leaves_after(0)) == 1


@pytest.mark.parametrize("reason", ["", "  ", "x" * 401, "two\nlines", "\x1b[2J"])
def test_the_reason_is_one_printable_line(home: SiteHome, reason: str):
    with pytest.raises(ConfigError, match="one line of 1 to 400"):
        leave(home, reason)


def test_a_site_at_work_is_stopped_first(home: SiteHome):
    hold = (
        "import sys; from pathlib import Path; from fedfuse_client.home import SiteHome;"
        "from fedfuse_client.run_lock import only_one\n"
        "with only_one(SiteHome(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, home.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        assert holder(home) == str(other.pid)
        with pytest.raises(StateError, match=f"served already, by process {other.pid}; one .*stop that"):
            leave(home, "moving")
        other.kill()
    assert holder(home) is None
    with SiteStore.open(home.store), pytest.raises(StateError, match="stop the other process"):
        leave(home, "moving")
    leave(home, "moving")


def test_a_look_at_the_lock_does_not_keep_a_site_from_starting(home: SiteHome):
    with only_one(home):
        assert holder(home) is not None
    for _ in range(50):
        assert holder(home) is None
        with only_one(home):
            pass


def test_the_command_asks_first(home: SiteHome):
    def command(*more, given="n\n"):
        return CliRunner().invoke(
            app, ["leave", str(home.root), "--reason", "the study has ended", *more], input=given
        )

    refused = command()
    assert refused.exit_code == 1
    assert "Nothing was changed." in refused.stdout
    assert command("--yes", given="").exit_code == 0
    again = command("--yes")
    assert isinstance(again.exception, PolicyError)
