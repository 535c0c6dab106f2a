"""Attacks found by an outside review; each test states what ought to hold and is red while it does not."""

import copy
import csv
import shutil

import numpy as np
import pytest
from PIL import Image
from support.federation import Federation, Round
from support.small_federation import SmallFederation, write_data

from fedfuse_client.policy import SitePolicy, check_offer, load_policy
from fedfuse_client.round import close_sites, site_in
from fedfuse_client.store import SiteStore
from fedfuse_server.books import Books
from fedfuse_server.events import RoundOpened, RunStopped, SiteLeftOut
from fedfuse_shared.config.base import SERVER, Modality, Trust
from fedfuse_shared.config.federation import GraphKind
from fedfuse_shared.config.files import save_toml
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.crypto import shamir
from fedfuse_shared.envelope import decode, encode, seal
from fedfuse_shared.errors import BudgetError, PolicyError, ProtocolError, RoundAborted
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import FIRST_LINK, Charge, Policy, Receipt, Refusal, link
from fedfuse_shared.messages import Hello, KeyList, Reveal, RoundKeys, Step
from fedfuse_shared.offer import Offer
from fedfuse_shared.parcel import Parcel, pack, unpack
from fedfuse_shared.privacy.accountant import epsilon, epsilon_rdp
from fedfuse_shared.secagg.quantise import vector_length

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

FEDERATION = Federation.of(5)
A, B, C, D, E = FEDERATION.names


def signed_by_server(body):
    return encode(seal(body, SERVER, FEDERATION.server))


def words(sequence, fill=0):
    return np.full(vector_length(sequence.offer), fill, np.uint32)


# --- what a site's records decide must not be seen -----------------------------------------------------------
def add_row(data, *, label, site="bern"):
    """One more training record at a site, of a third class."""
    info = data / "dataset.toml"
    info.write_text(info.read_text().replace('["0", "1"]', '["0", "1", "2"]'))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(data / "images" / "extra.png")
    with (data / "manifest.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["extra", site, "train", label, "rare case", "images/extra.png", ""])


@pytest.mark.parametrize("label", ["0", "2"])
def test_a_model_with_fewer_classes_does_not_show_who_has_a_record_of_the_missing_class(tmp_path, label):
    """The server offers classes 0 and 1 of a data set with 0, 1, 2. One record decides whether bern answers."""
    data = write_data(tmp_path / "data")
    add_row(data, label=label)
    federation = SmallFederation(tmp_path, {"rounds": 1, "privacy": {"sampling_rate": 1.0}})
    two = federation.config.model.model_copy(update={"classes": ("0", "1")})
    save_toml(federation.home.config, federation.config.model_copy(update={"model": two}))
    for folder in federation.folders.values():  # the sites' policies pin no plan, as is the default
        policy = load_policy(folder / "policy.toml")
        save_toml(folder / "policy.toml", policy.model_copy(update={"plans": ()}))
    federation.run()
    at_update = [event.site for event in federation.told(SiteLeftOut) if event.step == Step.UPDATE]
    assert at_update == []


def test_how_many_records_a_site_has_does_not_decide_whether_it_answers(tmp_path, monkeypatch):
    """Memory is asked for by records times a shape the server chose: it finds the count by bisection of the shape."""
    import torch

    federation = SmallFederation(tmp_path, {"rounds": 1, "privacy": {"sampling_rate": 1.0}})
    with (tmp_path / "data" / "manifest.csv").open(
        "a", newline=""
    ) as file:  # bern has one record more than the rest
        csv.writer(file).writerow(["extra", "bern", "train", "0", "one more", "images/0.png", ""])
    real, count = torch.zeros, 31

    def machine(*shape, **kind):  # a machine on which the thirty-first record does not fit any more
        if shape and shape[0] == count and len(shape) > 1 and shape[1] > 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*shape, **kind)

    monkeypatch.setattr(torch, "zeros", machine)
    federation.run()
    assert [event.site for event in federation.told(SiteLeftOut)] == []


def test_a_modality_that_the_policy_does_not_declare_is_not_trained_on(tmp_path, monkeypatch):
    from fedfuse_client.data import tensors

    federation = SmallFederation(tmp_path, {"rounds": 1, "privacy": {"sampling_rate": 1.0}})
    for folder in federation.folders.values():
        policy = load_policy(folder / "policy.toml")
        save_toml(folder / "policy.toml", policy.model_copy(update={"modalities": (Modality.IMAGE,)}))
    read = []
    decode_text = tensors.decode_text
    monkeypatch.setattr(tensors, "decode_text", lambda text: read.append(text) or decode_text(text))
    federation.run()
    assert not read


def test_a_site_restored_within_a_round_does_not_mask_a_second_vector_under_the_same_masks(tmp_path):
    """The ledger's head is compared in the first exchange only: after a restore the server asks for UPDATE again.

    The server shows the site's own receipt, as an honest one would with every exchange, and it is not looked at.
    """
    from fedfuse_simulations.engines.inline import InlineGrid

    federation = SmallFederation(tmp_path, {"rounds": 1})
    folder = federation.folders["bern"]
    vectors = []

    class Restoring(InlineGrid):
        def _deliver(self, message):
            mine = message.metadata.dst_node_id == 2 and message.metadata.message_type == Step.UPDATE
            if not mine:
                return super()._deliver(message)
            close_sites()
            shutil.copyfile(folder / "store.db", tmp_path / "backup.db")
            first = super()._deliver(message)
            close_sites()
            for path in folder.glob("store.db*"):
                path.unlink()
            shutil.copyfile(tmp_path / "backup.db", folder / "store.db")
            sent = unpack(first.content, who="bern")
            shown = copy.copy(unpack(message.content, who="server"))
            message.content = pack(
                Parcel(shown.context, shown.body, (sent.leaves[-1],), shown.known, shown.vector)
            )
            second = unpack(super()._deliver(message).content, who="bern")
            vectors.extend(v for v in (sent.vector, second.vector) if v)
            return first

    federation.run(federation.grid(grid_type=Restoring))
    assert len(set(vectors)) == 1


def test_weights_that_are_not_finite_are_refused_before_anything_is_charged(tmp_path):
    """``load_flat`` refuses them after the reservation: a server spends every budget without anybody learning."""
    from fedfuse_server import coordinator
    from fedfuse_shared.ledger.records import Reservation

    federation = SmallFederation(tmp_path, {"rounds": 1})
    flatten = coordinator.flatten
    coordinator.flatten = lambda model: np.full_like(flatten(model), np.nan)
    try:
        federation.run()
    finally:
        coordinator.flatten = flatten
    assert {event.step for event in federation.told(SiteLeftOut)} == {Step.UPDATE.value}
    charged = [e for e in read_ledger(federation.home.ledger) if kind_of(e.raw) == Reservation.kind]
    assert charged == []


# --- one hostile site ----------------------------------------------------------------------------------------
class WrongDealer:
    """One site deals shares of another seed than it commits to, in every attempt; all else it does honestly."""

    def __init__(self, monkeypatch, federation, name):
        self.split, self.hostile, self.calls = shamir.split, False, 0
        monkeypatch.setattr(shamir, "split", self)
        self.node = 2 + list(federation.folders).index(name)

    def __call__(self, secret, threshold, points, random_bytes):
        self.calls += 1
        seed = self.hostile and self.calls % 2 == 1
        return self.split(b"\x55" * 32 if seed else secret, threshold, points, random_bytes)


def test_one_wrong_dealer_costs_one_attempt_not_the_run(tmp_path, monkeypatch):
    """Threat model: any one site may cost no more than one attempt. It is named, and then it is asked again."""
    from fedfuse_simulations.engines.inline import InlineGrid

    federation = SmallFederation(tmp_path, {"rounds": 1})
    dealer = WrongDealer(monkeypatch, federation, "rome")

    class Hostile(InlineGrid):
        def _deliver(self, message):
            dealer.hostile, dealer.calls = message.metadata.dst_node_id == dealer.node, 0
            return super()._deliver(message)

    federation.run(federation.grid(grid_type=Hostile))
    assert not federation.told(RunStopped)
    assert federation.told(RoundOpened)


def test_one_wrong_tail_does_not_stop_the_run(tmp_path, monkeypatch):
    """A site that counts itself a thousand times in the tail aborts every attempt, and nobody is named."""
    from fedfuse_client import learner

    federation = SmallFederation(tmp_path, {"rounds": 1})
    quantise = learner.quantise

    def lie(update, declared, offer):
        mine = quantise(update, declared, offer)
        mine[offer.dimension() :] += 1000
        return mine

    who = []
    real = learner.Learner.update

    def update(self, offer, weights):
        who.append(self._policy.site)
        monkeypatch.setattr(learner, "quantise", lie if self._policy.site == "rome" else quantise)
        return real(self, offer, weights)

    monkeypatch.setattr(learner.Learner, "update", update)
    federation.run()
    assert "rome" in who
    assert federation.told(RoundOpened)


def test_a_holder_that_keeps_its_shares_back_does_not_frame_the_dealers():
    sequence = Round(FEDERATION, FEDERATION.offer())
    everyone, four = list(FEDERATION.names), [A, B, C, E]
    deliveries = sequence.shares(everyone, sequence.keys(everyone))
    for name in four:  # D drops out: exactly t are left
        sequence.send(name, words(sequence), deliveries[name])
    unmasking = sequence.agree(four)
    nothing = Reveal(context=sequence.offer.context(), seed_shares={}, mask_shares={}, bad_dealers=())
    try:
        sequence.server.receive_reveal(E, encode(seal(nothing, E, FEDERATION.keys[E])))
    except ProtocolError as problem:
        assert problem.who == E
        return
    with pytest.raises(RoundAborted) as aborted:
        sequence.unmask([A, B, C], unmasking)
    assert aborted.value.who in (E, f"round {sequence.offer.round}"), f"{aborted.value} blames an honest site"


@pytest.fixture
def books(tmp_path):
    opened = Books(tmp_path / "ledger.jsonl", FEDERATION.roster, FEDERATION.server)
    yield opened
    opened.close()


def chain_of(*bodies):
    prev, found = FIRST_LINK, []
    for seq, build in enumerate(bodies, start=1):
        envelope = seal(build(seq, prev), E, FEDERATION.keys[E])
        prev = link(envelope)
        found.append(encode(envelope))
    return found


def test_a_leaf_for_an_attempt_that_was_never_offered_is_not_logged(books):
    """An auditor reads it as an offer that the *server* kept off the ledger (Code.NO_OFFER)."""
    raw = chain_of(lambda s, p: Refusal(seq=s, prev=p, context="f" * 64, reason="never offered"))
    with pytest.raises(ProtocolError):
        books.take(E, raw)


def test_a_second_receipt_for_one_attempt_is_not_logged(books):
    """The attempt goes by the last receipt, the auditor by the first: it finds the server summed another vector."""
    offer = FEDERATION.offer()
    books.sign(offer)
    raw = chain_of(
        *(
            lambda s, p, h=h: Receipt(seq=s, prev=p, context=offer.context(), steps=1, vector_hash=h * 64)
            for h in "ab"
        )
    )
    with pytest.raises(ProtocolError):
        books.take(E, raw)


def test_a_fork_of_a_chain_is_noticed_below_its_head_too(books):
    fields = load_fields()

    def policy_leaf(digit):
        return lambda s, p: Policy(
            seq=s,
            prev=p,
            trust=(Trust.SITE,),
            graphs=(GraphKind.COMPLETE,),
            **{**fields, "policy_hash": digit * 64},
        )

    books.take(E, chain_of(policy_leaf("a"), policy_leaf("b")))
    other = chain_of(policy_leaf("c"))
    with pytest.raises(ProtocolError):
        books.take(E, other)


def test_a_leaf_has_a_bounded_size(books):
    policy = load_fields()
    raw = chain_of(
        lambda s, p: Policy(
            seq=s, prev=p, trust=(Trust.SITE,) * 500_000, graphs=(GraphKind.COMPLETE,), **policy
        )
    )
    assert len(raw[0]) > 3_000_000
    with pytest.raises(ProtocolError):
        books.take(E, raw)


def load_fields():
    return {
        "policy_hash": "1" * 64,
        "roster_hash": "2" * 64,
        "epsilon_cap": 1.0,
        "delta": 1e-5,
        "adjacency": "add-or-remove-one-record",
        "min_participants": 3,
        "min_survivors": 3,
        "min_threshold": 3,
        "min_colluders": 0,
        "min_noise_multiplier": 1.0,
        "max_sampling_rate": 0.5,
        "max_steps_per_round": 1,
        "max_clip": 1.0,
    }


# --- keys ----------------------------------------------------------------------------------------------------
def test_a_low_order_mask_key_alone_is_refused_before_anything_is_dealt():
    """Only the channel key is tried in step 2; the mask key fails after the reservation and the training."""
    sequence = Round(FEDERATION, FEDERATION.offer())
    keys = {n: decode(sequence.sites[n].advertise(), RoundKeys, who=n) for n in FEDERATION.names}
    bad = keys[E].body.model_copy(update={"mask": "01" + "00" * 31})
    keys[E] = seal(bad, E, FEDERATION.keys[E])
    listed = signed_by_server(KeyList(context=sequence.offer.context(), keys=tuple(keys.values()), roll=None))
    with pytest.raises(ProtocolError, match="low order"):
        sequence.sites[A].deal(listed)


# --- the site's policy and budget ----------------------------------------------------------------------------
def policy(**changes):
    values = {
        "site": A,
        "federation": "lab",
        "roster_hash": FEDERATION.roster.hash(),
        "data": "records",
        "modalities": (Modality.TEXT,),
        "epsilon_cap": 4.0,
        "delta": 1e-5,
        "min_participants": 3,
        "min_survivors": 3,
        "min_threshold": 3,
        "min_colluders": 0,
        "trust": (Trust.SITE,),
        "min_noise_multiplier": 1.0,
        "max_sampling_rate": 0.5,
        "max_steps_per_round": 50,
        "max_clip": 1.0,
        **changes,
    }
    from pathlib import Path

    return SitePolicy(**{**values, "data": Path("records")})


def test_a_pinned_plan_binds_what_is_offered():
    """The plan's hash is what the server says it is: any other model and learning rate goes under a pinned one."""
    honest = FEDERATION.offer()
    pinned = policy(plans=(honest.plan_hash,))
    check_offer(pinned, honest)
    other = honest.model_copy(
        update={
            "model": ModelConfig(
                classes=("x", "y", "z"), encoders={Modality.AUDIO: EncoderConfig(name="audio-conv", width=9)}
            ),
            "training": honest.training.model_copy(update={"learning_rate": 1e30}),
        }
    )
    with pytest.raises(PolicyError):
        check_offer(pinned, other)


def test_parameters_chosen_on_the_way_are_enforced_by_a_renyi_filter(tmp_path):
    """Rule 3: PLD is no filter where (q, sigma) change freely; the server changes them from round to round."""
    privacy = FEDERATION.offer().privacy
    one = privacy.model_copy(update={"steps": 20, "noise_multiplier": 4.0, "noise_share": 4.0})
    two = one.model_copy(update={"sampling_rate": 0.1, "noise_multiplier": 2.0, "noise_share": 2.0})
    charges = [
        Charge(sampling_rate=p.sampling_rate, noise_multiplier=p.noise_multiplier, steps=p.steps)
        for p in (one, two)
    ]
    low, high = epsilon(charges, 1e-5), epsilon_rdp(charges, 1e-5)
    assert low < high
    capped = policy(epsilon_cap=(low + high) / 2)
    with SiteStore.open(tmp_path / "store.db", create=True) as store:
        chain = store.chain("lab", A)
        dataset = store.register_dataset([b"r" * 32])
        chain.reserve(capped, FEDERATION.offer(privacy=one), dataset, FEDERATION.keys[A])
        with pytest.raises(BudgetError):
            chain.reserve(capped, FEDERATION.offer(privacy=two, round=2), dataset, FEDERATION.keys[A])


def test_a_site_that_lost_its_store_does_not_start_afresh(tmp_path):
    """The store is the memory of what was spent; a lost one is silently replaced, and the server shows no leaf."""
    charge = Charge(sampling_rate=0.25, noise_multiplier=4.0, steps=2)
    charge = Charge(sampling_rate=0.25, noise_multiplier=4.0, steps=2)
    cap = epsilon([charge], 1e-5) + 1e-9
    federation = SmallFederation(
        tmp_path, {"rounds": 3, "privacy": {"epsilon": cap, "sampling_rate": 0.25, "steps_per_round": 1}}
    )
    federation.run()
    assert len(federation.told(RoundOpened)) == 2
    assert federation.told(RunStopped)  # the budget is spent
    folder = federation.folders["bern"]
    for path in folder.glob("store.db*"):
        path.unlink()
    offers = [e.raw for e in read_ledger(federation.home.ledger) if kind_of(e.raw) == Offer.kind]
    last = decode(offers[-1], Offer, who="ledger").body
    try:
        answer = site_in(str(folder)).answer(Step.KEYS, Parcel(last.context(), offers[-1]))
    except Exception:  # noqa: BLE001 - refusing to open is as good
        return
    finally:
        close_sites()
    assert answer.problem


def test_a_long_chain_does_not_lock_a_site_out(tmp_path, monkeypatch):
    """A greeting asks for the whole chain; beyond the most leaves of a parcel no site can introduce itself again."""
    from fedfuse_shared import parcel

    federation = SmallFederation(tmp_path, {"rounds": 3})
    federation.run()
    monkeypatch.setattr(
        parcel, "_MAX_LEAVES", 5
    )  # stands for 10,000, that is 5,000 rounds; 100,000 may be planned
    key = federation.home.load_key()
    hello = Hello(federation=federation.config.federation, run="again", nonce="0" * 64)
    try:
        folder = str(federation.folders["bern"])
        answer = site_in(folder).answer(Step.HELLO, Parcel(body=encode(seal(hello, SERVER, key))))
    finally:
        close_sites()
    unpack(pack(answer), who="bern")


def test_a_sequence_number_beyond_the_stores_integers_is_refused(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    with pytest.raises(ProtocolError):
        unpack(pack(Parcel(known=2**63)), who="server")
    assert federation.folders
