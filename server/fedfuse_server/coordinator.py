"""The rounds of a run: offer, collect, open, apply, close; over any of Flower's grids.

Order matters for what a crash may leave behind: an offer is on the ledger before it is sent; a new model is on
disk before its close is on the ledger; the close is on the ledger before the next offer. No step here sees one
site's update: vectors go from the wire into ``ServerSession``'s running sum.
"""

from __future__ import annotations

import math
import secrets

from flwr.serverapp import Grid

from fedfuse_server.attempt import Attempt
from fedfuse_server.books import Books
from fedfuse_server.events import RoundAbandoned, RoundOpened, RoundStarted, RunStopped, SiteLeftOut, tell
from fedfuse_server.exchange import Exchange
from fedfuse_server.home import RunHome, ServerState
from fedfuse_server.optimiser import GlobalModel
from fedfuse_server.plan import Plan, resolve
from fedfuse_shared import limits
from fedfuse_shared.config.base import SERVER, Trust
from fedfuse_shared.envelope import decode, encode, seal, verify
from fedfuse_shared.errors import ConfigError, ProtocolError, RoundAborted, VerificationError, WrongDealer
from fedfuse_shared.evaluation import summarise, tally
from fedfuse_shared.ledger.records import Close, Outcome
from fedfuse_shared.messages import Hello, Introduction, Step
from fedfuse_shared.models import build_model, flatten, layout, model_hash
from fedfuse_shared.offer import Offer
from fedfuse_shared.parcel import Parcel
from fedfuse_shared.secagg.quantise import average
from fedfuse_shared.secagg.server import ServerSession

MAX_ATTEMPTS = 3
"""Attempts at one round before the run stops; every attempt is charged to the sites that trained in it."""

MAX_PAGES = 100
"""Most pages of leaves collected from a site at once: a hostile one could write on for ever; the rest comes later."""


class Coordinator:
    """The server of one run."""

    def __init__(self, grid: Grid, home: RunHome) -> None:
        self._home = home
        self._config = resolve(home.load_config())
        self._enrolment = home.load_roster()
        self._roster = self._enrolment.body
        self._key = home.load_key()
        self._exchange = Exchange(grid, self._config.performance.exchange_timeout)
        self._grid = grid
        model = build_model(self._config.model, self._config.seed)
        if home.state.exists():
            self._state = ServerState.load(home.state)
        else:
            self._state = ServerState(secrets.token_hex(8), 0, GlobalModel(flatten(model)))
            self._state.save(home.state)
        self._plan = Plan(self._state.run, self._config, self._roster, layout(model))
        self._nodes: dict[str, int] = {}
        self._out: set[str] = set()
        """Sites that refused: they are not asked again in this run."""
        self._books = Books(home.ledger, self._roster, self._key)
        if self._books.empty:
            self._books.append(self._enrolment)
        self._recover()

    def _recover(self) -> None:
        """Finish what an earlier process of this run left unfinished; what sites were charged stays charged."""
        if self._state.close:
            close = decode(self._state.close, Close, who=str(self._home.state))
            if close.body.context in self._books.standing:
                self._books.append(close)
            self._publish()
            # Told again: the process before may have ended between the round and the telling.
            self._tell_opened(close.body)
        for offer in list(self._books.standing.values()):
            self._books.sign(self._aborted(offer, "the server was stopped during this attempt"))
        self._books.checkpoint()

    def run(self) -> None:
        """Run the planned rounds; stops early where too few sites are left, with the last opened model standing.

        Raises:
            ConfigError: fewer sites are there than secure aggregation needs.
        """
        try:
            self._meet()
            for number in range(self._state.round + 1, self._config.rounds + 1):
                if not self._round(number):
                    break
            self._settle()
        finally:
            self._books.checkpoint()
            self._books.close()

    # --- before and after the rounds ------------------------------------------------------------------------
    def _meet(self) -> None:
        """Ask every node which site it is; only a site's own signature over a fresh nonce is believed."""
        nonce = secrets.token_hex(32)
        hello = Hello(federation=self._config.federation, run=self._state.run, nonce=nonce)
        body = encode(seal(hello, SERVER, self._key))
        asked = {node: Parcel(body=body) for node in self._grid.get_node_ids()}
        for node, answer in self._exchange.ask(Step.HELLO, asked, "hello").items():
            try:
                if isinstance(answer, ProtocolError):
                    raise answer
                if answer.problem:
                    raise ProtocolError(answer.problem, who=f"node {node}")
                reply = decode(answer.body, Introduction, who=f"node {node}")
                if reply.author in self._nodes or reply.body.model_dump() != hello.model_dump():
                    raise ProtocolError("introduced itself wrongly or twice", who=reply.author)
                verify(reply, self._roster.key_of(reply.author))
                self._nodes[reply.author] = node
            except (ProtocolError, VerificationError) as problem:
                tell(SiteLeftOut(0, problem.who or f"node {node}", Step.HELLO.value, problem.message))
        if len(self._nodes) < limits.MIN_SITES:
            raise ConfigError(
                f"{len(self._nodes)} enrolled sites answered, secure aggregation needs at least {limits.MIN_SITES}",
                advice="start more sites, or look at the sites' logs",
            )
        self._settle()

    def _settle(self) -> None:
        """Collect leaves whose reply was lost, page by page, so that no charge is missing in the log."""
        names = {node: site for site, node in self._nodes.items()}
        for _ in range(MAX_PAGES):
            if not names:
                break
            asked = {node: Parcel(known=self._books.head(site)[0]) for node, site in names.items()}
            for node, answer in self._exchange.ask(Step.SETTLE, asked, "settle").items():
                site = names[node]
                try:
                    if isinstance(answer, ProtocolError):
                        raise answer
                    if self._books.take(site, answer.leaves):
                        continue  # there may be more
                except (ProtocolError, VerificationError) as problem:
                    tell(SiteLeftOut(self._state.round, site, Step.SETTLE.value, problem.message))
                del names[node]

    # --- one round ------------------------------------------------------------------------------------------
    def _round(self, number: int) -> bool:
        """Return whether a round was opened within the allowed attempts."""
        reason = ""
        first = self._books.attempts[number] + 1
        for attempt in range(first, first + MAX_ATTEMPTS):
            willing = sorted(self._nodes.keys() - self._out)
            wanted = self._config.sites_per_round or len(willing)
            if len(willing) < limits.MIN_SITES:
                reason = f"only {len(willing)} sites are left: {', '.join(willing) or 'none'}"
                break
            drawn = secrets.SystemRandom().sample(willing, min(wanted, len(willing)))
            try:
                offer = self._plan.offer(
                    number=number, attempt=attempt, model_hash=self._model_hash(), participants=drawn
                )
            except ConfigError as problem:  # sites that refused left too few for the configured bounds
                reason = str(problem)
                break
            try:
                self._attempt(offer)
            except RoundAborted as problem:
                reason = str(problem)
                self._books.sign(self._aborted(offer, reason))
                tell(RoundAbandoned(number, attempt, reason))
            else:
                return True
        tell(RunStopped(self._state.round, reason))
        return False

    def _attempt(self, offer: Offer) -> None:
        envelope = self._books.sign(offer)
        tell(RoundStarted(offer.round, offer.attempt, offer.participants))
        attempt = Attempt(self._exchange, self._books, self._nodes, envelope, self._roster, self._key)
        try:
            session = attempt.run(self._state.model.weights.astype("<f4").tobytes())
            self._apply(offer, session)
        except WrongDealer as problem:
            # Proven by its own signatures: it is not asked again in this run.
            self._out.add(str(problem.who))
            raise
        finally:
            self._out |= attempt.refused

    def _apply(self, offer: Offer, session: ServerSession) -> None:
        total = session.open()
        update, _ = average(total, offer, len(session.vectors))
        if offer.privacy.trust is Trust.AGGREGATE:
            # What was opened is a sum of gradients: one step against it, by public constants alone.
            update *= -offer.training.step_size(offer.privacy.noise_share) / offer.privacy.expected_batch_size
        model = self._state.model
        model.apply(update, self._config.aggregation)
        agreement = session.agreement()
        close = Close(
            context=session.context,
            outcome=Outcome.OPENED,
            reason="",
            keys_hash=agreement.keys_hash,
            dealings_hash=agreement.dealings_hash,
            survivors=session.vectors,
            agreements=session.agreements,
            model_hash=self._model_hash(),
            counts=tally(total, offer),
        )
        # The model and the close that states it reach the disk in one write, the ledger after them.
        signed = seal(close, SERVER, self._key)
        self._state = ServerState(self._state.run, offer.round, model, encode(signed))
        self._state.save(self._home.state)
        self._books.append(signed)
        self._publish()
        self._books.checkpoint()
        self._tell_opened(close)

    def _tell_opened(self, close: Close) -> None:
        evaluated, asked = None, self._config.evaluation
        if close.counts and asked.noise is not None:
            noise = asked.noise * math.sqrt(len(close.survivors))
            evaluated = summarise(close.counts, asked.detail, noise)
        published = self._state.model.published
        tell(RoundOpened(self._state.round, tuple(sorted(close.survivors)), published, evaluated))

    def _publish(self) -> None:
        published = self._state.model.published
        self._home.publish(self._config.model, published, round_number=self._state.round)

    def _aborted(self, offer: Offer, reason: str) -> Close:
        return Close(
            context=offer.context(),
            outcome=Outcome.ABORTED,
            reason=reason[:400],
            keys_hash=None,
            dealings_hash=None,
            survivors={},
            agreements={},
            model_hash=None,
        )

    def _model_hash(self) -> str:
        return model_hash(self._state.model.weights, self._plan.layout)
