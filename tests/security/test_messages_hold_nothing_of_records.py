"""Whatever a site sends is public, random, or the masked vector: nothing else is computed from its records.

The set of message types is found by looking, not listed: a new type, or a new field of one, fails until it is
classified here. Then whole rounds are played in worlds whose data differ and whose randomness is the same, and every
field that is classified as public or random has to be the same in all of them, byte for byte.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import pkgutil
import shutil
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from pathlib import Path

import pytest
from pydantic import BaseModel
from support.data_folder import write_image
from support.federation import Federation, SeededBytes
from support.lone_site import NAME, PEERS, Around, write_home
from support.weakened import Weakening, weaken

import fedfuse_client
import fedfuse_shared
from fedfuse_client.data.tensors import RecordTensors
from fedfuse_client.round import Site
from fedfuse_shared import enrolment, messages
from fedfuse_shared.commands import Command, CommandRefusal
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.evaluation import Detail
from fedfuse_shared.config.model import EncoderConfig, ImageInput, ModelConfig
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import Body, Envelope, GrownBody, decode
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.ledger import records
from fedfuse_shared.ledger.log import kind_of
from fedfuse_shared.messages import Roll, Step
from fedfuse_shared.models import build_model, flatten, model_hash, outline
from fedfuse_shared.offer import Evaluation, Offer, RoundPrivacy
from fedfuse_shared.parcel import Parcel, pack
from fedfuse_shared.privacy.noise import NoiseSource
from fedfuse_shared.roster import Roster

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Source(Enum):
    """What a field that leaves a site is made of; where two words apply, the later one."""

    PUBLIC = "offer, roster, policy file, or what others sent"
    RANDOM = "the site's or a peer's randomness, and public values"
    MASKED = "the noised, quantised update under masks"
    OF_MASKED = "hash of masked vectors"
    CHAINED = "hash of the site's leaf before, which states hashes of masked vectors"
    SIGNATURE = "the site's signature over the rest"
    PARTS = "values that are classified one by one"


P, R, M, H, C, S, N = Source
SITE_SENDS: dict[type, dict[str, Source]] = {
    Parcel: {"context": P, "body": N, "leaves": N, "known": P, "vector": M, "problem": P},
    Envelope: {"author": P, "body": N, "kind": P, "sig": S, "v": P},
    messages.Introduction: {"federation": P, "run": P, "nonce": P},
    messages.RoundKeys: {"context": P, "channel": R, "mask": R},
    messages.Dealing: {"context": P, "notes": N},
    messages.ShareNote: {
        "context": P,
        "holder": P,
        "sealed": R,
        "seed_share_hash": R,
        "mask_share_hash": R,
        "seed_commitment": R,
    },
    messages.Agreement: {"context": P, "keys_hash": R, "dealings_hash": R, "survivors_hash": H},
    messages.Reveal: {"context": P, "seed_shares": R, "mask_shares": R, "bad_dealers": P},
    records.Policy: {
        "seq": P,
        "prev": C,
        "policy_hash": P,
        "roster_hash": P,
        "epsilon_cap": P,
        "delta": P,
        "adjacency": P,
        "min_participants": P,
        "min_survivors": P,
        "min_threshold": P,
        "min_colluders": P,
        "trust": P,
        "min_noise_multiplier": P,
        "max_sampling_rate": P,
        "max_steps_per_round": P,
        "max_clip": P,
        "graphs": P,
        "schedule": P,
        "min_evaluation_noise": P,
        "max_epsilon_all_collude": P,
    },
    records.Reservation: {
        "seq": P,
        "prev": C,
        "context": P,
        "dataset": R,
        "trust": P,
        "adjacency": P,
        "charge": N,
        "noise_share": P,
        "noise_sites": P,
        "colluders": P,
        "clip": P,
        "delta": P,
        "elsewhere": N,
        "elsewhere_alone": N,
        "elsewhere_draws": P,
        "evaluation": N,
    },
    records.EvaluationCharge: {"noise": P, "noise_share": P},
    records.Charge: {"sampling_rate": P, "noise_multiplier": P, "steps": P},
    records.Refusal: {"seq": P, "prev": C, "context": P, "reason": P},
    records.Receipt: {"seq": P, "prev": C, "context": P, "steps": P, "vector_hash": H},
    records.Leave: {"seq": P, "prev": C, "reason": P},
    enrolment.SiteRequest: {"federation": P, "site": P, "identity": R, "node": R},
}
"""Every type whose values can leave a site, field by field."""
OTHERS_SEND = {
    Command,
    CommandRefusal,
    enrolment.Kit,
    messages.Hello,
    messages.KeyList,
    messages.Delivery,
    messages.Survivors,
    messages.Unmasking,
    records.Close,
    Offer,
    Roster,
}
"""Signed by the server or the operator; a site has no key for it."""
ABSTRACT = {GrownBody, messages.RoundBody, records.SiteLeaf}


# --- the set of types --------------------------------------------------------------------------------------------


def every_body() -> set[type[Body]]:
    """Return every message type a site's installation holds, having imported all of it."""
    for package in (fedfuse_shared, fedfuse_client):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)

    def below(kind: type[Body]) -> Iterator[type[Body]]:
        for each in kind.__subclasses__():
            if each.__module__.startswith("fedfuse_"):
                yield each
                yield from below(each)

    return set(below(Body))


def inner_models(annotation: object) -> Iterator[type[BaseModel]]:
    """Return the models inside a type: of tuples, dictionaries, unions, and envelopes."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        generic = annotation.__pydantic_generic_metadata__
        yield generic["origin"] or annotation
        for argument in generic["args"]:
            yield from inner_models(argument)
    for argument in typing.get_args(annotation):
        yield from inner_models(argument)


def fields_of(kind: type) -> dict[str, object]:
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return dict(typing.get_type_hints(kind))


def test_every_message_type_is_classified():
    sent = {kind for kind in SITE_SENDS if issubclass(kind, Body)}
    assert every_body() == sent | OTHERS_SEND | ABSTRACT
    assert not sent & OTHERS_SEND
    assert {kind.kind for kind in sent}.isdisjoint(kind.kind for kind in OTHERS_SEND)
    assert not any("kind" in vars(kind) for kind in ABSTRACT)


@pytest.mark.parametrize("kind", SITE_SENDS, ids=lambda kind: kind.__name__)
def test_every_field_is_classified(kind):
    fields = fields_of(kind)
    assert fields.keys() == SITE_SENDS[kind].keys()
    for name, annotation in fields.items():
        inner = set(inner_models(annotation)) - {Body}
        assert inner <= SITE_SENDS.keys(), f"{name} holds values of a type that is not classified"
        assert not inner or SITE_SENDS[kind][name] is Source.PARTS
    # A roll says which participants a set has; only the server calls one.
    assert Roll not in SITE_SENDS


def test_what_travels_in_a_flower_message_is_the_parcel_and_nothing_more():
    full = Parcel("0" * 64, b"body", (b"leaf",), 1, b"vector", "problem")
    packed = pack(full)
    (small,) = packed.config_records.values()
    (arrays,) = packed.array_records.values()
    assert not packed.metric_records
    assert {*small, *arrays} == {field.name for field in dataclasses.fields(Parcel)}


# --- worlds ------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    classes=("cat", "dog"),
    encoders={
        Modality.TEXT: EncoderConfig(name="hashed-words", width=32),
        Modality.IMAGE: EncoderConfig(name="oriented-gradients"),
    },
    image=ImageInput(size=16),
)
INFO = """\
name = "animals"
task = "classification"
classes = ["cat", "dog"]
modalities = ["text", "image"]
record = "One animal: its picture and a line about it."
"""
RECORDS = 12
Row = list[str]


def split(number: int) -> str:
    """A third of the rows, the last one not among them, are evaluated in round 2."""
    return "test" if number % 3 == 2 else "train"


def rows(count: int) -> list[Row]:
    return [
        [f"r{n}", NAME, split(n), "dog" if n % 3 else "cat", f"animal number {n}", f"images/{n}.png", ""]
        for n in range(count)
    ]


def broken(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"images/{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more of it")


def relabelled(folder: Path, table: list[Row]) -> list[Row]:
    del folder
    return [[*row[:3], "cat" if row[3] == "dog" else "dog", *row[4:]] for row in table]


def spoilt(count: int) -> Callable[[Path, list[Row]], list[Row]]:
    def change(folder: Path, table: list[Row]) -> list[Row]:
        broken(folder, count)
        return table

    return change


WORLDS: dict[str, Callable[[Path, list[Row]], list[Row]]] = {
    "as it is": lambda _folder, table: table[:RECORDS],
    "one record more": lambda _folder, table: table[: RECORDS + 1],
    "one record less": lambda _folder, table: table[1:RECORDS],
    "one test record less": lambda _folder, table: [*table[:2], *table[3:RECORDS]],
    "no test records": lambda _folder, table: [row for row in table[:RECORDS] if row[2] == "train"],
    "a single record": lambda _folder, table: table[:1],
    "other labels": lambda folder, table: relabelled(folder, table[:RECORDS]),
    "other texts": lambda _folder, table: [
        [*row[:4], f"quite another {row[0]}", *row[5:]] for row in table[:RECORDS]
    ],
    "no images": lambda _folder, table: [[*row[:5], "", ""] for row in table[:RECORDS]],
    "a broken file": lambda folder, table: spoilt(1)(folder, table[:RECORDS]),
    "all files broken": lambda folder, table: spoilt(RECORDS)(folder, table[:RECORDS]),
    "training fails": lambda _folder, table: table[:RECORDS],
}


def write_world(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "dataset.toml").write_text(INFO)
    for number in range(RECORDS + 1):
        write_image(folder / f"images/{number}.png", seed=number)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "site", "split", "label", "text", "image", "audio"])
        table.writerows(WORLDS[name](folder, rows(RECORDS + 1)))
    return folder


def offer_of(number: int, **changes: object) -> tuple[Offer, bytes]:
    """Return an offer of a round and the weights it starts from."""
    weights, layout = flatten(build_model(MODEL, 0)), outline(MODEL)[0]
    privacy = {
        "trust": Trust.SITE,
        "sampling_rate": 0.5,
        "steps": 2,
        "clip": 1.0,
        "noise_multiplier": 1.5,
        "noise_share": 1.5,
        "noise_sites": 1,
        "expected_batch_size": 8,
        "delta": 1e-5,
    }
    offer = Federation((NAME, *PEERS)).offer(
        round=number,
        model=MODEL,
        layout=layout,
        model_hash=model_hash(weights, layout),
        privacy=RoundPrivacy(**{**privacy, **changes}),
        evaluation=Evaluation(every=1, detail=Detail.CONFUSION, noise=20.0, noise_share=20.0),
    )
    return offer, weights.astype("<f4").tobytes()


def play(root: Path, name: str) -> list[tuple[Step, Parcel]]:
    """Return all a site sends in two rounds, a refused offer between them, and what it says after a lost reply.

    Its keys, shares, nonces and identifiers come from one repeatable stream and noise from another, the same in every
    world. The noise's is apart because a training that fails takes a second key: fresh bytes look no different for
    that. Where the server notices a problem, what was said until then is returned.
    """
    around, said = Around(), []
    with pytest.MonkeyPatch.context() as patch:
        stream, keys = SeededBytes("stream"), SeededBytes("noise")
        patch.setattr("os.urandom", stream)
        patch.setattr("secrets.token_hex", lambda size: stream(size).hex())
        patch.setattr(NoiseSource, "fresh", lambda: NoiseSource(keys(16)))
        if name == "training fails":
            patch.setattr(RecordTensors, "usable", fails_on_records)
        data = write_world(root / "data", name)
        both = (Modality.TEXT, Modality.IMAGE)
        home = write_home(
            root / "site",
            around.federation,
            data,
            modalities=both,
            schedule=Schedule.FREE,
            min_evaluation_noise=10.0,
        )

        def ask(step: Step, parcel: Parcel) -> Parcel:
            site = Site(home, clock=lambda: 1e9)  # a fresh process, with nothing but the store
            try:
                answer = site.answer(step, parcel)
            finally:
                site.close()
            said.append((step, answer))
            return answer

        with suppress(ProtocolError):
            list(around.greet(ask))
            for number in (1, 2):
                offer, weights = offer_of(number)
                around.play(offer, ask, weights)
                refused = offer_of(number + 10, sampling_rate=0.9)[0]
                answer = ask(Step.KEYS, around.parcel(refused, around.signed(refused)))
                assert answer.problem
                around.leaves.extend(answer.leaves)
            ask(Step.SETTLE, Parcel(known=0))
    shutil.rmtree(root)
    return said


def fails_on_records(self: RecordTensors, indices: list[int]) -> list[int]:
    if len(self):
        raise MemoryError
    return []


# --- comparison --------------------------------------------------------------------------------------------------

BY_KIND = {kind.kind: kind for kind in SITE_SENDS if issubclass(kind, Body)}
FREE = {Source.MASKED, Source.OF_MASKED, Source.CHAINED, Source.SIGNATURE}
"""What may differ between worlds; its length may not."""
Seen = tuple[str, Source, object]


def flat(value: object, where: str) -> Iterator[Seen]:
    """Return every field that a value holds, with its class; what is in parts part by part."""
    owner = type(value)
    if isinstance(value, BaseModel):
        owner = owner.__pydantic_generic_metadata__["origin"] or owner
    for name, source in SITE_SENDS[owner].items():
        held, place = getattr(value, name), f"{where}.{name}"
        if source is not Source.PARTS:
            yield place, source, held
        elif isinstance(held, bytes | BaseModel):
            yield from parts((held,), place)
        else:
            yield from parts(held or (), place)


def parts(values: typing.Iterable[object], where: str) -> Iterator[Seen]:
    count = 0
    for value in values:
        count += 1
        if isinstance(value, bytes):
            if value:
                yield from flat(
                    decode(value, BY_KIND[kind_of(value)], who=NAME), f"{where}[{kind_of(value)}]"
                )
        else:
            yield from flat(value, where)
    yield f"{where}#", Source.PUBLIC, count


def length(value: object) -> object:
    return len(value) if isinstance(value, str | bytes) else type(value)


def differences(one: list[tuple[Step, Parcel]], other: list[tuple[Step, Parcel]]) -> list[str]:
    """Return which fields differ between two worlds that may not.

    A signature may differ only if something that was signed does: Ed25519 has no randomness to choose.
    """
    found = []
    for (step, first), (_, second) in zip(one, other, strict=False):
        pairs = list(zip(flat(first, step.value), flat(second, step.value), strict=False))
        for (place, source, here), (place_there, _, there) in pairs:
            same = length(here) == length(there) if source in FREE else here == there
            if place != place_there or not same:
                found.append(place)
                break
        for here, there in zip((first.body, *first.leaves), (second.body, *second.leaves), strict=False):
            if here != there and unsigned(here) == unsigned(there):
                found.append(f"{step.value}: another signature on the same")
    if [step for step, _ in one] != [step for step, _ in other]:
        found.append("other messages are answered")
    return found


def unsigned(raw: bytes) -> list[Seen]:
    return [field for field in parts((raw,), "") if field[1] is not Source.SIGNATURE]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Step, Parcel]]:
    return play(tmp_path_factory.mktemp("world") / "usual", "as it is")


def vectors(said: list[tuple[Step, Parcel]]) -> list[bytes]:
    return [answer.vector for _, answer in said if answer.vector]


def test_the_worlds_reach_every_message_and_every_class(usual):
    kinds = {kind_of(raw) for _, answer in usual for raw in (answer.body, *answer.leaves) if raw} | {
        messages.ShareNote.kind
    }
    # Outside rounds, and made of what a person types: no data set is open when they are written.
    assert kinds == set(BY_KIND) - {records.Leave.kind, enrolment.SiteRequest.kind}
    assert {source for step, answer in usual for _, source, _ in flat(answer, step.value)} == set(Source) - {
        N
    }
    assert [answer.problem for step, answer in usual if step is not Step.KEYS] == [""] * (len(usual) - 4)


def test_the_same_world_is_sent_in_the_same_bytes(usual, tmp_path):
    """Nothing is left that is drawn from elsewhere, or the comparison would see less than it says."""
    assert play(tmp_path / "again", "as it is") == usual


@pytest.mark.parametrize("name", [name for name in WORLDS if name != "as it is"])
def test_neighbouring_data_change_nothing_but_the_masked_vector(name, usual, tmp_path):
    said = play(tmp_path / "world", name)
    assert differences(usual, said) == []
    # And that does change, in a round that draws or evaluates what differs; vectors of one length are compared.
    assert any(one != other for one, other in zip(vectors(usual), vectors(said), strict=True))
    assert [len(each) for each in vectors(said)] == [len(each) for each in vectors(usual)]


@pytest.mark.parametrize(
    ("name", "seen", "defect"),
    [
        (
            "one record more",
            "train.update.leaves[receipt].body.steps",
            Weakening(
                "fedfuse_client.round",
                "steps=offer.privacy.steps,",
                "steps=len(self._learner._load()[1]),",
            ),
        ),
        (
            "one record more",
            "train.update.leaves[reservation].body.dataset",
            Weakening(
                "fedfuse_client.datasets",
                "secrets.token_hex(32)",
                "__import__('hashlib').sha256(b''.join(d for (d,) in database.rows("
                "'SELECT digest FROM incoming ORDER BY digest'))).hexdigest()",
            ),
        ),
        (
            "training fails",
            "other messages are answered",
            Weakening(
                "fedfuse_client.learner",
                "self._tensors = None\n            update",
                "raise\n            update",
            ),
        ),
        (
            "a single record",
            "train.update.vector",
            Weakening(
                "fedfuse_client.round",
                'return b"", vector\n\n    # --- the store',
                'return b"", vector[: 100 + len(self._learner._load()[1])]\n\n    # --- the store',
            ),
        ),
    ],
    ids=[
        "record count in a receipt",
        "fingerprint of the data",
        "failure that is told",
        "length of the vector",
    ],
)
def test_mutant_something_of_the_records_is_told(name, seen, defect, tmp_path, monkeypatch):
    weaken(monkeypatch, [defect])
    worlds = [play(tmp_path / each.replace(" ", "-"), each) for each in ("as it is", name)]
    assert seen in differences(*worlds)
