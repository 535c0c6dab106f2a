"""A federation with real keys, and the protocol core driven through one round without I/O."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import TrainingConfig
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.crypto.keys import identity_public
from fedfuse_shared.envelope import seal
from fedfuse_shared.ledger.records import FIRST_LINK, Receipt
from fedfuse_shared.offer import Offer, RoundPrivacy, Segment
from fedfuse_shared.roster import Roster
from fedfuse_shared.secagg.bounds import Bounds, choose
from fedfuse_shared.secagg.quantise import quantise
from fedfuse_shared.secagg.ring import largest_scale
from fedfuse_shared.secagg.server import ServerSession
from fedfuse_shared.secagg.site import Identity, SiteSession, SiteState


class SeededBytes:
    """Repeatable "random" bytes, so that two runs of a protocol can be compared; tests only."""

    def __init__(self, seed: str) -> None:
        self._seed = seed.encode()
        self._count = 0

    def __call__(self, size: int) -> bytes:
        out = b""
        while len(out) < size:
            self._count += 1
            out += hashlib.sha256(self._seed + self._count.to_bytes(8, "big")).digest()
        return out[:size]


LAYOUT = (
    Segment(name="text", size=70, modality=Modality.TEXT),
    Segment(name="image", size=90, modality=Modality.IMAGE),
    Segment(name="head", size=40),
)
ALL = frozenset({Modality.TEXT, Modality.IMAGE})


@dataclass
class Federation:
    """Keys and roster of n sites, and offers among them."""

    names: tuple[str, ...]
    seed: str = "federation"
    officers: bool = False
    """Whether the roster names a coordinator, ada, and an auditor, eve."""
    coordinator: Ed25519PrivateKey = field(init=False)
    auditor: Ed25519PrivateKey = field(init=False)
    keys: dict[str, Ed25519PrivateKey] = field(init=False)
    server: Ed25519PrivateKey = field(init=False)
    operator: Ed25519PrivateKey = field(init=False)
    roster: Roster = field(init=False)

    def __post_init__(self) -> None:
        draw = SeededBytes(self.seed)
        self.keys = {name: Ed25519PrivateKey.from_private_bytes(draw(32)) for name in self.names}
        self.server = Ed25519PrivateKey.from_private_bytes(draw(32))
        self.operator = Ed25519PrivateKey.from_private_bytes(draw(32))
        self.coordinator = Ed25519PrivateKey.from_private_bytes(draw(32))
        self.auditor = Ed25519PrivateKey.from_private_bytes(draw(32))
        named = {"ada": self.coordinator}, {"eve": self.auditor}
        coordinators, auditors = (
            {name: identity_public(key) for name, key in group.items()} if self.officers else {}
            for group in named
        )
        self.roster = Roster(
            federation="lab",
            operator=identity_public(self.operator),
            server=identity_public(self.server),
            sites={name: identity_public(key) for name, key in self.keys.items()},
            coordinators=coordinators,
            auditors=auditors,
        )

    @classmethod
    def of(cls, size: int) -> Federation:
        return cls(tuple(f"site{number:02}" for number in range(size)))

    @classmethod
    def with_officers(cls, size: int, seed: str = "federation") -> Federation:
        return cls(tuple(f"site{number:02}" for number in range(size)), seed, officers=True)

    def offer(self, **changes: object) -> Offer:
        participants = changes.pop("participants", self.names)
        bounds = changes.pop("bounds", {})
        if not isinstance(bounds, Bounds):
            bounds = choose(len(participants), **bounds)
        ring_bits = changes.pop("ring_bits", 32)
        values = {
            "federation": "lab",
            "run": "run1",
            "round": 1,
            "attempt": 1,
            "roster_hash": self.roster.hash(),
            "model_hash": "2" * 64,
            "model": ModelConfig(
                classes=("a", "b"), encoders={Modality.TEXT: EncoderConfig(name="hashed-words")}
            ),
            "training": TrainingConfig(),
            "layout": LAYOUT,
            "participants": tuple(participants),
            "neighbours": bounds.neighbours,
            "threshold": bounds.threshold,
            "colluders": bounds.colluders,
            "min_survivors": bounds.min_survivors,
            "lifetime": 3600,
            "ring_bits": ring_bits,
            "scale": largest_scale(len(participants), 4.0, ring_bits),
            "clip_range": 4.0,
            "privacy": RoundPrivacy(
                trust=Trust.SITE,
                sampling_rate=0.25,
                steps=1,
                clip=1.0,
                noise_multiplier=1.5,
                noise_share=1.5,
                noise_sites=1,
                expected_batch_size=128,
                delta=1e-5,
            ),
        }
        return Offer(**{**values, **changes})

    def identity(self, name: str) -> Identity:
        return Identity(name, self.keys[name], self.roster)


@dataclass
class Round:
    """One attempt: a server session and one session per participant, each over its own seeded randomness."""

    federation: Federation
    offer: Offer
    seed: str = "round"
    server: ServerSession = field(init=False)
    sites: dict[str, SiteSession] = field(init=False)
    view: list[bytes] = field(default_factory=list)
    """Every byte the server received, in order."""

    def __post_init__(self) -> None:
        self.server = ServerSession(
            self.offer, self.federation.roster, self.federation.server, SeededBytes(self.seed + "server")
        )
        self.sites = {name: self.session(name) for name in self.offer.participants}

    def session(self, name: str, state: SiteState | None = None) -> SiteSession:
        return SiteSession(self.offer, self.federation.identity(name), SeededBytes(self.seed + name), state)

    def restart(self, name: str) -> None:
        """As a fresh process at the site: only the dumped state survives."""
        self.sites[name] = self.session(name, SiteState.load(self.sites[name].state.dump()))

    # Each step takes the sites that answer; the others have dropped out.
    def keys(self, names: list[str]) -> dict[str, bytes]:
        for name in names:
            self.server.receive_keys(name, self._seen(self.sites[name].advertise()))
        return self.server.key_lists()

    def shares(self, names: list[str], key_lists: dict[str, bytes]) -> dict[str, bytes]:
        for name in names:
            self.server.receive_dealing(name, self._seen(self.sites[name].deal(key_lists[name])))
        return self.server.deliveries()

    def send(self, name: str, words: np.ndarray, delivery: bytes) -> bytes:
        self.sites[name].accept_delivery(delivery)
        masked, vector_hash = self.sites[name].mask(words.copy())
        self._seen(masked)
        self.server.receive_vector(name, self.receipt(name, vector_hash), masked)
        return masked

    def receipt(self, name: str, vector_hash: str):
        body = Receipt(seq=2, prev=FIRST_LINK, context=self.offer.context(), steps=1, vector_hash=vector_hash)
        return seal(body, name, self.federation.keys[name])

    def agree(self, names: list[str]) -> dict[str, bytes]:
        survivors = self.server.survivors()
        for name in names:
            self.server.receive_agreement(name, self._seen(self.sites[name].agree(survivors[name])))
        return self.server.unmasking()

    def unmask(self, names: list[str], unmasking: dict[str, bytes]) -> np.ndarray:
        for name in names:
            self.server.receive_reveal(name, self._seen(self.sites[name].reveal(unmasking[name])))
        return self.server.open()

    def words(self, update: np.ndarray, declared: frozenset[Modality] = ALL) -> np.ndarray:
        counts = np.zeros(self.offer.counts, dtype=np.int64)
        return quantise(update.astype(np.float32), declared, self.offer, counts)

    def _seen(self, raw: bytes) -> bytes:
        self.view.append(raw)
        return raw


def run_round(
    sequence: Round,
    inputs: dict[str, np.ndarray],
    *,
    dealers: list[str] | None = None,
    senders: list[str] | None = None,
    agreers: list[str] | None = None,
    revealers: list[str] | None = None,
) -> np.ndarray:
    """Drive a round of given words to its opened sum; whoever is not listed drops out in that exchange."""
    everyone = list(inputs)
    key_lists = sequence.keys(everyone)
    deliveries = sequence.shares(everyone if dealers is None else dealers, key_lists)
    sending = list(deliveries) if senders is None else senders
    for name in sending:
        sequence.send(name, inputs[name], deliveries[name])
    agreeing = sending if agreers is None else agreers
    unmasking = sequence.agree(agreeing)
    return sequence.unmask(agreeing if revealers is None else revealers, unmasking)
