"""One attempt at one round: five exchanges, each site's answer checked before it counts.

A site whose answer fails in any way is left out of the rest of the attempt; the attempt goes on while the
offer's bounds allow (``ServerSession`` raises RoundAborted where they do not).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_server.books import Books
from fedfuse_server.events import ExchangeEnded, SiteLeftOut, tell
from fedfuse_server.exchange import Exchange
from fedfuse_shared.envelope import Envelope, encode
from fedfuse_shared.errors import ProtocolError, VerificationError
from fedfuse_shared.ledger.records import Receipt, Refusal
from fedfuse_shared.messages import Step
from fedfuse_shared.offer import Offer
from fedfuse_shared.parcel import Parcel
from fedfuse_shared.roster import Roster
from fedfuse_shared.secagg.server import ServerSession

log = logging.getLogger(__name__)

Receive = Callable[[str, Parcel], None]


@dataclass
class Attempt:
    """The exchanges of one attempt.

    Attributes:
        exchange: How sites are asked.
        books: The ledger; every leaf a site sends is checked and appended before its message counts.
        nodes: Flower's node of each site.
        envelope: The signed offer, already on the ledger.
        roster: Everybody's keys.
        key: The server's signing key.
        refused: Sites that refused the offer.
    """

    exchange: Exchange
    books: Books
    nodes: Mapping[str, int]
    envelope: Envelope[Offer]
    roster: Roster
    key: Ed25519PrivateKey
    refused: set[str] = field(default_factory=set)
    _receipts: dict[str, Envelope[Receipt]] = field(default_factory=dict)

    def run(self, weights: bytes) -> ServerSession:
        """Return the session, ready to be opened, after all exchanges.

        Args:
            weights: The global weights as little-endian float32, ``4 d`` bytes.

        Raises:
            RoundAborted: too few sites were left in some step.
        """
        offer = self.envelope.body
        session = ServerSession(offer, self.roster, self.key, os.urandom)
        raw_offer = encode(self.envelope)
        offered = dict.fromkeys(offer.participants, Parcel(body=raw_offer))
        self._collect(Step.KEYS, offered, lambda s, p: session.receive_keys(s, p.body))
        self._collect(
            Step.SHARES, _parcels(session.key_lists()), lambda s, p: session.receive_dealing(s, p.body)
        )
        to_train = _parcels(session.deliveries(), vector=weights)
        self._collect(Step.UPDATE, to_train, lambda s, p: self._take_vector(session, s, p))
        self._collect(
            Step.AGREE, _parcels(session.survivors()), lambda s, p: session.receive_agreement(s, p.body)
        )
        self._collect(
            Step.UNMASK, _parcels(session.unmasking()), lambda s, p: session.receive_reveal(s, p.body)
        )
        return session

    def _take_vector(self, session: ServerSession, site: str, parcel: Parcel) -> None:
        receipt = self._receipts.get(site)
        if receipt is None:
            raise ProtocolError("sent a vector without a receipt", who=site)
        session.receive_vector(site, receipt, parcel.vector)

    def _collect(self, step: Step, parcels: Mapping[str, Parcel], receive: Receive) -> None:
        """Ask one step's question and take every answer that counts."""
        offer = self.envelope.body
        context = offer.context()
        names = {self.nodes[site]: site for site in parcels}
        asked = {}
        for node, site in names.items():
            # Each site is shown its own last leaf, so that one restored from an old backup notices.
            sequence, head = self.books.head(site)
            asked[node] = replace(parcels[site], context=context, known=sequence, leaves=(head,))
        for node, answer in self.exchange.ask(step, asked, f"{offer.round}.{offer.attempt}").items():
            site = names[node]
            try:
                if isinstance(answer, ProtocolError):
                    raise answer
                self._take_leaves(site, answer, context)
                if answer.problem:
                    raise ProtocolError(answer.problem, who=site)
                receive(site, answer)
            except (ProtocolError, VerificationError) as problem:
                log.info("round %s: %s is left out of %s: %s", offer.round, site, step.value, problem)
                tell(SiteLeftOut(offer.round, site, step.value, problem.message))
        tell(ExchangeEnded(offer.round, offer.attempt, step.value, len(asked)))

    def _take_leaves(self, site: str, parcel: Parcel, context: str) -> None:
        for leaf in self.books.take(site, parcel.leaves):
            body = leaf.body
            if isinstance(body, Receipt) and body.context == context:
                self._receipts[site] = cast("Envelope[Receipt]", leaf)
            elif isinstance(body, Refusal) and body.context == context:
                self.refused.add(site)
        if site in self.books.out:
            raise ProtocolError("has left the federation", who=site)


def _parcels(bodies: Mapping[str, bytes], vector: bytes = b"") -> dict[str, Parcel]:
    return {site: Parcel(body=body, vector=vector) for site, body in bodies.items()}
