"""Ledgers with real keys and signatures, built leaf by leaf as an honest server and honest sites write them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from fedfuse_shared.commands import Action, Command, CommandRefusal, hash_of
from fedfuse_shared.config.base import OPERATOR, SERVER, Trust
from fedfuse_shared.config.federation import GraphKind
from fedfuse_shared.envelope import Body, Envelope, encode, seal
from fedfuse_shared.ledger.checkpoint import Head, origin_of
from fedfuse_shared.ledger.merkle import Tree
from fedfuse_shared.ledger.records import (
    FIRST_LINK,
    Charge,
    Close,
    Leave,
    Outcome,
    Policy,
    Receipt,
    Refusal,
    Reservation,
    SiteLeaf,
    link,
)
from fedfuse_shared.ledger.verification import verify_ledger
from fedfuse_shared.ledger.verification_report import Report
from fedfuse_shared.messages import Agreement
from fedfuse_shared.offer import Offer
from fedfuse_shared.secagg import transcript
from support.federation import Federation


def digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


class LedgerBuilder:
    """Writes leaves; ``changes`` of any method override what an honest author would have stated."""

    def __init__(self, federation: Federation | None = None, *, cap: float = 50.0) -> None:
        self.federation = federation or Federation.of(4)
        self.cap = cap
        self.leaves: list[Envelope[Any]] = []
        self.chains = dict.fromkeys(self.federation.names, (0, FIRST_LINK))
        self.model_hash = digest("model", 0)
        self.round_number = 0
        self.commands_given = 0

    # --- leaves ---------------------------------------------------------------------------------------------
    def enrol(self) -> LedgerBuilder:
        self._write(self.federation.roster, OPERATOR, self.federation.operator)
        for site in self.federation.names:
            self.policy(site)
        return self

    def policy(self, site: str, **changes: Any) -> Envelope[Any]:
        values = {
            "policy_hash": digest("policy", site),
            "roster_hash": self.federation.roster.hash(),
            "epsilon_cap": self.cap,
            "delta": 1e-5,
            "adjacency": "add-or-remove-one-record",
            "min_participants": 3,
            "min_survivors": 3,
            "min_threshold": 2,
            "min_colluders": 0,
            "trust": (Trust.SITE, Trust.AGGREGATE),
            "min_noise_multiplier": 1.0,
            "max_sampling_rate": 0.5,
            "max_steps_per_round": 4,
            "max_clip": 1.0,
            "graphs": (GraphKind.COMPLETE,),
        }
        return self._chained(site, Policy, values, changes)

    def offer(self, *, attempt: int = 1, **changes: Any) -> Offer:
        if attempt == 1:
            self.round_number += 1
        values = {"round": self.round_number, "attempt": attempt, "model_hash": self.model_hash}
        offer = self.federation.offer(**{**values, **changes})
        self._write(offer, SERVER, self.federation.server)
        return offer

    def reserve(self, site: str, offer: Offer, **changes: Any) -> Envelope[Any]:
        asked = offer.privacy
        values = {
            "context": offer.context(),
            "dataset": digest("data", site),
            "trust": asked.trust,
            "adjacency": asked.adjacency,
            "charge": Charge(
                sampling_rate=asked.sampling_rate,
                noise_multiplier=asked.noise_multiplier,
                steps=asked.steps,
            ),
            "noise_share": asked.noise_share,
            "noise_sites": asked.noise_sites,
            "colluders": offer.colluders,
            "clip": asked.clip,
            "delta": asked.delta,
        }
        return self._chained(site, Reservation, values, changes)

    def receipt(self, site: str, offer: Offer, **changes: Any) -> Envelope[Any]:
        values = {
            "context": offer.context(),
            "steps": offer.privacy.steps,
            "vector_hash": self.vector(site, offer),
        }
        return self._chained(site, Receipt, values, changes)

    def refuse(self, site: str, offer: Offer) -> Envelope[Any]:
        return self._chained(site, Refusal, {"context": offer.context(), "reason": "disk is full"}, {})

    def leave(self, site: str) -> Envelope[Any]:
        return self._chained(site, Leave, {"reason": "our grant ends"}, {})

    def command(self, *, key: Any = None, author: str = "@coordinator/ada", **changes: Any) -> Envelope[Any]:
        """A coordinator's command; to run the plan of every offer if nothing else is said."""
        self.commands_given += 1
        values = {
            "federation": "lab",
            "roster_hash": self.federation.roster.hash(),
            "action": Action.RUN,
            "plan_hash": self.federation.offer().plan_hash,
            "site": None,
            "reason": "as agreed",
            "nonce": digest("nonce", self.commands_given),
        }
        return self._write(Command(**{**values, **changes}), author, key or self.federation.coordinator)

    def revoke(self, site: str) -> Envelope[Any]:
        return self.command(action=Action.REVOKE, plan_hash=None, site=site)

    def refuse_command(self, command: Envelope[Any]) -> Envelope[Any]:
        body = CommandRefusal(
            command=hash_of(command), author=command.author, action=command.body.action, reason="not the role"
        )
        return self._write(body, SERVER, self.federation.server)

    def close(
        self, offer: Offer, sites: Sequence[str], *, agreers: Sequence[str] | None = None, **changes: Any
    ) -> Envelope[Any]:
        context = offer.context()
        values = {
            "context": context,
            "outcome": Outcome.OPENED,
            "reason": "",
            "keys_hash": digest("keys", context),
            "dealings_hash": digest("dealings", context),
            "survivors": {site: self.vector(site, offer) for site in sites},
            "model_hash": digest("model", offer.run, offer.round, offer.attempt),
        }
        values |= changes
        said = Agreement(
            context=context,
            keys_hash=values["keys_hash"] or digest("none"),
            dealings_hash=values["dealings_hash"] or digest("none"),
            survivors_hash=transcript.roll_hash(
                context,
                "vectors",
                transcript.roll(
                    offer.participants,
                    values["survivors"],
                    transcript.vectors_items(context, values["survivors"]),
                ),
            ),
        )
        signers = sites if agreers is None else agreers
        values.setdefault(
            "agreements", {site: seal(said, site, self.federation.keys[site]).sig for site in signers}
        )
        if values["model_hash"] is not None:
            self.model_hash = values["model_hash"]
        return self._write(Close(**values), SERVER, self.federation.server)

    def abort(self, offer: Offer, **changes: Any) -> Envelope[Any]:
        values = {
            "context": offer.context(),
            "outcome": Outcome.ABORTED,
            "reason": "too few sites were left",
            "keys_hash": None,
            "dealings_hash": None,
            "survivors": {},
            "agreements": {},
            "model_hash": None,
        }
        return self._write(Close(**{**values, **changes}), SERVER, self.federation.server)

    def round(self, **changes: Any) -> Offer:
        """A whole round in which nobody drops out."""
        offer = self.offer(**changes)
        for site in offer.participants:
            self.reserve(site, offer)
            self.receipt(site, offer)
        self.close(offer, offer.participants)
        return offer

    # --- what became of it ----------------------------------------------------------------------------------
    def lines(self) -> list[bytes]:
        return [encode(leaf) for leaf in self.leaves]

    def audit(self) -> Report:
        """Audit it under a checkpoint that is true of it."""
        lines = self.lines()
        return verify_ledger(lines, self.federation.roster, head_of(lines))

    def find(self, body_type: type[Body], site: str | None = None) -> list[int]:
        """Indices of all leaves of a kind."""
        return [
            index
            for index, leaf in enumerate(self.leaves)
            if isinstance(leaf.body, body_type) and site in {None, leaf.author}
        ]

    def vector(self, site: str, offer: Offer) -> str:
        return digest("vector", site, offer.context())

    def _write(self, body: Body, author: str, key: Any) -> Envelope[Any]:
        self.leaves.append(seal(body, author, key))
        return self.leaves[-1]

    def _chained(self, site: str, body_type: type[SiteLeaf], values: dict, changes: dict) -> Envelope[Any]:
        seq, last = self.chains[site]
        body = body_type(**{"seq": seq + 1, "prev": last, **values, **changes})
        envelope = self._write(body, site, self.federation.keys[site])
        self.chains[site] = (body.seq, link(envelope))
        return envelope


def head_of(lines: Sequence[bytes], federation: str = "lab") -> Head:
    """What an honest server signs."""
    tree = Tree()
    for line in lines:
        tree.append(line)
    return Head(origin_of(federation), tree.size, tree.root())


def codes(report: Report) -> set[str]:
    return {finding.code.value for finding in report.findings}
