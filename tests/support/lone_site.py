"""One real site, as `fedfuse_client.round.Site` answers, and around it a server and two more sites of the core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedfuse_client.home import SiteHome
from fedfuse_client.policy import SitePolicy
from fedfuse_client.store import SiteStore
from fedfuse_shared.config.base import OPERATOR, SERVER, Modality, Trust
from fedfuse_shared.config.files import save_toml
from fedfuse_shared.crypto.keystream import Words
from fedfuse_shared.envelope import decode, encode, seal
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.ledger.records import Receipt
from fedfuse_shared.messages import Hello, Step
from fedfuse_shared.offer import Offer
from fedfuse_shared.parcel import Parcel
from support.federation import Federation, Round

NAME = "lyon"
"""The real site."""
PEERS = ("oslo", "porto")
Ask = Callable[[Step, Parcel], Parcel]
"""How a message reaches the real site and its answer comes back."""


def write_home(root: Path, federation: Federation, data: Path, **changes: object) -> SiteHome:
    """Write the folder of the real site: policy, key, roster and an empty store."""
    root.mkdir(parents=True)
    home = SiteHome(root)
    values = {
        "site": NAME,
        "federation": federation.roster.federation,
        "roster_hash": federation.roster.hash(),
        "data": data.absolute(),
        "modalities": (Modality.TEXT,),
        "epsilon_cap": 100.0,
        "delta": 1e-5,
        "min_participants": 3,
        "min_survivors": 3,
        "min_threshold": 2,
        "min_colluders": 0,
        "trust": (Trust.SITE,),
        "min_noise_multiplier": 1.0,
        "max_sampling_rate": 0.5,
        "max_steps_per_round": 10,
        "max_clip": 1.0,
    }
    save_toml(home.policy, SitePolicy(**{**values, **changes}))
    key = federation.keys[NAME].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    home.key.touch(mode=0o600)
    home.key.write_bytes(key)
    home.roster.write_bytes(encode(seal(federation.roster, OPERATOR, federation.operator)))
    SiteStore.open(home.store, create=True).close()
    return home


@dataclass
class Around:
    """Everybody else: a server that keeps the site's leaves, and two peers that send updates of zeros."""

    federation: Federation = field(default_factory=lambda: Federation((NAME, *PEERS)))
    leaves: list[bytes] = field(default_factory=list)
    """The site's leaves on the ledger."""

    def greet(self, ask: Ask) -> Iterator[Parcel]:
        """Play what comes before the first round, answer by answer."""
        hello = Hello(federation=self.federation.roster.federation, run="run1", nonce="7" * 64)
        yield self._said(ask(Step.HELLO, Parcel(body=encode(seal(hello, SERVER, self.federation.server)))))
        yield self._said(ask(Step.SETTLE, Parcel(known=len(self.leaves))))

    def play(self, offer: Offer, ask: Ask, weights: bytes = b"") -> Words:
        """Play one round to its opened sum.

        Raises:
            ProtocolError: the site has a problem.
        """
        sequence = Round(self.federation, offer, seed=f"{offer.round}.{offer.attempt}")
        server, peers = sequence.server, {name: sequence.sites[name] for name in PEERS}

        def asked(step: Step, body: bytes, vector: bytes = b"") -> Parcel:
            return self._said(ask(step, self.parcel(offer, body, vector)))

        server.receive_keys(NAME, asked(Step.KEYS, self.signed(offer)).body)
        for name, peer in peers.items():
            server.receive_keys(name, peer.advertise())
        lists = server.key_lists()
        server.receive_dealing(NAME, asked(Step.SHARES, lists[NAME]).body)
        for name, peer in peers.items():
            server.receive_dealing(name, peer.deal(lists[name]))
        deliveries = server.deliveries()
        sent = asked(Step.UPDATE, deliveries[NAME], weights)
        server.receive_vector(NAME, decode(self.leaves[-1], Receipt, who=NAME), sent.vector)
        for name in PEERS:
            sequence.send(name, sequence.words(np.zeros(offer.dimension())), deliveries[name])
        survivors = server.survivors()
        server.receive_agreement(NAME, asked(Step.AGREE, survivors[NAME]).body)
        for name, peer in peers.items():
            server.receive_agreement(name, peer.agree(survivors[name]))
        unmasking = server.unmasking()
        server.receive_reveal(NAME, asked(Step.UNMASK, unmasking[NAME]).body)
        for name, peer in peers.items():
            server.receive_reveal(name, peer.reveal(unmasking[name]))
        return server.open()

    def signed(self, offer: Offer) -> bytes:
        """Return an offer as the server sends it."""
        return encode(seal(offer, SERVER, self.federation.server))

    def parcel(self, offer: Offer, body: bytes, vector: bytes = b"") -> Parcel:
        """Return a message of a round, with the site's last leaf as an honest server shows it."""
        return Parcel(offer.context(), body, tuple(self.leaves[-1:]), len(self.leaves), vector)

    def _said(self, answer: Parcel) -> Parcel:
        self.leaves.extend(answer.leaves)
        if answer.problem:
            raise ProtocolError(answer.problem, who=NAME)
        return answer
