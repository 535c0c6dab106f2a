"""What a site allows: its own file decides, never the server; an offer outside it is refused before data is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Final, NamedTuple

from pydantic import Field

from fedfuse_client.code import code_hash
from fedfuse_shared import limits
from fedfuse_shared.config.base import Frozen, Hex32, Label, Modality, SiteName, Trust
from fedfuse_shared.config.federation import GraphKind, Lifetime
from fedfuse_shared.config.files import load_toml
from fedfuse_shared.config.privacy import Delta, Positive, SamplingRate, Schedule
from fedfuse_shared.envelope import canonical
from fedfuse_shared.errors import ConfigError, PolicyError
from fedfuse_shared.ledger import records
from fedfuse_shared.offer import Offer, SiteCount, architecture_hash
from fedfuse_shared.secagg.bounds import Bounds
from fedfuse_shared.secagg.graph import COMPLETE
from fedfuse_shared.secagg.ring import most_counted, wraps

_KEPT_AT_SITE: Final = frozenset({"data", "dataset_sites", "modalities"})
# Where the data lies and which modalities a site has must not be published, not even inside a hash: so few values
# are possible that whoever sees the hash of one finds it by trying them all.
_NOT_PUBLISHED: Final = _KEPT_AT_SITE | {"warm"}  # how a process is run promises nothing to anybody


class SitePolicy(Frozen):
    """The content of ``policy.toml``: bounds a site sets for every offer, and the data it trains on."""

    site: SiteName
    federation: Label
    roster_hash: Hex32
    """The roster this site trusts; whoever controls it decides who may take part."""

    data: Path
    """Folder of the data set; a relative one is meant from the policy file's folder."""
    dataset_sites: Annotated[tuple[SiteName, ...], Field(max_length=limits.MAX_SITES)] = ()
    """Values of the manifest's ``site`` column that are trained on; empty: the site's own name alone."""
    modalities: Annotated[tuple[Modality, ...], Field(min_length=1, max_length=len(Modality))]
    """Which modalities this site feeds: declared here once, never computed from records."""

    epsilon_cap: Positive
    """Most privacy ever spent on one data set, over all federations (epsilon, per record)."""
    max_epsilon_all_collude: Positive | None = None
    """The same if all other sites help the server, where noise is shared (``trust``); left out: not bounded."""
    delta: Delta
    min_participants: Annotated[int, Field(ge=limits.MIN_SITES, le=limits.MAX_SITES)]
    min_survivors: SiteCount
    """Fewest sites over which a sum may be opened."""
    min_threshold: SiteCount
    """Fewest shares that may open a round, a floor for t."""
    min_colluders: SiteCount
    """Sites helping the server that an offer must withstand, a floor for c."""
    trust: Annotated[tuple[Trust, ...], Field(min_length=1, max_length=len(Trust))]
    min_noise_multiplier: Positive
    max_sampling_rate: SamplingRate
    max_steps_per_round: Annotated[int, Field(ge=1, le=10_000)]
    max_clip: Positive
    graphs: Annotated[tuple[GraphKind, ...], Field(min_length=1, max_length=len(GraphKind))] = (
        GraphKind.COMPLETE,
    )
    """Graphs of secure aggregation this site takes part in; on a sparse one it trusts the server not to lie."""
    max_lifetime: Lifetime = 86_400
    """Longest time the secrets of an attempt may stay in this site's store (seconds)."""
    schedule: Schedule = Schedule.FIXED
    """``fixed``: one mechanism for good, by the tighter bound; ``free``: any within bounds, by Renyi accounting."""
    min_evaluation_noise: Positive | None = None
    """Least noise on each released evaluation count (standard deviation); left out, none is released."""
    models: Annotated[tuple[Hex32, ...], Field(max_length=1000)] = ()
    """Hashes of the models this site trains (``fedfuse site models``); empty: any that fits its data."""
    code: Annotated[tuple[Hex32, ...], Field(max_length=1000)] = ()
    """Hashes of the fedfuse code this site trains with (``fedfuse site code``); empty: whatever is installed."""
    plans: Annotated[tuple[Hex32, ...], Field(max_length=1000)] = ()
    """Hashes of the run configurations this site takes part in; empty: any within the bounds above."""
    bundles: Annotated[tuple[Hex32, ...], Field(max_length=1000)] = ()
    """Hashes of the app bundles under which ``fedfuse site run`` answers; empty: none, so that it answers nothing."""
    warm: bool = True
    """Whether ``fedfuse site run`` answers from one process; ``false``: each message in a fresh one."""

    @property
    def record_sites(self) -> tuple[SiteName, ...]:
        """Values of the manifest's ``site`` column whose records this site trains on."""
        return self.dataset_sites or (self.site,)

    def hash(self) -> str:
        """Return the hash of what is published of this policy (SHA-256, hexadecimal)."""
        # Left out while empty: a policy from before there were bundles keeps its hash, and with it its leaf.
        hidden = set(_NOT_PUBLISHED if self.bundles else _NOT_PUBLISHED | {"bundles"})
        published = self.model_dump(mode="json", exclude=hidden)
        return hashlib.sha256(limits.LABEL_POLICY + canonical(published)).hexdigest()

    def leaf(self, seq: int, prev: str) -> records.Policy:
        """Return the leaf that publishes this policy at a place of the site's chain."""
        return records.Policy(
            seq=seq,
            prev=prev,
            policy_hash=self.hash(),
            roster_hash=self.roster_hash,
            epsilon_cap=self.epsilon_cap,
            delta=self.delta,
            adjacency="add-or-remove-one-record",
            min_participants=self.min_participants,
            min_survivors=self.min_survivors,
            min_threshold=self.min_threshold,
            min_colluders=self.min_colluders,
            trust=self.trust,
            min_noise_multiplier=self.min_noise_multiplier,
            max_sampling_rate=self.max_sampling_rate,
            max_steps_per_round=self.max_steps_per_round,
            max_clip=self.max_clip,
            graphs=self.graphs,
            schedule=self.schedule,
            min_evaluation_noise=self.min_evaluation_noise,
            max_epsilon_all_collude=self.max_epsilon_all_collude,
        )


def load_policy(path: Path) -> SitePolicy:
    """Read and check a policy file (TOML 1.0); a relative data folder is meant from the file's own.

    Raises:
        ConfigError: unreadable, too long, not TOML, or a key is unknown, missing or out of bounds; the message
            names the key.
    """
    policy = load_toml(path, SitePolicy)
    return policy.model_copy(update={"data": path.absolute().parent / policy.data})


class _Objection(NamedTuple):
    """One way in which an offer lies outside a policy."""

    what: str
    advice: str


def check_offer(policy: SitePolicy, offer: Offer) -> None:
    """Check that everything an offer asks for lies within a policy; its signature is checked elsewhere.

    Raises:
        PolicyError: it does not; the message says what was asked, what is allowed, and what to do.
    """
    objections: Iterator[_Objection] = chain(
        _identity(policy, offer),
        _cohort(policy, offer),
        _threshold(policy, offer),
        _mechanism(policy, offer),
        _noise_source(policy, offer),
        _ring(offer),
        _evaluation(policy, offer),
        _model(policy, offer),
        _plan(policy, offer),
    )
    first = next(objections, None)
    if first is not None:
        raise PolicyError(
            f"offer of round {offer.round} {first.what}", who=f"site {policy.site}", advice=first.advice
        )


def _identity(policy: SitePolicy, offer: Offer) -> Iterator[_Objection]:
    """Is it for this site, in this federation?"""
    if offer.federation != policy.federation:
        yield _Objection(
            f"is for federation {offer.federation}, policy names {policy.federation}",
            "check which server this site is connected to",
        )
    if offer.roster_hash != policy.roster_hash:
        yield _Objection(
            f"names roster {offer.roster_hash[:16]}…, policy pins {policy.roster_hash[:16]}…",
            "ask the operator which roster is current and set roster_hash in policy.toml",
        )
    if policy.site not in offer.participants:
        yield _Objection(
            "does not list this site as a participant", "ask the coordinator why it was sent here"
        )


def _cohort(policy: SitePolicy, offer: Offer) -> Iterator[_Objection]:
    """Are there enough different sites to hide among?"""
    n = len(set(offer.participants))
    if n < len(offer.participants):
        yield _Objection("lists a participant twice", "report it: one site would be counted as two")
    if n < policy.min_participants:
        yield _outside(f"has {n} participants", policy.min_participants, "min_participants", floor=True)
    if offer.min_survivors < policy.min_survivors:
        yield _outside(
            f"opens a sum over {offer.min_survivors} sites", policy.min_survivors, "min_survivors", floor=True
        )
    if offer.dimension() > limits.MAX_VECTOR:
        yield _Objection(
            f"asks for an update of {offer.dimension()} coordinates, fedfuse handles at most {limits.MAX_VECTOR}",
            "ask the coordinator for a smaller model",
        )


def _threshold(policy: SitePolicy, offer: Offer) -> Iterator[_Objection]:
    """Do graph, t and c keep the server and c colluders from opening two sums, or one alone (page 2, Terms)?"""
    n, t, c = len(set(offer.participants)), offer.threshold, offer.colluders
    graph = GraphKind.COMPLETE if offer.neighbours == COMPLETE else GraphKind.SPARSE
    if graph not in policy.graphs:
        yield _Objection(
            f"masks on a {graph.value} graph, policy allows {', '.join(policy.graphs)}",
            "add it to graphs in policy.toml, or stay out: a sparse graph does not hold against a lying server",
        )
    if graph is GraphKind.SPARSE and offer.privacy.trust is Trust.AGGREGATE:
        yield _Objection(
            "shares the noise between sites on a sparse graph",
            "report it: a lying server could separate one site's noise from the others'",
        )
    if offer.lifetime > policy.max_lifetime:
        yield _outside(f"keeps its secrets {offer.lifetime} s", policy.max_lifetime, "max_lifetime")
    if c < policy.min_colluders:
        yield _outside(f"withstands {c} colluders", policy.min_colluders, "min_colluders", floor=True)
    if t < policy.min_threshold:
        yield _outside(f"opens with {t} shares", policy.min_threshold, "min_threshold", floor=True)
    try:
        Bounds(n, t, c, offer.min_survivors, offer.neighbours).check()
    except ConfigError as problem:
        yield _Objection(f"has unsafe bounds: {problem.message}", "report it: no honest server offers them")


def _mechanism(policy: SitePolicy, offer: Offer) -> Iterator[_Objection]:
    """Do the constants the accounting is made of lie within bounds?"""
    asked = offer.privacy
    if asked.delta != policy.delta:
        yield _Objection(
            f"accounts at delta {asked.delta}, policy at {policy.delta}",
            "agree on one delta with the coordinator or stay out",
        )
    if asked.sampling_rate > policy.max_sampling_rate:
        yield _outside(
            f"asks for sampling rate {asked.sampling_rate}", policy.max_sampling_rate, "max_sampling_rate"
        )
    if asked.steps > policy.max_steps_per_round:
        yield _outside(f"asks for {asked.steps} steps", policy.max_steps_per_round, "max_steps_per_round")
    if asked.clip > policy.max_clip:
        yield _outside(f"asks for clip {asked.clip}", policy.max_clip, "max_clip")
    if asked.noise_multiplier < policy.min_noise_multiplier:
        yield _outside(
            f"asks for noise multiplier {asked.noise_multiplier}",
            policy.min_noise_multiplier,
            "min_noise_multiplier",
            floor=True,
        )


def _noise_source(policy: SitePolicy, offer: Offer) -> Iterator[_Objection]:
    """Is it clear, and acceptable, whose noise the guarantee rests on (page 3, trust modes)?"""
    asked = offer.privacy
    if asked.trust not in policy.trust:
        yield _Objection(
            f"relies on trust = {asked.trust.value}, policy allows {', '.join(policy.trust)}",
            "add it to trust in policy.toml or stay out",
        )
    if asked.trust is Trust.AGGREGATE:
        yield from _shared_noise(offer)
        return
    if asked.noise_share != asked.noise_multiplier:
        yield _Objection(
            f"has each site add noise {asked.noise_share} but counts {asked.noise_multiplier}",
            "report it: with trust = site both are the same",
        )
    if asked.noise_sites != 1:
        yield _Objection(
            f"counts on the noise of {asked.noise_sites} sites",
            "report it: with trust = site every site adds all of it",
        )


def _shared_noise(offer: Offer) -> Iterator[_Objection]:
    """Do the shares of those who are sure to be honest add up to the noise that is charged (page 3, step 2)?"""
    # numpy, and only for this trust mode: a policy is read in every fresh process.
    from fedfuse_shared.privacy import aggregate, promise  # noqa: PLC0415

    objections = [_Objection(*each) for each in promise.broken(offer)]
    yield from objections
    if objections:
        return
    asked = offer.privacy
    share = aggregate.share_deviation(
        asked.noise_multiplier, asked.noise_sites, asked.clip, offer.scale, offer.dimension()
    )
    try:
        aggregate.check_ring(len(offer.participants), offer.clip_range, offer.scale, share, offer.ring_bits)
    except ConfigError as problem:
        yield _Objection(f"shares noise, and {problem.message}", "ask the coordinator for other settings")


def _ring(offer: Offer) -> Iterator[_Objection]:
    """Is the ring wide enough for the worst sum of clamped and quantised coordinates?"""
    n = len(set(offer.participants))
    if wraps(n, offer.clip_range, offer.scale, offer.ring_bits):
        yield _Objection(
            f"could wrap: {n} sites times range {offer.clip_range} times scale {offer.scale} reaches 2^"
            f"{offer.ring_bits - 1}",
            "ask the coordinator for a smaller scale or clip_range",
        )


def _evaluation(policy: SitePolicy, offer: Offer) -> Iterator[_Objection]:
    """May counts of this site's test rows leave, and is there enough noise on them?"""
    asked = offer.evaluation
    if asked is None:
        return
    if policy.min_evaluation_noise is None:
        yield _Objection(
            "asks for evaluation counts, policy releases none",
            "set min_evaluation_noise in policy.toml or stay out",
        )
    elif asked.noise < policy.min_evaluation_noise:
        yield _outside(
            f"asks for noise {asked.noise} on counts",
            policy.min_evaluation_noise,
            "min_evaluation_noise",
            floor=True,
        )
    if policy.schedule is not Schedule.FREE:
        yield _Objection(
            "evaluates as well as trains, policy's schedule is fixed to one mechanism",
            'set schedule = "free" in policy.toml (Renyi accounting counts then) or stay out',
        )
    if asked.noise_share != asked.noise and offer.privacy.trust is not Trust.AGGREGATE:
        yield _Objection(
            f"has each site add noise {asked.noise_share} to its counts but charges {asked.noise}",
            "report it: with trust = site both are the same",
        )
    if offer.counts > limits.MAX_COUNTS:
        yield _Objection(
            f"asks for {offer.counts} counts, fedfuse handles at most {limits.MAX_COUNTS}",
            'ask the coordinator for evaluation.detail = "accuracy"',
        )
    try:
        most_counted(len(offer.participants), asked.noise_share, offer.ring_bits)
    except ConfigError as problem:
        yield _Objection(f"cannot evaluate: {problem.message}", "ask the coordinator for a wider ring")


def _model(policy: SitePolicy, offer: Offer) -> Iterator[_Objection]:
    """Is it a model this site trains, with code it trains with?"""
    if policy.code and code_hash() not in policy.code:
        yield _Objection(
            f"would be trained on by code {code_hash()[:16]}…, which policy does not list",
            "review what is installed and add what `fedfuse site code` prints to code in policy.toml, or go back to "
            "the version before",
        )
    asked = architecture_hash(offer.model)
    if policy.models and asked not in policy.models:
        yield _Objection(
            f"trains model {asked[:16]}…, which policy does not list",
            f"review the model and add {asked} to models in policy.toml or stay out",
        )


def _plan(policy: SitePolicy, offer: Offer) -> Iterator[_Objection]:
    """Is it a run this site accepted? Asked last: whatever else is wrong says more than a hash."""
    if policy.plans and offer.plan_hash not in policy.plans:
        yield _Objection(
            f"follows plan {offer.plan_hash[:16]}…, which policy does not list",
            "review that plan and add its hash to plans in policy.toml or stay out",
        )


def _outside(asks: str, bound: float, key: str, *, floor: bool = False) -> _Objection:
    """Return the objection to a number beyond the bound a key of the policy sets."""
    least, change = ("least", "lower") if floor else ("most", "raise")
    return _Objection(
        f"{asks}, policy allows at {least} {bound}", f"{change} {key} in policy.toml or stay out"
    )
