"""Known answers of the wire format: every byte of a round, fixed once and for all.

``round.json`` holds a whole round of four sites, one of which sends no vector: the keys it is made of, every message
in order, the masked vectors and the opened sum. Another implementation can be held against it; this one can no longer
change the format without somebody noticing. Written anew, where a change is meant, by

    python tests/vectors/test_wire.py
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from support.federation import Federation, Round

from fedfuse_shared.commands import Action, Command, CommandRefusal, hash_of
from fedfuse_shared.config.base import COORDINATOR, OPERATOR, SERVER
from fedfuse_shared.envelope import decode, encode, seal, verify
from fedfuse_shared.ledger.records import LEAF_TYPES, Leave
from fedfuse_shared.messages import (
    Agreement,
    Dealing,
    Delivery,
    KeyList,
    Reveal,
    RoundKeys,
    Survivors,
    Unmasking,
)
from fedfuse_shared.parcel import Parcel, pack, unpack

PATH = Path(__file__).with_name("round.json")
TYPES = {
    each.kind: each
    for each in (RoundKeys, KeyList, Dealing, Delivery, Survivors, Agreement, Unmasking, Reveal)
} | LEAF_TYPES


def record() -> dict[str, Any]:
    """Play the round and return every byte of it."""
    federation = Federation.with_officers(4)
    names = list(federation.names)
    sending = names[:3]
    offer = federation.offer(bounds={"threshold": 3, "colluders": 0, "min_survivors": 3})
    play = Round(federation, offer)
    messages: list[list[str]] = []

    def note(sender: str, receiver: str, raw: bytes) -> bytes:
        messages.append([sender, receiver, raw.decode()])
        return raw

    note(SERVER, "*", encode(seal(offer, SERVER, federation.server)))
    for name in names:
        play.server.receive_keys(name, note(name, SERVER, play.sites[name].advertise()))
    for name, raw in play.server.key_lists().items():
        dealing = play.sites[name].deal(note(SERVER, name, raw))
        play.server.receive_dealing(name, note(name, SERVER, dealing))
    numbers = np.random.default_rng(7)
    vectors = {}
    deliveries = play.server.deliveries()
    for name in names:
        play.sites[name].accept_delivery(note(SERVER, name, deliveries[name]))
    for name in sending:
        words = play.words(numbers.normal(0, 0.1, offer.dimension()))
        masked, vector_hash = play.sites[name].mask(words.copy())
        receipt = play.receipt(name, vector_hash)
        note(name, SERVER, encode(receipt))
        play.server.receive_vector(name, receipt, masked)
        vectors[name] = {"words": words.astype("<u4").tobytes().hex(), "masked": masked.hex()}
    for name, raw in play.server.survivors().items():
        play.server.receive_agreement(
            name, note(name, SERVER, play.sites[name].agree(note(SERVER, name, raw)))
        )
    for name, raw in play.server.unmasking().items():
        play.server.receive_reveal(name, note(name, SERVER, play.sites[name].reveal(note(SERVER, name, raw))))
    opened = play.server.open()
    return {
        "keys": {
            name: key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()
            for name, key in {
                **federation.keys,
                SERVER: federation.server,
                OPERATOR: federation.operator,
            }.items()
        },
        "roster": encode(seal(federation.roster, OPERATOR, federation.operator)).decode(),
        "context": offer.context(),
        "plan_hash": offer.plan_hash,
        "messages": messages,
        "vectors": vectors,
        "opened": np.asarray(opened).astype("<u4").tobytes().hex(),
        "leaves": [raw.decode() for raw in _leaves(federation)],
        "parcel": _parcel_digest(),
    }


def _leaves(federation: Federation) -> list[bytes]:
    """Return a leaf of each kind that a round has none of."""
    command = Command(
        federation="lab",
        roster_hash=federation.roster.hash(),
        action=Action.REVOKE,
        plan_hash=None,
        site=federation.names[0],
        reason="its disk was stolen",
        nonce="5" * 64,
    )
    sealed = seal(command, COORDINATOR + "ada", federation.coordinator)
    refusal = CommandRefusal(
        command=hash_of(sealed), author="@auditor/eve", action="revoke", reason="has not the role"
    )
    leave = Leave(seq=1, prev="0" * 64, reason="the study is over")
    name = federation.names[1]
    return [
        encode(sealed),
        encode(seal(refusal, SERVER, federation.server)),
        encode(seal(leave, name, federation.keys[name])),
    ]


def _parcel_digest() -> str:
    """Return the hash of a message's records as Flower deflates them."""
    parcel = Parcel("a" * 64, b"body", (b"leaf",), 3, bytes(range(256)), "a problem")
    assert unpack(pack(parcel), who="test") == parcel
    return hashlib.sha256(pack(parcel).deflate()).hexdigest()


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return json.loads(PATH.read_text())


@pytest.mark.parametrize(
    "part", ["keys", "roster", "context", "plan_hash", "messages", "vectors", "opened", "leaves", "parcel"]
)
def test_the_same_keys_and_seeds_give_the_same_bytes(known, part):
    assert record()[part] == known[part]


def test_every_known_message_decodes_to_the_same_bytes_and_its_signature_holds(known):
    federation = Federation.with_officers(4)
    raws = [(sender, raw) for sender, _, raw in known["messages"]] + [
        (json.loads(raw)["author"], raw) for raw in [known["roster"], *known["leaves"]]
    ]
    for author, raw in raws:
        envelope = decode(raw.encode(), TYPES[json.loads(raw)["kind"]], who=author)
        assert encode(envelope) == raw.encode()
        assert envelope.author == author
        verify(envelope, federation.roster.key_of(author))


def test_the_opened_sum_is_the_sum_of_the_words(known):
    words = [np.frombuffer(bytes.fromhex(each["words"]), "<u4") for each in known["vectors"].values()]
    assert np.add.reduce(words, dtype="<u4").tobytes() == bytes.fromhex(known["opened"])
    assert len(words) == 3


if __name__ == "__main__":
    PATH.write_text(json.dumps(record(), indent=1) + "\n")
