"""What a site does with the tasks of Flower's SuperNode, over the SuperNode's real Runtime API."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.constant import TaskType
from support.deployed_site import MODEL, DeployedSite, offer_of, write_site
from support.lone_site import Around
from support.supernode import RunningSuperNode

from fedfuse_client.answers import Fresh
from fedfuse_client.round import Site
from fedfuse_client.tasks import Tasks
from fedfuse_shared import arrival
from fedfuse_shared.bundle import bundle, bundle_hash
from fedfuse_shared.messages import Step
from fedfuse_shared.models import model_hash, outline
from fedfuse_shared.parcel import Parcel, pack, unpack

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
LAYOUT = outline(MODEL)[0]
WEIGHTS = np.zeros(sum(segment.size for segment in LAYOUT), np.float32)
HASH = model_hash(WEIGHTS, LAYOUT)


@pytest.fixture
def node():
    with RunningSuperNode() as running:
        yield running


@pytest.fixture
def around():
    return Around()


@pytest.fixture
def site(tmp_path, node, around):
    deployed = DeployedSite(write_site(tmp_path, around), node)
    yield deployed
    deployed.close()


def settle(site):
    """A harmless question that every site answers with its leaves."""
    return site.exchange(Step.SETTLE, pack(Parcel()))


# --- what is answered ---------------------------------------------------------------------------------------------
def test_a_message_under_the_listed_bundle_is_answered(site, around, node):
    answers = list(around.greet(site.ask))
    assert [bool(answer.body or answer.leaves) for answer in answers] == [True, True]
    assert node.statuses() == ["completed", "completed"]
    assert [event["event"] for event in site.events()] == ["answered", "answered"]


def test_a_whole_round_is_answered_and_opens(site, around):
    for _ in around.greet(site.ask):
        pass
    offer = offer_of(around, LAYOUT, HASH)
    around.play(offer, site.ask, WEIGHTS.tobytes())
    assert [step for step, _ in site.seconds][2:] == list(Step)[1:6]


def test_a_site_that_is_not_kept_warm_opens_a_round_too(tmp_path, node, around):
    home = write_site(tmp_path, around, warm=False)
    home.logs.mkdir()
    site = DeployedSite(home, node, answers=lambda home: Fresh(home, home.logs / "answers.log"))
    for _ in around.greet(site.ask):
        pass
    offer = offer_of(around, LAYOUT, HASH)
    around.play(offer, site.ask, WEIGHTS.tobytes())
    home.open_store().close()  # nobody holds it between two messages
    site.close()


@pytest.mark.parametrize("stage", ["task", "message", "object"])
def test_a_message_that_never_comes_whole_does_not_hold_up_the_next(site, node, stage):
    """The server was killed while its message was fetched: Flower leaves the task behind and fetches the next."""
    node.send(node.begin(), Step.KEYS, pack(Parcel(vector=bytes(6_000_000))), held=True)
    for reached in node.stages:
        site.executor.turn()
        if reached == stage:
            break
    assert not node.replies()
    reply = site.exchange(Step.SETTLE, pack(Parcel()), run=node.begin())
    assert unpack(reply.content, who="site").problem == ""


def test_what_goes_wrong_ahead_of_a_message_does_not_end_the_site(site, monkeypatch):
    """Accounting ahead only saves time; what fails there fails again where it is needed, and is answered for."""

    def break_down(_self):
        raise RuntimeError("out of numbers")

    monkeypatch.setattr(Site, "foresee", break_down)
    for _ in range(2):
        assert unpack(settle(site).content, who="site").problem == ""
    assert [event["event"] for event in site.events()] == ["answered", "failed"] * 2


def test_settings_of_a_run_and_of_a_node_are_not_looked_at(site, node, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    run = node.begin(settings={"home": str(elsewhere), "folder": str(elsewhere), "warm": "no"})
    reply = site.exchange(Step.SETTLE, pack(Parcel()), run=run)
    assert unpack(reply.content, who="site").problem == ""
    assert not elsewhere.exists()


def test_the_context_of_a_run_is_left_as_it_was(site, node):
    before = node.state.get_run_series_context(site.run)
    settle(site)
    assert node.state.get_run_series_context(site.run) is before


@pytest.mark.parametrize("listed", [True, False])
def test_a_message_is_waited_for_until_all_of_it_is_there(site, node, listed):
    """Flower makes the task before it has the message; a reply before the last object came would be lost."""
    run = node.begin(bundle() if listed else b"other")
    node.send(run, Step.SETTLE, pack(Parcel(vector=bytes(6_000_000))), held=True)
    seen = []
    for stage in node.stages:
        assert not node.replies()
        seen.append(stage)
        site.executor.turn()
    (reply,) = node.replies()
    assert seen == ["task", "message", *["object"] * 7]
    assert reply.has_error() is not listed


# --- what is refused ----------------------------------------------------------------------------------------------
def test_another_bundle_is_refused_in_the_reply_and_in_the_log(site, node):
    run = node.begin(bundle() + b" ")
    reply = site.exchange(Step.SETTLE, pack(Parcel()), run=run)
    assert "is not one this site answers under" in reply.error.reason
    (event,) = site.events()
    assert event["event"] == "refused"
    assert event["text"] == reply.error.reason


def test_the_hash_of_a_bundle_is_computed_here_not_taken_from_the_server(site, node):
    run = node.begin()
    node.state.fab_store[bundle_hash()].content = b"something else under the listed name"
    assert site.exchange(Step.SETTLE, pack(Parcel()), run=run).has_error()


def test_a_policy_without_bundles_answers_under_none(tmp_path, node, around):
    site = DeployedSite(write_site(tmp_path, around, bundles=()), node)
    assert "lists no `bundles`" in settle(site).error.reason
    site.close()


def test_an_edited_policy_holds_from_the_next_message_on(site):
    assert not settle(site).has_error()
    policy = site.home.policy
    policy.write_text(policy.read_text().replace(bundle_hash(), "0" * 64))
    assert settle(site).has_error()
    policy.write_text("not = [toml")
    reply = settle(site)
    assert reply.error.reason == "cannot answer; the reason is in the site's own log"
    assert any("TOML" in event["text"] for event in site.events() if event["event"] == "failed")


@pytest.mark.parametrize(
    "kind", [TaskType.AGENT_APP, TaskType.SERVER_APP, TaskType.MODEL, TaskType.CONNECTOR, TaskType.SIMULATION]
)
def test_no_other_kind_of_task_is_ever_taken(site, node, kind):
    node.send(site.run, Step.SETTLE, pack(Parcel()), task=kind)
    assert not site.executor.turn()
    assert node.statuses() == ["pending"]


def test_a_type_that_is_no_step_is_refused(site):
    reply = site.exchange("train.everything", pack(Parcel()))
    assert "asks for train.everything" in reply.error.reason


def test_a_message_whose_time_is_over_changes_nothing(tmp_path, node, around):
    site = DeployedSite(write_site(tmp_path, around), node, clock=lambda: 4e9)
    reply = settle(site)
    assert "whose time was over" in reply.error.reason
    assert "clocks" in reply.error.reason
    site.close()


def chunk_named_often(times):
    """A vector's record whose array names its one chunk many times, as bytes to put in its place."""
    content = pack(Parcel(vector=bytes(2000)))
    array = content["vector"]["vector"]
    (chunk,) = array.children
    names = json.dumps(
        {"dtype": "uint8", "shape": [2000], "stype": "fedfuse.raw", "arraychunk_ids": [0] * times}
    )
    return content, {array.object_id: f"Array {chunk} {len(names)}".encode() + b"\0" + names.encode()}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"fedfuse": ConfigRecord({"context": "x"})}),
        RecordDict({"fedfuse": MetricRecord({"context": 1})}),
        RecordDict({"fedfuse": ArrayRecord({"body": Array("uint8", (1,), "numpy.ndarray", b"x")})}),
    ],
)
def test_malformed_records_are_refused(site, content):
    assert settle_with(site, content).has_error()


def settle_with(site, content, objects=None):
    return site.exchange(Step.SETTLE, content, objects=objects)


def test_bytes_that_are_no_object_are_refused(site):
    content = pack(Parcel())
    for broken in (
        b"\0",
        b"os.system 1",
        b"ConfigRecord  5\0hello",
        b"ConfigRecord " + b"9" * 99 + b" 0\0",
    ):
        reply = settle_with(site, content, {content["fedfuse"].object_id: broken})
        assert reply.error.reason.startswith("@server: sent a message")


def test_an_array_cannot_grow_over_the_limit_by_naming_a_chunk_often(site, monkeypatch):
    content, objects = chunk_named_often(3)
    assert not settle_with(site, content, objects).has_error()
    monkeypatch.setattr(arrival, "MAX_BYTES", 5000)
    content, objects = chunk_named_often(4)
    assert "arrays of more than" in settle_with(site, content, objects).error.reason


def test_a_message_of_too_many_bytes_is_refused_before_it_is_built(site, monkeypatch):
    monkeypatch.setattr(arrival, "MAX_BYTES", 5000)
    reply = settle_with(site, pack(Parcel(vector=bytes(6000))))
    assert "more than 5000 bytes" in reply.error.reason


def test_a_failure_says_nothing_of_the_site_in_the_reply(site, monkeypatch):
    def fails(*_):
        raise ValueError("row 17 of lyon: patient born 1950")

    monkeypatch.setattr(type(site.executor._answers), "answer", fails)
    reply = settle(site)
    assert reply.error.reason == "cannot answer; the reason is in the site's own log"
    assert "1950" not in site.shown.getvalue()  # nor where a service manager would ship it
    assert "1950" in (site.home.logs / "site.jsonl").read_text()
    assert (site.home.logs / "site.jsonl").stat().st_mode & 0o777 == 0o600


def test_without_the_secret_no_task_is_handed_out(site, node):
    node.send(site.run, Step.SETTLE, pack(Parcel()))
    stranger = Tasks(node.address, b"a guess")
    with pytest.raises(httpx.HTTPStatusError):
        stranger.acquire()
    stranger.close()
    assert node.statuses() == ["pending"]
    assert site.executor.turn()


# --- what happens to a SuperNode -----------------------------------------------------------------------------------
def test_a_supernode_that_is_gone_does_not_end_the_site(tmp_path, around):
    with RunningSuperNode() as node:
        site = DeployedSite(write_site(tmp_path, around), node)
        node.send(site.run, Step.SETTLE, pack(Parcel()))
        assert site.executor.turn()
        assert not site.executor.is_idle  # the reply was not sent on
    assert site.executor.turn()  # notices
    assert site.executor.is_idle
    assert not site.executor.turn()
    with RunningSuperNode() as again:
        site.executor.attend(Tasks(again.address, b"between the two of us"))
        site.node, site.run = again, again.begin()
        assert not settle(site).has_error()
    site.close()


# --- torch ---------------------------------------------------------------------------------------------------------
def threads_after_each_step(tmp_path, how):
    layout = json.dumps([segment.model_dump(mode="json") for segment in LAYOUT])
    done = subprocess.run(
        [sys.executable, "-m", "support.deployed_site", str(tmp_path), layout, HASH, how],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_torch_is_loaded_when_training_starts_and_has_one_thread(tmp_path):
    assert threads_after_each_step(tmp_path, "trains") == {
        **dict.fromkeys([Step.HELLO, Step.SETTLE, Step.KEYS, Step.SHARES], 0),
        **dict.fromkeys([Step.UPDATE, Step.AGREE, Step.UNMASK], 1),
    }


def test_nothing_but_training_loads_torch(tmp_path):
    assert set(threads_after_each_step(tmp_path, "does not").values()) == {0}
