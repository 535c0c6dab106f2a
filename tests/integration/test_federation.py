"""A whole federation over the inline grid, all of it real, and what can go wrong in one."""

import shutil
from typing import ClassVar

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from flwr.app import Array, ArrayRecord
from support.small_federation import SITES, SmallFederation

from fedfuse_client.app import app as client_app
from fedfuse_client.round import close_sites, site_in
from fedfuse_server.events import RoundAbandoned, RoundOpened, RunStopped, SiteLeftOut
from fedfuse_server.home import ServerState
from fedfuse_shared.envelope import decode
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import LEAF_TYPES, Charge, Close, Outcome, Receipt, Refusal, Reservation
from fedfuse_shared.messages import Step
from fedfuse_shared.offer import Offer
from fedfuse_shared.parcel import unpack
from fedfuse_shared.privacy.accountant import epsilon
from fedfuse_simulations.engines.inline import InlineGrid

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def leaves(federation, body_type):
    raws = [entry.raw for entry in read_ledger(federation.home.ledger)]
    return [decode(raw, body_type, who="ledger") for raw in raws if kind_of(raw) == body_type.kind]


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    federation = SmallFederation(
        tmp_path_factory.mktemp("honest"),
        {
            "rounds": 6,
            "privacy": {
                "noise_multiplier": 1.2,
                "epsilon": 60.0,
                "sampling_rate": 0.5,
                "steps_per_round": 4,
                "expected_batch_size": 16,
            },
        },
    )
    federation.run()
    return federation


def test_every_round_is_opened_with_everyone(honest):
    opened = honest.told(RoundOpened)
    assert [event.round for event in opened] == [1, 2, 3, 4, 5, 6]
    assert all(event.survivors == SITES for event in opened)
    assert not honest.told(SiteLeftOut)


def test_the_model_learns(honest):
    from fedfuse_client.data.manifest import load_dataset
    from fedfuse_simulations.examiner import Examiner

    scores = Examiner(honest.config.model, load_dataset(honest.root / "data")).examine_published(honest.home)
    # Chance is 0.5; six runs of this scored 1.0 each, so noise alone does not turn it red.
    assert scores.all_rows.accuracy > 0.8


def test_the_ledger_holds_a_reservation_and_a_receipt_of_every_site_for_every_round(honest):
    offers = {envelope.body.context(): envelope.body for envelope in leaves(honest, Offer)}
    reservations, receipts = leaves(honest, Reservation), leaves(honest, Receipt)
    for found in (reservations, receipts):
        assert sorted((offers[e.body.context].round, e.author) for e in found) == [
            (number, site) for number in range(1, 7) for site in SITES
        ]
    closes = leaves(honest, Close)
    assert all(close.body.outcome is Outcome.OPENED for close in closes)
    assert {close.body.context for close in closes} == offers.keys()
    hashes = {(e.body.context, e.author): e.body.vector_hash for e in receipts}
    for close in closes:
        for site, value in close.body.survivors.items():
            assert hashes[close.body.context, site] == value


def test_the_first_site_leaf_of_a_round_is_written_before_its_receipt(honest):
    for site in SITES:
        chain = sorted(
            (e for kind in (Reservation, Receipt) for e in leaves(honest, kind) if e.author == site),
            key=lambda e: e.body.seq,
        )
        kinds = [e.kind for e in chain]
        assert kinds == ["reservation", "receipt"] * 6


def test_epsilon_from_the_ledgers_public_numbers_is_the_accountants(honest):
    for site in SITES:
        charges = [e.body.charge for e in leaves(honest, Reservation) if e.author == site]
        ((rate, sigma),) = {(charge.sampling_rate, charge.noise_multiplier) for charge in charges}
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        mine = pld.PLDAccountant().compose(step, sum(charge.steps for charge in charges))
        assert mine.get_epsilon(1e-5) == pytest.approx(epsilon(charges, 1e-5), abs=1e-6)


def test_the_state_on_disk_is_the_last_round(honest):
    state = ServerState.load(honest.home.state)
    assert state.round == 6
    assert np.array_equal(state.model.published, honest.told(RoundOpened)[-1].published)


def test_a_lost_update_leaves_the_site_out_and_its_charge_in(tmp_path):
    federation = SmallFederation(tmp_path, {"secure_aggregation": {"min_survivors": 3}, "rounds": 2})
    calls = []

    def loses(site, step):
        calls.append((site, step))
        return site == "oslo" and step == Step.UPDATE and calls.count((site, step)) == 1

    federation.run(federation.grid(loses))
    first, second = federation.told(RoundOpened)
    assert first.survivors == ("bern", "lyon", "rome")
    assert second.survivors == SITES
    assert [e.reason for e in federation.told(SiteLeftOut)] == ["did not answer in time"]
    # The reservation and receipt whose reply was lost came with a later message: nothing is undercounted.
    assert sum(e.author == "oslo" for e in leaves(federation, Reservation)) == 2


def test_charges_of_the_last_round_are_collected_even_if_their_reply_was_lost(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    federation.run(federation.grid(lambda site, step: site == "oslo" and step == Step.UPDATE))
    assert sum(e.author == "oslo" for e in leaves(federation, Reservation)) == 1


@pytest.mark.parametrize("step", [Step.KEYS, Step.SHARES, Step.UPDATE, Step.AGREE, Step.UNMASK])
def test_one_dropout_in_any_exchange_is_tolerated(tmp_path, step):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    federation.run(federation.grid(lambda site, name: site == "rome" and name == step))
    assert len(federation.told(RoundOpened)) == 1


def test_too_many_dropouts_abort_the_attempt_and_a_new_one_opens_the_round(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    lost = []

    def loses(site, step):
        if step == Step.UPDATE and site in ("oslo", "rome") and lost.count(site) < 1:
            lost.append(site)
            return True
        return False

    federation.run(federation.grid(loses))
    assert len(federation.told(RoundAbandoned)) == 1
    assert federation.told(RoundOpened)[0].survivors == SITES
    outcomes = [close.body.outcome for close in leaves(federation, Close)]
    assert outcomes == [Outcome.ABORTED, Outcome.OPENED]
    # Everybody trained twice and is charged twice.
    assert len(leaves(federation, Reservation)) == 2 * len(SITES)


def test_a_spent_budget_ends_the_run_and_is_on_the_ledger(tmp_path):
    # Two steps fit under the cap, a third does not.
    charge = Charge(sampling_rate=0.5, noise_multiplier=4.0, steps=2)
    cap = epsilon([charge], 1e-5) + 1e-9
    federation = SmallFederation(tmp_path, {"rounds": 5, "privacy": {"epsilon": cap}})
    federation.run()
    assert len(federation.told(RoundOpened)) == 2
    (stopped,) = federation.told(RunStopped)
    assert stopped.round == 2
    refusals = leaves(federation, Refusal)
    assert sorted(e.author for e in refusals) == list(SITES)
    assert all("epsilon_cap" in e.body.reason for e in refusals)
    assert len(leaves(federation, Reservation)) == 2 * len(SITES)


class Tampering(InlineGrid):
    """A server's machine that changes the weights one site is sent."""

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == Step.UPDATE and message.metadata.dst_node_id == 2:
                data = bytearray(unpack(message.content, who="test").vector)
                data[0] ^= 1
                record = ArrayRecord({"vector": Array("uint8", (len(data),), "fedfuse.raw", bytes(data))})
                message.content["vector"] = record
        return super().push_messages(messages)


def test_a_site_that_is_sent_another_model_does_not_train(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    federation.run(federation.grid(grid_type=Tampering))
    (out,) = federation.told(SiteLeftOut)
    assert (out.site, out.step) == ("bern", Step.UPDATE)
    assert "another model" in out.reason
    assert not [e for e in leaves(federation, Reservation) if e.author == "bern"]


class Listening(InlineGrid):
    """Keeps every parcel a site sent, as whoever runs the server can."""

    heard: ClassVar[list] = []

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            parcel = unpack(reply.content, who="")
            self.heard.append((reply.metadata.src_node_id, reply.metadata.message_type, parcel))
        return replies


def test_a_site_whose_data_are_broken_does_not_tell_the_server_how(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    manifest = tmp_path / "data" / "manifest.csv"
    manifest.write_text(manifest.read_text() + "secret-patient,bern,train,1,words,images/none.png,\n")
    Listening.heard.clear()
    # Every site reads this manifest, so no round can be opened.
    federation.run(federation.grid(grid_type=Listening))
    assert federation.told(RunStopped)
    said = repr([parcel for _, _, parcel in Listening.heard])
    assert "site's own log" in said
    assert "none.png" not in said
    assert "secret" not in said


def test_what_sites_send_holds_nothing_computed_from_records_but_the_masked_vector(tmp_path):
    """Two runs differ only in one site's records; everything but keys, shares, hashes and vectors is the same."""
    seen = []
    for name, rows in (("one", 40), ("two", 24)):
        federation = SmallFederation.__new__(SmallFederation)
        from support.small_federation import write_data

        write_data(tmp_path / name / "data", rows_per_site=rows)
        federation.__init__(tmp_path / name, {"rounds": 2})
        Listening.heard.clear()
        federation.run(federation.grid(grid_type=Listening))
        seen.append([shape(*item) for item in Listening.heard])
    assert seen[0] == seen[1]


def shape(node, step, parcel):
    """What is left of a parcel when everything random (hexadecimal runs, masked words) is replaced by its length."""
    import re

    def blank(raw):
        return re.sub(rb'"[0-9a-f]{16,}"', lambda found: b"<%d>" % len(found[0]), raw)

    leaves = [blank(leaf) for leaf in parcel.leaves]
    return (node, step, blank(parcel.body), leaves, len(parcel.vector), parcel.problem)


def test_an_answer_asked_for_again_is_the_same_bytes(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    twice = []

    class Asking(InlineGrid):
        def _deliver(self, message):
            first = super()._deliver(message)
            if message.metadata.message_type.startswith("train."):
                close_sites()  # as a fresh process
                again = super()._deliver(message)
                twice.append((unpack(first.content, who=""), unpack(again.content, who="")))
            return first

    federation.run(federation.grid(grid_type=Asking))
    assert len(federation.told(RoundOpened)) == 1
    assert len(twice) == 5 * len(SITES)
    for first, again in twice:
        assert (first.body, first.vector, first.problem) == (again.body, again.vector, again.problem)


def test_a_site_restored_from_an_old_backup_refuses_to_train(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 2})
    store = federation.folders["lyon"] / "store.db"
    backup = tmp_path / "backup.db"

    def loses(site, step):
        if step == Step.KEYS and site == "bern":
            close_sites()
            if backup.exists():
                for extra in store.parent.glob("store.db-*"):
                    extra.unlink()
                shutil.copyfile(backup, store)
            else:
                shutil.copyfile(store, backup)
        return False

    federation.run(federation.grid(loses))
    first, second = federation.told(RoundOpened)
    assert first.survivors == SITES
    assert second.survivors == ("bern", "oslo", "rome")


def test_the_apps_are_flowers_own_and_their_handlers_cover_every_step():
    registered = set(client_app._registered_funcs)
    assert registered == {step.value for step in Step}


def test_every_leaf_kind_on_a_ledger_is_known(honest):
    kinds = {kind_of(entry.raw) for entry in read_ledger(honest.home.ledger)}
    assert kinds <= LEAF_TYPES.keys()


def test_a_node_without_a_site_folder_says_what_to_set(tmp_path):
    from fedfuse_shared.errors import FedfuseError

    with pytest.raises(FedfuseError, match=r"policy\.toml"):
        site_in(str(tmp_path / "nothing"))


def test_sites_are_drawn_anew_for_each_round(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 4, "sites_per_round": 3})
    federation.run()
    opened = federation.told(RoundOpened)
    assert len(opened) == 4
    assert all(len(event.survivors) == 3 and set(event.survivors) <= set(SITES) for event in opened)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"fusion": "late"}},
        {"aggregation": {"optimizer": "fedadam", "learning_rate": 0.05}},
        # Three noisy steps: with the usual clamp their noise would be cut, which is refused.
        {"privacy": {"steps_per_round": 3}, "secure_aggregation": {"clip_range": 8.0}},
    ],
    ids=["late fusion", "fedadam", "local steps"],
)
def test_other_settings_run_whole_rounds(tmp_path, changes):
    federation = SmallFederation(tmp_path, {"rounds": 2, **changes})
    federation.run()
    first, second = federation.told(RoundOpened)
    assert np.isfinite(second.published).all()
    assert not np.array_equal(first.published, second.published)
    steps = changes.get("privacy", {}).get("steps_per_round", 1)
    assert {e.body.charge.steps for e in leaves(federation, Reservation)} == {steps}
