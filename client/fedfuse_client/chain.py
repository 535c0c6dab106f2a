"""A site's own chain of leaves in one federation: appended once, never changed, and compared with the ledger.

What the site may spend is decided here: a reservation is projected over everything ever reserved on the data set's
pool, refused beyond the cap, and on disk before the caller may read the first record. There is no refund.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_client import datasets
from fedfuse_client.policy import SitePolicy, check_offer
from fedfuse_client.store_database import Database
from fedfuse_shared import limits
from fedfuse_shared.config.base import Hex32, Label, SiteName, Trust
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import Envelope, decode, encode, seal, verify
from fedfuse_shared.errors import BudgetError, PolicyError, ProtocolError, StateError
from fedfuse_shared.ledger.records import (
    FIRST_LINK,
    Charge,
    EvaluationCharge,
    Leave,
    Policy,
    Receipt,
    Refusal,
    Reservation,
    SiteLeaf,
    link,
)
from fedfuse_shared.offer import Offer

L = TypeVar("L", bound=SiteLeaf)

MAX_ELSEWHERE: Final = 1000
"""Most different mechanisms a reservation can list as spent elsewhere."""


class Chain:
    """The leaves a site wrote in one federation, numbered from 1 and linked."""

    def __init__(self, database: Database, federation: Label, site: SiteName) -> None:
        self._database = database
        self.federation = federation
        self.site = site
        owner = database.row("SELECT site FROM chain WHERE federation = ?", federation)
        if owner is not None and owner[0] != site:
            raise StateError(
                f"belongs to site {owner[0]}, not {site}",
                who=f"store {database.path}",
                advice="use each site's own kit and store",
            )

    def head(self) -> tuple[int, Hex32]:
        """Return the last leaf's ``seq`` and link; 0 and the first link when there is none."""
        found = self._database.row(
            "SELECT seq, link FROM leaf WHERE federation = ? ORDER BY seq DESC LIMIT 1", self.federation
        )
        return (found[0], found[1]) if found else (0, FIRST_LINK)

    def leaves_after(self, seq: int) -> list[bytes]:
        """Return the canonical bytes of every leaf after one, in order; 0 for all."""
        found = self._database.rows(
            "SELECT raw FROM leaf WHERE federation = ? AND seq > ? ORDER BY seq", self.federation, seq
        )
        return [raw.encode() for (raw,) in found]

    def find(self, leaf_type: type[L], context: Hex32) -> Envelope[L] | None:
        """Return the leaf of a kind that was written for a context, if there is one."""
        found = self._database.row(
            "SELECT raw FROM leaf WHERE federation = ? AND kind = ? AND context = ?",
            self.federation,
            leaf_type.kind,
            context,
        )
        return decode(found[0].encode(), leaf_type, who="store") if found else None

    def latest(self, leaf_type: type[L]) -> Envelope[L] | None:
        """Return the last leaf of a kind, if there is one."""
        found = self._database.row(
            "SELECT raw FROM leaf WHERE federation = ? AND kind = ? ORDER BY seq DESC LIMIT 1",
            self.federation,
            leaf_type.kind,
        )
        return decode(found[0].encode(), leaf_type, who="store") if found else None

    def check_member(self) -> None:
        """Check that the site has not left the federation.

        Raises:
            PolicyError: it has.
        """
        left = self.latest(Leave)
        if left is not None:
            raise PolicyError(
                f"left federation {self.federation} for good (leaf {left.body.seq} of its chain)",
                who=f"site {self.site}",
                advice="it takes part in nothing any more; to come back, enrol it anew under another name",
            )

    def append(self, build: Callable[[int, str], L], key: Ed25519PrivateKey) -> Envelope[L]:
        """Sign and store the next leaf; it is durable when the outermost transaction ends.

        Args:
            build: Makes the body from its ``seq`` and ``prev``.
            key: The site's signing key.

        Raises:
            PolicyError: the site has left: nothing follows that leaf.
            StateError: a leaf of this kind was already written for this context.
        """
        with self._database.transaction():
            self.check_member()
            seq, prev = self.head()
            body = build(seq + 1, prev)
            if (body.seq, body.prev) != (seq + 1, prev):
                raise RuntimeError("a leaf was built for another place of the chain")
            envelope = seal(body, self.site, key)
            self._database.rows("INSERT OR IGNORE INTO chain VALUES (?, ?)", self.federation, self.site)
            try:
                self._database.rows(
                    "INSERT INTO leaf (federation, seq, raw, link) VALUES (?, ?, ?, ?)",
                    self.federation,
                    body.seq,
                    encode(envelope).decode(),
                    link(envelope),
                )
            except sqlite3.IntegrityError as problem:
                raise StateError(
                    f"chain already has a {body.kind} for this context",
                    who=f"site {self.site}",
                    advice="send the stored one again: a second would be a finding against this site",
                ) from problem
        return envelope

    def check_budget(self, policy: SitePolicy, offer: Offer, dataset: Hex32) -> None:
        """Check that a data set can pay for an offer; charges nothing.

        Raises:
            BudgetError: it would bring the data set's epsilon past the cap.
            StateError: the data set is unknown.
        """
        self._check_cap(policy, offer, datasets.spent(self._database, dataset))

    def reserve(
        self, policy: SitePolicy, offer: Offer, dataset: Hex32, key: Ed25519PrivateKey
    ) -> Envelope[Reservation]:
        """Charge an offer to a data set before any of its records is read; durable on return.

        A second call for the same offer returns the identical envelope and charges nothing more.

        Raises:
            PolicyError: the offer is outside the policy, or the site has left.
            BudgetError: it would bring the data set's epsilon past the cap.
            StateError: the context is finished, was charged to another data set, or the data set is unknown.
        """
        if self._database.in_transaction:
            raise RuntimeError("a reservation is durable on its own, before the work it pays for")
        if (policy.federation, policy.site) != (self.federation, self.site):
            raise RuntimeError("a policy was applied to another site's chain")
        check_offer(policy, offer)
        context = offer.context()
        with self._database.transaction():
            self.check_member()
            if self._database.row("SELECT 1 FROM session WHERE context = ? AND state IS NULL", context):
                raise StateError(
                    f"round {offer.round} attempt {offer.attempt} is finished here",
                    who=f"site {self.site}",
                    advice="the coordinator has to offer a new attempt",
                )
            before = datasets.spent(self._database, dataset)
            standing = self.find(Reservation, context)
            if standing is None:
                self._check_cap(policy, offer, before)
                return self.append(self._reservation(offer, dataset, before), key)
        if standing.body.dataset != dataset:
            raise StateError(
                f"round {offer.round} attempt {offer.attempt} was charged to another data set",
                who=f"site {self.site}",
                advice="put back the data it was begun with, or wait for the next attempt",
            )
        return standing

    def check_head(self, leaf: bytes | None, public_key: bytes) -> None:
        """Compare the site's last leaf on the ledger, as the server shows it, with this store.

        Args:
            leaf: That leaf, or None when the server knows of none: it may not have been logged yet.
            public_key: The site's own Ed25519 key (32 bytes).

        Raises:
            StateError: this site signed something that this store does not hold: the store was rolled back, or
                the site was cloned.
            ProtocolError: it is not a leaf of this site.
            VerificationError: its signature does not hold.
        """
        if leaf is None:
            return
        shown = _decode_site_leaf(leaf)
        if shown.author != self.site:
            raise ProtocolError(f"showed a leaf of {shown.author} as that of site {self.site}", who="server")
        verify(shown, public_key)
        ours = self._database.row(
            "SELECT raw FROM leaf WHERE federation = ? AND seq = ?", self.federation, shown.body.seq
        )
        if ours is None or ours[0].encode() != leaf:
            raise StateError(
                f"ledger holds a leaf {shown.body.seq} that this site signed and its store, which ends at leaf "
                f"{self.head()[0]}, does not: the store was rolled back, or a second copy of the site is running",
                who=f"site {self.site}",
                advice="stop every copy, put back the newest store, and train only once it matches the ledger",
            )

    def _reservation(
        self, offer: Offer, dataset: Hex32, before: list[datasets.Spent]
    ) -> Callable[[int, str], Reservation]:
        """Return what builds the reservation of an offer; an auditor finds the pool's whole spending in it."""
        from fedfuse_shared.privacy.mechanisms import merge  # noqa: PLC0415 - with the accountant, only where needed

        # What the ledger of this federation shows under this identifier, and only that, is not elsewhere.
        here = (self.federation, dataset)
        others = [item for item in before if (item.federation, item.dataset) != here]
        elsewhere = merge(charge for item in others for charge in item.charges)
        alone = merge(charge for item in others for charge in item.own_charges)
        if (most := max(len(elsewhere), len(alone))) > MAX_ELSEWHERE:
            raise BudgetError(
                f"data set was spent under {most} mechanisms, at most {MAX_ELSEWHERE} can be listed",
                who=f"site {self.site}",
                advice="stop: it cannot be accounted for any more",
            )
        asked = offer.privacy
        return lambda seq, prev: Reservation(
            seq=seq,
            prev=prev,
            context=offer.context(),
            dataset=dataset,
            trust=asked.trust,
            adjacency=asked.adjacency,
            charge=_charge(offer),
            noise_share=asked.noise_share,
            noise_sites=asked.noise_sites,
            colluders=offer.colluders,
            clip=asked.clip,
            delta=asked.delta,
            elsewhere=elsewhere,
            evaluation=_evaluation_charge(offer),
            elsewhere_alone=None if alone == elsewhere else alone,
            elsewhere_draws=sum(item.draws for item in others),
        )

    def _check_cap(self, policy: SitePolicy, offer: Offer, before: list[datasets.Spent]) -> None:
        """Refuse what would pass the cap, and another mechanism where the policy fixes one (``config.privacy``)."""
        # Only here: they take a second to import, and phases that move keys need not wait for it.
        from fedfuse_shared.privacy.accountant import (  # noqa: PLC0415
            epsilon_enforced,
            room_for_draws,
            usable_delta,
        )
        from fedfuse_shared.privacy.budget import fits  # noqa: PLC0415
        from fedfuse_shared.privacy.mechanisms import steps_by_mechanism  # noqa: PLC0415

        if offer.privacy.trust is Trust.NONE:
            return  # the policy allows training without a guarantee; the charge is infinite, and stays
        # What it would charge, wherever in the chain it stands.
        asked = self._reservation(offer, FIRST_LINK, [])(1, FIRST_LINK)
        charges = [*(charge for item in before for charge in item.charges), *asked.charges]
        draws = sum(item.draws for item in before) + asked.draws
        if policy.schedule is Schedule.FIXED and len(steps_by_mechanism(charges)) > 1:
            raise BudgetError(
                f"round {offer.round} asks for sampling rate {offer.privacy.sampling_rate} and noise multiplier "
                f"{offer.privacy.noise_multiplier}; this data set was charged for others, and policy's "
                "schedule is fixed",
                who=f"site {self.site}",
                advice='offer those again, or set schedule = "free" in policy.toml: Renyi accounting counts then',
            )
        counted = datasets.counted(before, policy.schedule)
        usable = usable_delta(policy.delta, shared=draws > 0)
        room = room_for_draws(policy.epsilon_cap, policy.delta, draws)
        if counted is Schedule.FIXED and room and fits(charges, usable, policy.epsilon_cap):
            self._check_alone(policy, offer, before, asked)
            return
        projected = epsilon_enforced(charges, policy.delta, counted, draws)
        if not projected <= policy.epsilon_cap:  # refuses NaN too
            raise BudgetError(
                f"round {offer.round} would bring epsilon to {projected:.6g} of {policy.epsilon_cap} "
                f"(delta {policy.delta}, {len(before) + 1} reservations on this data set)",
                who=f"site {self.site}",
                advice="raise epsilon_cap in policy.toml or stop",
            )
        self._check_alone(policy, offer, before, asked)

    def _check_alone(
        self, policy: SitePolicy, offer: Offer, before: list[datasets.Spent], asked: Reservation
    ) -> None:
        """Refuse what would pass the cap on what is spent if everybody else helps the server."""
        from fedfuse_shared.privacy.accountant import epsilon_enforced  # noqa: PLC0415 - as above
        from fedfuse_shared.privacy.mechanisms import steps_by_mechanism  # noqa: PLC0415

        most = policy.max_epsilon_all_collude
        if most is None:
            return
        own = [*(charge for item in before for charge in item.own_charges), *asked.own_charges]
        if policy.schedule is Schedule.FIXED and len(steps_by_mechanism(own)) > 1:
            # The same multiplier, shared among more or fewer sites.
            raise BudgetError(
                f"round {offer.round} asks for a share of noise of {offer.privacy.noise_share:.6g}; this data set "
                "was charged for other shares, and policy's schedule is fixed",
                who=f"site {self.site}",
                advice='offer those again, or set schedule = "free" in policy.toml: Renyi accounting counts then',
            )
        draws = sum(item.draws for item in before) + asked.draws
        counted = datasets.counted(before, policy.schedule)
        alone = epsilon_enforced(own, policy.delta, counted, draws)
        if not alone <= most:
            raise BudgetError(
                f"round {offer.round} would bring epsilon to {alone:.6g} of {most} if all others help the server",
                who=f"site {self.site}",
                advice="raise max_epsilon_all_collude in policy.toml or stop",
            )


def _evaluation_charge(offer: Offer) -> EvaluationCharge | None:
    asked = offer.evaluation
    if asked is None or not offer.counts:
        return None
    return EvaluationCharge(noise=asked.noise, noise_share=asked.noise_share)


def _charge(offer: Offer) -> Charge:
    asked = offer.privacy
    return Charge(
        sampling_rate=asked.sampling_rate, noise_multiplier=asked.noise_multiplier, steps=asked.steps
    )


def _decode_site_leaf(
    raw: bytes,
) -> Envelope[Policy] | Envelope[Reservation] | Envelope[Refusal] | Envelope[Receipt] | Envelope[Leave]:
    """Parse a leaf of any kind a site writes."""
    if len(raw) > limits.MAX_LEDGER_LINE:
        raise ProtocolError(
            f"leaf of {len(raw)} bytes is over the limit of {limits.MAX_LEDGER_LINE}", who="server"
        )
    try:
        kind = json.loads(raw)["kind"]
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise ProtocolError("showed something that is not a leaf", who="server") from problem
    match kind:
        case Policy.kind:
            return decode(raw, Policy, who="server")
        case Reservation.kind:
            return decode(raw, Reservation, who="server")
        case Refusal.kind:
            return decode(raw, Refusal, who="server")
        case Receipt.kind:
            return decode(raw, Receipt, who="server")
        case Leave.kind:
            return decode(raw, Leave, who="server")
    raise ProtocolError("showed a leaf of a kind that no site writes", who="server")
