"""Each attempt at a round: what was offered, charged, sent and opened must be one and the same.

1. An offer names this roster, enrolled participants, bounds that protect single updates, noise that adds up, and the
   model that was opened last.
2. A reservation equals its offer and lies inside the site's own published policy.
3. A receipt follows its reservation; there is one of each.
4. A close opens exactly vectors with receipts, with the agreement of at least t participants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fedfuse_shared.config.base import Trust
from fedfuse_shared.config.federation import GraphKind
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import Envelope, verify
from fedfuse_shared.errors import ConfigError, VerificationError
from fedfuse_shared.ledger.records import Close, Outcome, Policy, Receipt, Refusal, Reservation
from fedfuse_shared.ledger.verification_report import Code, Findings
from fedfuse_shared.messages import Agreement
from fedfuse_shared.offer import Evaluation, Offer, RoundPrivacy
from fedfuse_shared.privacy.integer_noise import SMOOTH
from fedfuse_shared.roster import Roster
from fedfuse_shared.secagg import transcript
from fedfuse_shared.secagg.bounds import Bounds
from fedfuse_shared.secagg.graph import COMPLETE

_SLACK: Final = 1e-12
"""Relative rounding of one floating-point square root."""


@dataclass(slots=True)
class Attempt:
    """What the ledger says of one attempt; the context is its key."""

    run: str
    participants: frozenset[str]
    order: tuple[str, ...]
    """The participants as the offer lists them."""
    graph: GraphKind
    threshold: int
    colluders: int
    min_survivors: int
    privacy: RoundPrivacy
    evaluation: Evaluation | None
    """What this attempt evaluates; None where it does not."""
    counts: int
    reserved: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Data set and steps of each site's reservation."""
    receipts: dict[str, str] = field(default_factory=dict)
    """Vector hash of each site's receipt."""
    closed: bool = False


@dataclass(slots=True)
class _Run:
    """How far one run has come."""

    last: tuple[int, int]
    """Round and attempt of its last offer."""
    model_hash: str
    """What the next offer has to start from."""


class Rounds:
    """All attempts of a ledger, followed leaf by leaf."""

    def __init__(self, roster: Roster, findings: Findings) -> None:
        self._roster = roster
        self._roster_hash = roster.hash()
        self._findings = findings
        self._attempts: dict[str, Attempt] = {}
        self._runs: dict[str, _Run] = {}
        self._shared: dict[object, object] = {}

    # --- offers ---------------------------------------------------------------------------------------------
    def offer(self, leaf: int, offer: Offer) -> None:
        """Follow an offer."""
        context = offer.context()
        if context in self._attempts:
            self._findings.add(
                Code.DUPLICATE_OFFER, leaf, None, f"offer {_name(offer)} is on the ledger twice"
            )
            return
        for code, detail in self._objections(offer):
            self._findings.add(code, leaf, None, f"offer {_name(offer)} {detail}")
        place = (offer.round, offer.attempt)
        run = self._runs.setdefault(offer.run, _Run((0, 0), offer.model_hash))
        if place <= run.last:
            detail = f"offer {_name(offer)} comes after round {run.last[0]}, attempt {run.last[1]}"
            self._findings.add(Code.OFFER_ORDER, leaf, None, detail)
        if offer.model_hash != run.model_hash:
            detail = (
                f"offer {_name(offer)} starts from model {offer.model_hash[:16]}…, the run stands at "
                f"{run.model_hash[:16]}…"
            )
            self._findings.add(Code.MODEL_CHAIN, leaf, None, detail)
        run.last = max(run.last, place)
        run.model_hash = offer.model_hash
        participants = frozenset(offer.participants)
        self._attempts[context] = Attempt(
            run=offer.run,
            # Rounds are alike: equal values share one object, so that a million leaves fit in memory.
            participants=self._shared.setdefault(participants, participants),  # type: ignore[arg-type]
            order=self._shared.setdefault(offer.participants, offer.participants),  # type: ignore[arg-type]
            graph=GraphKind.COMPLETE if offer.neighbours == COMPLETE else GraphKind.SPARSE,
            threshold=offer.threshold,
            colluders=offer.colluders,
            min_survivors=offer.min_survivors,
            privacy=self._shared.setdefault(offer.privacy, offer.privacy),  # type: ignore[arg-type]
            evaluation=self._shared.setdefault(offer.evaluation, offer.evaluation) if offer.counts else None,  # type: ignore[arg-type]
            counts=offer.counts,
        )

    def _objections(self, offer: Offer) -> Iterator[tuple[Code, str]]:
        if offer.federation != self._roster.federation or offer.roster_hash != self._roster_hash:
            here = f"{self._roster.federation} with {self._roster_hash[:16]}…"
            yield (
                Code.OFFER_ROSTER,
                f"is for {offer.federation} with {offer.roster_hash[:16]}…, this is {here}",
            )
        strangers = sorted(set(offer.participants) - self._roster.sites.keys())
        if strangers:
            yield Code.OFFER_PARTICIPANTS, f"names sites that are not enrolled: {', '.join(strangers[:5])}"
        n, t, c, least = len(set(offer.participants)), offer.threshold, offer.colluders, offer.min_survivors
        if n != len(offer.participants):
            yield Code.OFFER_PARTICIPANTS, "names a participant twice"
        try:
            Bounds(n, t, c, least, offer.neighbours).check()
        except ConfigError as problem:
            numbers = f"n = {n}, t = {t}, c = {c}, min_survivors = {least}, neighbours = {offer.neighbours}"
            yield Code.OFFER_BOUNDS, f"has {numbers}: {problem.message}"
        if offer.neighbours != COMPLETE and offer.privacy.trust is Trust.AGGREGATE:
            yield Code.OFFER_BOUNDS, "shares noise on a sparse graph, which protects it from no lying server"
        detail = _noise(offer)
        if detail:
            yield Code.OFFER_NOISE, detail

    # --- what sites write -----------------------------------------------------------------------------------
    def reservation(self, leaf: int, site: str, body: Reservation, policy: Policy | None) -> None:
        """Follow a reservation."""
        attempt = self._attempt(leaf, site, body.context, "reservation")
        if policy is None:
            self._findings.add(Code.NO_POLICY, leaf, site, "reserves before it published any policy")
        else:
            outside = list(_outside(body, attempt, policy))
            if outside:
                detail = (
                    f"reserves outside its own policy (leaf {policy.seq} of its chain): {', '.join(outside)}"
                )
                self._findings.add(Code.OUTSIDE_POLICY, leaf, site, detail)
        if attempt is None:
            return
        differing = _differing(body, attempt)
        if differing:
            detail = f"charges something else than it was offered: {', '.join(differing)}"
            self._findings.add(Code.PARAMETERS, leaf, site, detail)
        if site in attempt.reserved:
            detail = f"reserves twice for attempt {body.context[:16]}…"
            self._findings.add(Code.DUPLICATE_RESERVATION, leaf, site, detail)
        else:
            attempt.reserved[site] = (body.dataset, body.charge.steps)

    def refusal(self, leaf: int, site: str, body: Refusal) -> None:
        """Follow a refusal."""
        self._attempt(leaf, site, body.context, "refusal")

    def receipt(self, leaf: int, site: str, body: Receipt) -> str | None:
        """Follow a receipt; return the data set of the reservation it completes."""
        attempt = self._attempt(leaf, site, body.context, "receipt")
        if attempt is None:
            return None
        if site in attempt.receipts:
            same = attempt.receipts[site] == body.vector_hash
            detail = (
                f"has two receipts for attempt {body.context[:16]}…, over {'one' if same else 'two'} vectors"
            )
            self._findings.add(Code.DUPLICATE_RECEIPT, leaf, site, detail)
            return None
        attempt.receipts[site] = body.vector_hash
        if site not in attempt.reserved:
            detail = f"has a receipt for attempt {body.context[:16]}… without a reservation before it"
            self._findings.add(Code.NO_RESERVATION, leaf, site, detail)
            return None
        dataset, steps = attempt.reserved[site]
        if body.steps > steps:
            self._findings.add(Code.STEPS, leaf, site, f"did {body.steps} steps and charged for {steps}")
        return dataset

    def _attempt(self, leaf: int, site: str, context: str, what: str) -> Attempt | None:
        attempt = self._attempts.get(context)
        if attempt is None:
            detail = f"{what} for attempt {context[:16]}…, whose offer is not on the ledger before it"
            self._findings.add(Code.NO_OFFER, leaf, site, detail)
        elif site not in attempt.participants:
            detail = f"{what} for attempt {context[:16]}…, whose offer does not name this site"
            self._findings.add(Code.NOT_PARTICIPANT, leaf, site, detail)
        return attempt

    # --- closes ---------------------------------------------------------------------------------------------
    def close(self, leaf: int, body: Close) -> list[tuple[str, str]]:
        """Follow a close; return site and data set of every survivor of an opened one."""
        attempt = self._attempts.get(body.context)
        if attempt is None:
            detail = f"close of attempt {body.context[:16]}…, whose offer is not on the ledger before it"
            self._findings.add(Code.NO_OFFER, leaf, None, detail)
            return []
        if attempt.closed:
            detail = f"second close of attempt {body.context[:16]}…"
            self._findings.add(Code.DUPLICATE_CLOSE, leaf, None, detail)
            return []
        attempt.closed = True
        problem = _malformed(body)
        if problem:
            self._findings.add(Code.CLOSE_MALFORMED, leaf, None, problem)
        if body.outcome is Outcome.ABORTED:
            return []
        if len(body.counts) != attempt.counts:
            detail = f"opens {len(body.counts)} evaluation counts, the offer asked for {attempt.counts}"
            self._findings.add(Code.CLOSE_MALFORMED, leaf, None, detail)
        self._check_survivors(leaf, body, attempt)
        self._check_agreements(leaf, body, attempt)
        if body.model_hash is not None:
            self._runs[attempt.run].model_hash = body.model_hash
        return [(site, attempt.reserved[site][0]) for site in body.survivors if site in attempt.reserved]

    def _check_survivors(self, leaf: int, body: Close, attempt: Attempt) -> None:
        strangers = sorted(body.survivors.keys() - attempt.participants)
        if strangers:
            detail = f"opened over sites that were not asked: {', '.join(strangers[:5])}"
            self._findings.add(Code.SURVIVORS, leaf, None, detail)
        least = max(attempt.threshold, attempt.min_survivors)
        if len(body.survivors) < least:
            detail = f"opened over {len(body.survivors)} sites, the offer promised at least {least}"
            self._findings.add(Code.SURVIVORS, leaf, None, detail)
        for site, vector_hash in sorted(body.survivors.items()):
            if site not in attempt.receipts:
                detail = "is named a survivor, and no receipt of it stands before that"
                self._findings.add(Code.NO_RECEIPT, leaf, site, detail)
            elif attempt.receipts[site] != vector_hash:
                detail = f"sent vector {attempt.receipts[site][:16]}…, opened was {vector_hash[:16]}…"
                self._findings.add(Code.VECTOR, leaf, site, detail)

    def _check_agreements(self, leaf: int, body: Close, attempt: Attempt) -> None:
        if body.keys_hash is None or body.dealings_hash is None:
            return  # already found malformed
        said = Agreement(
            context=body.context,
            keys_hash=body.keys_hash,
            dealings_hash=body.dealings_hash,
            survivors_hash=transcript.roll_hash(
                body.context,
                "vectors",
                transcript.roll(
                    attempt.order, body.survivors, transcript.vectors_items(body.context, body.survivors)
                ),
            ),
        )
        good = 0
        for site, sig in sorted(body.agreements.items()):
            if site not in attempt.participants or site not in self._roster.sites:
                self._findings.add(Code.AGREEMENTS, leaf, site, "agreement of a site that was not asked")
                continue
            if site not in body.survivors:
                # It masked nothing, so it may vouch for sets that differ between sites; see ``SiteSession.reveal``.
                self._findings.add(Code.AGREEMENTS, leaf, site, "agreement of a site that did not survive")
                continue
            signed = Envelope[Agreement](author=site, body=said, kind=Agreement.kind, sig=sig, v=1)
            try:
                verify(signed, self._roster.key_of(site))
                good += 1
            except VerificationError:
                detail = (
                    "its agreement to open exactly this does not hold: it signed something else or nothing"
                )
                self._findings.add(Code.AGREEMENTS, leaf, site, detail)
        if good < attempt.threshold:
            detail = f"opened with {good} agreements, the offer promised at least {attempt.threshold}"
            self._findings.add(Code.AGREEMENTS, leaf, None, detail)


def _name(offer: Offer) -> str:
    return f"{offer.run}/{offer.round}.{offer.attempt}"


def _noise(offer: Offer) -> str | None:
    """Return why the shares do not add up to the noise that is accounted (design page 3, step 2), if so."""
    asked, counted = offer.privacy, offer.evaluation
    if asked.trust is Trust.AGGREGATE:
        return next(_short_shares(offer), None)
    whole = counted is None or counted.noise_share == counted.noise
    if whole and asked.noise_share == asked.noise_multiplier and asked.noise_sites == 1:
        return None
    return f"lets sites add less noise than is accounted, with trust = {asked.trust.value}"


def _short_shares(offer: Offer) -> Iterator[str]:
    asked, counted = offer.privacy, offer.evaluation
    sites, honest = asked.noise_sites, offer.min_survivors - offer.colluders
    if not 1 <= sites <= honest:
        yield f"counts on the noise of {sites} sites, {honest} honest survivors are certain"
    if asked.noise_share * math.sqrt(sites) < asked.noise_multiplier * (1 - _SLACK):
        yield f"has shares of {asked.noise_share:g} that do not add up to {asked.noise_multiplier:g}"
    if counted is not None and sites * counted.noise_share**2 - SMOOTH**2 < counted.noise**2 * (1 - _SLACK):
        yield f"has shares of {counted.noise_share:g} on counts that do not add up to {counted.noise:g}"
    if asked.steps != 1:
        yield f"shares the noise between sites over {asked.steps} local steps; only one can be accounted"


def _differing(body: Reservation, attempt: Attempt) -> list[str]:
    asked = attempt.privacy
    pairs: dict[str, tuple[object, object]] = {
        "sampling rate": (body.charge.sampling_rate, asked.sampling_rate),
        "noise multiplier": (body.charge.noise_multiplier, asked.noise_multiplier),
        "steps": (body.charge.steps, asked.steps),
        "clip": (body.clip, asked.clip),
        "delta": (body.delta, asked.delta),
        "noise share": (body.noise_share, asked.noise_share),
        "noise sites": (body.noise_sites, asked.noise_sites),
        "colluders": (body.colluders, attempt.colluders),
        "trust": (body.trust.value, asked.trust.value),
        "adjacency": (body.adjacency, asked.adjacency),
    }
    evaluation = attempt.evaluation
    pairs["noise on counts"] = (
        (body.evaluation.noise, body.evaluation.noise_share) if body.evaluation else None,
        (evaluation.noise, evaluation.noise_share) if evaluation else None,
    )
    return [f"{name} {mine} for {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]


def _outside(body: Reservation, attempt: Attempt | None, policy: Policy) -> Iterator[str]:
    if body.delta != policy.delta:
        yield f"delta {body.delta:g} for {policy.delta:g}"
    if body.trust not in policy.trust:
        yield f"trust {body.trust.value}"
    if body.evaluation is not None and policy.min_evaluation_noise is None:
        yield "evaluation"
    if body.evaluation is not None and policy.schedule is Schedule.FIXED:
        # Found here, since its numbers may be those of the training: then they merge into one mechanism.
        yield "evaluation under a fixed schedule"
    if attempt is not None and attempt.graph not in policy.graphs:
        yield f"a {attempt.graph.value} graph"
    ceilings: dict[str, tuple[float, float]] = {
        "sampling rate": (body.charge.sampling_rate, policy.max_sampling_rate),
        "steps": (body.charge.steps, policy.max_steps_per_round),
        "clip": (body.clip, policy.max_clip),
    }
    floors: dict[str, tuple[float, float]] = {
        "noise multiplier": (body.charge.noise_multiplier, policy.min_noise_multiplier)
    }
    if body.evaluation is not None and policy.min_evaluation_noise is not None:
        floors["noise on counts"] = (body.evaluation.noise, policy.min_evaluation_noise)
    if attempt is not None:
        floors |= {
            "participants": (len(attempt.participants), policy.min_participants),
            "survivors": (attempt.min_survivors, policy.min_survivors),
            "threshold": (attempt.threshold, policy.min_threshold),
            "colluders": (attempt.colluders, policy.min_colluders),
        }
    yield from (f"{name} {asked:g} over {most:g}" for name, (asked, most) in ceilings.items() if asked > most)
    yield from (
        f"{name} {asked:g} under {least:g}" for name, (asked, least) in floors.items() if asked < least
    )


def _malformed(body: Close) -> str | None:
    """Return how a close contradicts its own outcome, if it does."""
    if body.outcome is Outcome.ABORTED:
        if body.survivors or body.agreements or body.counts or body.model_hash is not None:
            return "close of an aborted attempt names survivors, agreements, counts or a model"
        return None if body.reason else "close of an aborted attempt gives no reason"
    if None in {body.keys_hash, body.dealings_hash, body.model_hash}:
        return "close of an opened attempt lacks the hash of keys, dealings or the new model"
    return "close of an opened attempt gives a reason for aborting" if body.reason else None
