"""The leaves of the ledger; each is the signed envelope of one of these bodies.

Enrolment is ``fedfuse_shared.roster.Roster`` and an offer is ``fedfuse_shared.offer.Offer``: what is logged is
what was sent, byte for byte. Leaves that a site writes form a chain: ``seq`` counts from 1 without gaps and
``prev`` is the link hash of the leaf before, so that a lost, second or reordered leaf shows.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fedfuse_shared import limits
from fedfuse_shared.commands import Command, CommandRefusal
from fedfuse_shared.config.base import Frozen, Hex32, Hex64, ShortText, SiteName, Trust
from fedfuse_shared.config.federation import GraphKind
from fedfuse_shared.config.privacy import Delta, Positive, SamplingRate, Schedule
from fedfuse_shared.envelope import Body, Envelope, GrownBody, encode
from fedfuse_shared.offer import Adjacency, Offer, SiteCount
from fedfuse_shared.roster import Roster

FIRST_LINK = "0" * 64
"""``prev`` of a site's first leaf."""

Sequence = Annotated[int, Field(ge=1, le=2**53 - 1)]
Steps = Annotated[int, Field(ge=0, le=10**9)]
Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]


def link(envelope: Envelope[Any]) -> str:
    """Return the hash by which the next leaf of the same site refers to this one (SHA-256, hexadecimal)."""
    return link_of(encode(envelope))


def link_of(raw: bytes) -> str:
    """Return the same hash of a leaf's canonical bytes."""
    return hashlib.sha256(limits.LABEL_LEAF_LINK + raw).hexdigest()


class SiteLeaf(GrownBody):
    """What every leaf of a site's chain has; the site is the envelope's author."""

    added: ClassVar[frozenset[str]] = frozenset()

    seq: Sequence
    prev: Hex32


class Charge(Frozen):
    """Steps of one Poisson-sampled Gaussian mechanism."""

    sampling_rate: SamplingRate
    noise_multiplier: Positive
    steps: Annotated[int, Field(ge=1, le=10**9)]


def gaussian(noise_multiplier: float) -> Charge:
    """Return one release of a Gaussian mechanism over all records."""
    return Charge(sampling_rate=1.0, noise_multiplier=noise_multiplier, steps=1)


class EvaluationCharge(Frozen):
    """One release of noised counts, to exactly one of which every record adds one.

    Shifted by an integer, a discrete Gaussian of deviation sigma has the Renyi divergence of the continuous one
    (Canonne, Kamath and Steinke 2020, theorem 4), so it is charged as that, by Renyi accounting.
    """

    noise: Positive
    noise_share: Positive

    @property
    def charge(self) -> Charge:
        """The Gaussian mechanism it is charged as, of sensitivity 1."""
        return gaussian(self.noise)


class Policy(SiteLeaf):
    """What a site allows, in its own words; an offer outside it is refused before any data is read."""

    kind: ClassVar[str] = "policy"
    added: ClassVar[frozenset[str]] = frozenset(
        {"graphs", "schedule", "min_evaluation_noise", "max_epsilon_all_collude"}
    )

    policy_hash: Hex32
    roster_hash: Hex32
    epsilon_cap: Positive
    delta: Delta
    adjacency: Adjacency
    min_participants: SiteCount
    min_survivors: SiteCount
    min_threshold: SiteCount
    min_colluders: SiteCount
    trust: tuple[Trust, ...]
    min_noise_multiplier: Positive
    max_sampling_rate: SamplingRate
    max_steps_per_round: Annotated[int, Field(ge=1, le=10_000)]
    max_clip: Positive
    graphs: Annotated[tuple[GraphKind, ...], Field(min_length=1, max_length=len(GraphKind))] = (
        GraphKind.COMPLETE,
    )
    schedule: Schedule = Schedule.FIXED
    min_evaluation_noise: Positive | None = None
    """Least noise on a released count (standard deviation); None: this site's counts are never released."""
    max_epsilon_all_collude: Positive | None = None
    """Most that may be spent if all other sites help the server; None: not bounded."""


class Reservation(SiteLeaf):
    """Privacy charged before any record is read; never refunded."""

    kind: ClassVar[str] = "reservation"
    added: ClassVar[frozenset[str]] = frozenset({"evaluation", "elsewhere_alone", "elsewhere_draws"})

    context: Hex32
    dataset: Hex32
    """Random identifier of the data set: not its fingerprint, which would tell neighbouring data sets apart."""
    trust: Trust
    adjacency: Adjacency
    charge: Charge
    noise_share: Positive
    noise_sites: SiteCount
    colluders: SiteCount
    clip: Positive
    delta: Delta
    elsewhere: Annotated[tuple[Charge, ...], Field(max_length=1000)] = ()
    """Everything spent on this data set outside this ledger, merged by mechanism."""
    evaluation: EvaluationCharge | None = None
    """Counts of test rows that leave in the same vector."""
    elsewhere_alone: Annotated[tuple[Charge, ...], Field(max_length=1000)] | None = None
    """``elsewhere`` as it counts if everybody else colludes; None: the same."""
    elsewhere_draws: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    """Integer draws on each coordinate (``draws``) among what was spent elsewhere."""

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Everything this reservation charges."""
        return (self.charge, self.evaluation.charge) if self.evaluation else (self.charge,)

    @property
    def draws(self) -> int:
        """Integer draws on each coordinate that the noise counted on is made of; 0 where it is none of integers."""
        if self.trust is Trust.AGGREGATE:
            return self.charge.steps * self.noise_sites
        return 1 if self.evaluation else 0

    @property
    def own_charges(self) -> tuple[Charge, ...]:
        """The same as it counts if everybody else colludes: the site's own share of the noise alone."""
        own = [self.charge.model_copy(update={"noise_multiplier": self.noise_share})]
        if self.evaluation:
            own.append(gaussian(self.evaluation.noise_share))
        return tuple(own)


class Refusal(SiteLeaf):
    """A site's refusal of an offer, and why."""

    kind: ClassVar[str] = "refusal"

    context: Hex32
    reason: ShortText


class Receipt(SiteLeaf):
    """What a site did under a reservation: how many steps, and the hash of the masked vector it sent."""

    kind: ClassVar[str] = "receipt"

    context: Hex32
    steps: Steps
    vector_hash: Hex32


class Leave(SiteLeaf):
    """A site's last word: it takes part in nothing any more; what it spent stays charged."""

    kind: ClassVar[str] = "leave"

    reason: ShortText


class Outcome(StrEnum):
    """How an attempt ended."""

    OPENED = "opened"
    ABORTED = "aborted"


class Close(GrownBody):
    """The server's account of how an attempt ended, with the agreement signatures that allowed opening it."""

    kind: ClassVar[str] = "close"
    added: ClassVar[frozenset[str]] = frozenset({"counts"})

    context: Hex32
    outcome: Outcome
    reason: ShortText
    """Why it was aborted; empty when it was opened."""
    keys_hash: Hex32 | None
    dealings_hash: Hex32 | None
    survivors: dict[SiteName, Hex32]
    """Each survivor's masked vector hash; empty when aborted."""
    agreements: dict[SiteName, Hex64]
    """Signatures of ``fedfuse_shared.messages.Agreement`` over exactly these survivors."""
    model_hash: Hex32 | None
    """Hash of the new global weights."""
    counts: Annotated[tuple[Count, ...], Field(max_length=limits.MAX_COUNTS)] = ()
    """The sum of the survivors' noised evaluation counts, of the model the round started from."""


LEAF_TYPES: dict[str, type[Body]] = {
    leaf.kind: leaf
    for leaf in (
        Roster,
        Command,
        CommandRefusal,
        Policy,
        Offer,
        Reservation,
        Refusal,
        Receipt,
        Leave,
        Close,
    )
}
"""Every kind a ledger may hold."""
