"""Attacks on evaluation under the budget, schedules and pins that a review tried; red while one succeeds."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.federation import Federation
from support.ledgers import LedgerBuilder, codes
from support.small_federation import SmallFederation

from fedfuse_client import code
from fedfuse_client.data.manifest import load_dataset
from fedfuse_client.data.tensors import RecordTensors
from fedfuse_client.evaluation import count
from fedfuse_client.policy import SitePolicy, check_offer
from fedfuse_client.shared_round import with_share
from fedfuse_client.store import SiteStore
from fedfuse_shared import limits
from fedfuse_shared.config.base import SERVER, Modality, Trust
from fedfuse_shared.config.evaluation import Detail
from fedfuse_shared.config.model import AudioInput, EncoderConfig, Fusion, ImageInput, TextInput
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import canonical, decode, encode, verify
from fedfuse_shared.errors import BudgetError, PolicyError, ProtocolError, VerificationError
from fedfuse_shared.ledger.records import Charge, Close, EvaluationCharge, Policy, Reservation
from fedfuse_shared.models import build_model, flatten, load_flat
from fedfuse_shared.offer import Evaluation, Offer, architecture_hash
from fedfuse_shared.privacy.accountant import epsilon, epsilon_rdp
from fedfuse_shared.privacy.aggregate import share, share_deviation
from fedfuse_shared.privacy.integer_noise import SMOOTH
from fedfuse_shared.privacy.noise import NoiseSource

pytestmark = pytest.mark.slow


def policy_for(offer, folder, **changes):
    """Return the policy of an offer's first participant that allows it."""
    values = {
        "site": offer.participants[0],
        "federation": offer.federation,
        "roster_hash": offer.roster_hash,
        "data": folder,
        "modalities": (Modality.TEXT,),
        "epsilon_cap": 50.0,
        "delta": offer.privacy.delta,
        "min_participants": 3,
        "min_survivors": 3,
        "min_threshold": 2,
        "min_colluders": 0,
        "trust": (Trust.SITE,),
        "min_noise_multiplier": 1.0,
        "max_sampling_rate": 1.0,
        "max_steps_per_round": 10,
        "max_clip": 1.0,
    }
    return SitePolicy(**{**values, **changes})


FREE = {"schedule": Schedule.FREE, "min_evaluation_noise": 8.0}


def evaluating(*, noise=8.0, share=None, **changes):
    """Return the changes of an offer that evaluates in round 3."""
    asked = Evaluation(every=2, detail=Detail.ACCURACY, noise=noise, noise_share=share or noise)
    return {"evaluation": asked, **changes}


# --- what is accounted -----------------------------------------------------------------------------------------
def test_shares_of_the_noise_on_counts_have_to_add_up_too():
    """With shared noise the audit looked at the update's shares alone: counts were charged at noise nobody added."""
    builder = LedgerBuilder().enrol()
    offer = shared_noise(builder.federation)
    honest = offer.privacy.noise_sites
    enough = math.hypot(80.0, SMOOTH) / math.sqrt(honest) * 1.001
    grid = {"scale": offer.scale, "clip_range": 1000.0}
    builder.offer(**evaluating(noise=80.0, share=enough, privacy=offer.privacy, **grid))
    assert "offer-noise" not in codes(builder.audit())
    builder.offer(**evaluating(noise=80.0, share=8.0, privacy=offer.privacy, **grid))
    assert "offer-noise" in codes(builder.audit())


def shared_noise(federation, **changes):
    """Return an offer of which as many sites share the noise as are sure to be honest."""
    plain = federation.offer(scale=2.0**15)
    sites = plain.min_survivors - plain.colluders
    shares = {"noise_sites": sites, "noise_share": share(plain.privacy.noise_multiplier, sites), **changes}
    privacy = plain.privacy.model_copy(update={"trust": Trust.AGGREGATE, "steps": 1, **shares})
    return plain.model_copy(update={"privacy": privacy})


def test_a_share_of_the_noise_is_not_counted_as_more_than_a_site_adds(tmp_path):
    """Sites draw what follows from the noise charged; what is charged if all others collude was the server's word."""
    federation = Federation.of(4)
    honest = shared_noise(federation)
    policy = policy_for(honest, tmp_path, trust=(Trust.AGGREGATE,), max_epsilon_all_collude=20.0)
    check_offer(policy, honest)
    drawn = share_deviation(
        honest.privacy.noise_multiplier,
        honest.privacy.noise_sites,
        honest.privacy.clip,
        honest.scale,
        honest.dimension(),
    )
    lie = shared_noise(federation, noise_share=1000.0)
    assert with_share(np.zeros(lie.dimension(), np.int64), lie, NoiseSource.fresh()).std() < 2 * drawn
    with pytest.raises(PolicyError, match=r"shares of 1000\.0 for noise"):
        check_offer(policy, lie)
    builder = LedgerBuilder(federation).enrol()
    builder.offer(privacy=lie.privacy)
    assert "offer-noise" in codes(builder.audit())


def test_a_cap_on_what_is_left_if_all_others_collude_is_audited_where_it_is_published():
    builder = LedgerBuilder().enrol()
    offer = shared_noise(builder.federation)
    grid = {"scale": offer.scale, "clip_range": 1000.0}
    for _ in range(3):
        builder.round(privacy=offer.privacy, **grid)
    assert builder.audit().ok
    (row, *_) = builder.audit().sites
    for site, most in zip(builder.federation.names, (1.01, 0.99, 1.01, None), strict=True):
        builder.policy(site, max_epsilon_all_collude=most and most * row.epsilon_all_collude)
    builder.round(privacy=offer.privacy, **grid)
    found = [(finding.code.value, finding.site) for finding in builder.audit().findings]
    assert found == [("over-cap", site) for site in builder.federation.names[:3]]
    builder = LedgerBuilder().enrol()
    for site, most in zip(builder.federation.names, (1.01, 0.99, 1.01, None), strict=True):
        builder.policy(site, max_epsilon_all_collude=most and most * row.epsilon_all_collude)
    for _ in range(3):
        builder.round(privacy=offer.privacy, **grid)
    found = [(finding.code.value, finding.site) for finding in builder.audit().findings]
    assert found == [("over-cap", builder.federation.names[1])]


def everything(builder, noise):
    """Let all sites train without sampling in three rounds, the third of which evaluates with the same noise."""
    privacy = builder.federation.offer().privacy
    privacy = privacy.model_copy(
        update={"sampling_rate": 1.0, "noise_multiplier": noise, "noise_share": noise}
    )
    for number in range(3):
        offer = builder.offer(**evaluating(noise=noise, privacy=privacy))
        counted = EvaluationCharge(noise=noise, noise_share=noise) if number == 2 else None
        for site in offer.participants:
            builder.reserve(site, offer, evaluation=counted)
            builder.receipt(site, offer)
        builder.close(offer, offer.participants, counts=(1, 2) if counted else ())


def test_evaluation_is_a_second_mechanism_also_where_its_numbers_are_those_of_training():
    """q = 1 and equal noise merge into one entry; the privacy loss distribution is that of continuous noise only."""
    builder = LedgerBuilder().enrol()
    for site in builder.federation.names:
        builder.policy(site, max_sampling_rate=1.0, min_evaluation_noise=8.0)  # schedule: fixed
    everything(builder, 20.0)
    report = builder.audit()
    assert "outside-policy" in codes(report)


def test_a_schedule_fixed_afterwards_does_not_bring_the_tighter_bound_back():
    """What was charged while anything might have been chosen counts by Renyi, whatever the policy says later."""
    builder = LedgerBuilder().enrol()
    for site in builder.federation.names:
        builder.policy(site, max_sampling_rate=1.0, **FREE)
    everything(builder, 20.0)
    for site in builder.federation.names:
        builder.policy(site, max_sampling_rate=1.0, schedule=Schedule.FIXED)
    (row, *_) = builder.audit().sites
    assert row.schedule is Schedule.FIXED
    assert row.epsilon == row.epsilon_rdp


def test_a_site_does_not_go_back_to_the_tighter_bound(tmp_path):
    """The cap lies between both bounds of five rounds, and the schedule is free in the first, then fixed."""
    federation = Federation.of(3)
    offers = [federation.offer(round=number) for number in range(1, 6)]
    privacy = offers[0].privacy
    charges = [
        Charge(
            sampling_rate=privacy.sampling_rate,
            noise_multiplier=privacy.noise_multiplier,
            steps=privacy.steps * len(offers),
        )
    ]
    cap = (epsilon(charges, privacy.delta) + epsilon_rdp(charges, privacy.delta)) / 2
    policy = policy_for(offers[0], tmp_path, epsilon_cap=cap)
    key = Ed25519PrivateKey.generate()

    def afforded(*schedules):
        """How many of five rounds fit, the first under one schedule and the others under another."""
        path = tmp_path / f"{'-'.join(schedules)}.db"
        with SiteStore.open(path, create=True) as store:
            dataset = store.register_dataset([b"\1" * 32])
            chain = store.chain(policy.federation, policy.site)
            paid = 0
            for number, offer in enumerate(offers):
                now = policy.model_copy(update={"schedule": schedules[0] if number == 0 else schedules[1]})
                if number < 2:
                    chain.append(now.leaf, key)
                try:
                    chain.reserve(now, offer, dataset, key)
                except BudgetError:
                    break
                paid += 1
        return paid

    assert afforded(Schedule.FIXED, Schedule.FIXED) == 5
    assert afforded(Schedule.FREE, Schedule.FREE) == 4
    assert afforded(Schedule.FREE, Schedule.FIXED) == 4


# --- one spelling ----------------------------------------------------------------------------------------------
def grown(builder):
    """One leaf of every kind that has grown, with everything new at its default."""
    offer = builder.round()
    found = {}
    for leaf in builder.leaves:
        found[leaf.kind] = leaf
    assert offer.evaluation is None
    return [found[kind.kind] for kind in (Policy, Offer, Reservation, Close)]


def test_what_versions_added_has_one_spelling():
    """A default spelled out, signed over that very text or over the short one, is a second line for one statement."""
    builder = LedgerBuilder().enrol()
    keys = {**builder.federation.keys, SERVER: builder.federation.server}
    tried = 0
    for leaf in grown(builder):
        plain = json.loads(encode(leaf))
        for name in type(leaf.body).added:
            assert name not in plain["body"]
            default = type(leaf.body).model_fields[name].default
            body = {**plain["body"], name: list(default) if isinstance(default, tuple) else default}
            unsigned = {"author": leaf.author, "body": body, "kind": leaf.kind, "v": 1}
            label = limits.LABEL_SIGNATURE + leaf.kind.encode() + b"\0"
            for said in (unsigned, {**unsigned, "body": plain["body"]}):
                sig = keys[leaf.author].sign(label + canonical(said)).hex()
                with pytest.raises(ProtocolError, match="canonical form"):
                    decode(canonical({**unsigned, "sig": sig}), type(leaf.body), who="x")
                tried += 1
    assert tried == 2 * 9


def test_a_field_that_versions_added_cannot_be_taken_out_of_what_was_signed():
    """Without its schedule a policy would read as fixed, and a reservation without its evaluation as cheaper."""
    builder = LedgerBuilder().enrol()
    site = builder.federation.names[0]
    leaf = builder.policy(site, **FREE)
    public = builder.federation.roster.key_of(site)
    for name in ("schedule", "min_evaluation_noise"):
        plain = json.loads(encode(leaf))
        del plain["body"][name]
        read = decode(canonical(plain), Policy, who="x")
        with pytest.raises(VerificationError):
            verify(read, public)


# --- pins ------------------------------------------------------------------------------------------------------
@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A copy of the client's code that the hash is taken of."""
    folder = tmp_path / "code" / "fedfuse_client"
    shutil.copytree(Path(code.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "files", lambda package: tmp_path / "code" / package)
    monkeypatch.setattr(code, "PACKAGES", ("fedfuse_client",))
    return folder


def pinned(folder, offer):
    return policy_for(offer, folder, code=(code.code_hash(),))


def test_code_that_is_upgraded_under_a_running_site_is_noticed(installed):
    """Modules that train are imported late: a process older than the upgrade would train with it, unasked."""
    offer = Federation.of(4).offer()
    policy = pinned(installed, offer)
    check_offer(policy, offer)
    training = installed / "training.py"
    training.write_text(training.read_text().replace("optimizer.step()", "pass"))
    with pytest.raises(PolicyError, match="would be trained on by code"):
        check_offer(policy, offer)


@pytest.mark.parametrize("name", ["training.so", "training.cpython-311-x86_64-linux-gnu.so", "shadow.pyc"])
def test_compiled_code_beside_the_modules_is_noticed(installed, name):
    """Python prefers training.so to training.py."""
    offer = Federation.of(4).offer()
    policy = pinned(installed, offer)
    (installed / name).write_bytes(b"\x7fELF")
    with pytest.raises(PolicyError, match="would be trained on by code"):
        check_offer(policy, offer)


def test_what_python_compiles_by_itself_does_not_change_the_hash(installed):
    before = code.code_hash()
    (installed / "__pycache__").mkdir()
    (installed / "__pycache__" / "training.cpython-311.pyc").write_bytes(b"cached")
    assert code.code_hash() == before


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ("a", "b", "c")},
        {"classes": ("b", "a")},
        {"encoders": {Modality.TEXT: EncoderConfig(name="hashed-words", width=8)}},
        {"encoders": {Modality.TEXT: EncoderConfig(name="hashed-words", weight=2.0)}},
        {"encoders": {Modality.TEXT: EncoderConfig(name="hashed")}},
        {"fusion": Fusion.LATE},
        {"image": ImageInput(size=29)},
        {"audio": AudioInput(frames=49)},
        {"text": TextInput(words=255)},
    ],
    ids=str,
)
def test_no_part_of_a_model_escapes_the_hash_that_policies_name(tmp_path, change):
    offer = Federation.of(4).offer()
    policy = policy_for(offer, tmp_path, models=(architecture_hash(offer.model),))
    check_offer(policy, offer)
    other = offer.model_copy(update={"model": offer.model.model_copy(update=change)})
    with pytest.raises(PolicyError, match="which policy does not list"):
        check_offer(policy, other)


# --- what one record moves ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return SmallFederation(tmp_path_factory.mktemp("run"), {"rounds": 1})


def rows_of(federation):
    return load_dataset(federation.root / "data").select(split="test")


def counted(federation, rows, weights, detail):
    """Return the exact counts of rows under global weights that the server chose."""
    asked = Evaluation(every=1, detail=detail, noise=8.0, noise_share=8.0)
    offer = Federation.of(4).offer(model=federation.config.model, round=2, evaluation=asked)
    model = build_model(offer.model, 0)
    load_flat(model, weights)
    found = count(model, RecordTensors(federation.root / "data", rows, offer.model), offer, 8)
    assert found.shape == (offer.counts,)
    return found


@pytest.mark.parametrize(
    ("scale", "detail"),
    [(0.0, Detail.CONFUSION), (1e-30, Detail.CONFUSION), (1.0, Detail.ACCURACY), (1e30, Detail.CONFUSION)],
)
def test_a_row_moves_one_count_by_one_whatever_weights_the_server_sends(federation, scale, detail):
    """Ties, logits a rounding apart, overflow to NaN: nobody else's prediction may hang on whether a row is there."""
    rows = rows_of(federation)
    numbers = np.random.default_rng(7)
    size = sum(p.numel() for p in build_model(federation.config.model, 0).parameters())
    weights = (scale * numbers.standard_normal(size)).astype(np.float32)
    whole = counted(federation, rows, weights, detail)
    assert whole.sum() == len(rows)
    for left_out in range(0, len(rows), 12):
        others = counted(federation, (*rows[:left_out], *rows[left_out + 1 :]), weights, detail)
        moved = whole - others
        assert moved.sum() == np.abs(moved).sum() == 1


def test_rows_whose_logits_are_as_good_as_equal_do_not_hang_on_each_other(federation):
    """Both classes get weights that differ in their last bits: a prediction is the sign of a rounding error."""
    rows = rows_of(federation)
    model = build_model(federation.config.model, 0)
    numbers = np.random.default_rng(8)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = numbers.standard_normal(parameter.shape)
            if parameter.shape[0] == 2:
                drawn[1] = drawn[0] * (1 + numbers.choice([-1, 1], drawn[0].shape) * 1e-7)
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    weights = flatten(model)
    whole = counted(federation, rows, weights, Detail.CONFUSION)
    assert len(np.flatnonzero(whole)) > 2, "every row of a class is predicted alike: no near ties were made"
    for left_out in range(0, len(rows), 4):
        others = counted(federation, (*rows[:left_out], *rows[left_out + 1 :]), weights, Detail.CONFUSION)
        assert np.abs(whole - others).sum() == 1


def test_a_test_row_that_cannot_be_read_takes_none_of_the_others_along(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    rows = rows_of(federation)
    weights = flatten(build_model(federation.config.model, 3))
    before = counted(federation, rows, weights, Detail.CONFUSION)
    broken = next(row for row in rows if row.image is not None)
    (federation.root / "data" / broken.image).write_bytes(b"no picture any more")
    after = counted(federation, rows, weights, Detail.CONFUSION)
    assert (before - after).sum() == np.abs(before - after).sum() == 1


def test_no_matrix_is_made_of_thousands_of_classes_for_two_counts(federation):
    """10,000 classes are allowed; their confusion matrix is 800 MB, once for every microbatch, for accuracy alone."""
    offer = Federation.of(4).offer(round=3, **evaluating())
    classes = tuple(f"c{number}" for number in range(10_000))
    many = offer.model_copy(update={"model": federation.config.model.model_copy(update={"classes": classes})})
    model = build_model(many.model, 0)
    data = RecordTensors(federation.root / "data", rows_of(federation), many.model)
    sizes = []

    def watch(pairs, minlength):
        sizes.append(minlength)
        return bincount(pairs, minlength=minlength)

    with pytest.MonkeyPatch.context() as patch:
        bincount = torch.bincount
        patch.setattr(torch, "bincount", watch)
        assert count(model, data, many, 8).sum() == len(data)
    assert set(sizes) == {2}
