"""The rounds of a run: offer, collect, open, apply, close; over any of Flower's grids.

Order matters for what a crash may leave behind: an offer is on the ledger before it is sent; a new model is on
disk before its close is on the ledger; the close is on the ledger before the next offer. No step here sees one
site's update: vectors go from the wire into ``ServerSession``'s running sum.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

from flwr.serverapp import Grid

from fedfuse_server.attempt import Attempt
from fedfuse_server.attendance import Attendance
from fedfuse_server.books import Books
from fedfuse_server.events import (
    RoundAbandoned,
    RoundOpened,
    RoundStarted,
    RunStopped,
    SitesOut,
    SitesThere,
    tell,
)
from fedfuse_server.exchange import Exchange
from fedfuse_server.home import RunHome, ServerState
from fedfuse_server.optimiser import GlobalModel
from fedfuse_server.orders import Orders
from fedfuse_server.plan import Plan, bounds_for, evaluation, plan_hash, resolve
from fedfuse_shared import limits
from fedfuse_shared.config.base import SERVER, Trust
from fedfuse_shared.envelope import decode, encode, seal
from fedfuse_shared.errors import ConfigError, RoundAborted, WrongDealer
from fedfuse_shared.evaluation import summarise, tally
from fedfuse_shared.ledger.records import Close, Outcome
from fedfuse_shared.models import build_model, flatten, layout, model_hash
from fedfuse_shared.offer import Offer
from fedfuse_shared.secagg.quantise import average
from fedfuse_shared.secagg.server import ServerSession

MAX_ATTEMPTS = 3
"""Attempts at one round before the run stops; every attempt is charged to the sites that trained in it."""

Excluded = Callable[[set[str]], None]
"""Told of sites that are out, so that they cannot even connect."""


class Coordinator:
    """The server of one run.

    Args:
        grid: Flower's Grid: in-process, Ray or a SuperLink.
        home: The run's folder.
        command: A coordinator's signed command to run this plan; needed where the roster names coordinators, unless
            the ledger has one of this plan.
        wait: Seconds to wait for sites that are missing; None: whoever is there now is all there will be.
        excluded: Told of sites that are out.

    Raises:
        CommandRefused: the command's author may not give it; the refusal is on the ledger.
        ConfigError: the settings are wrong, or nobody who may ordered this plan.
        StateError: a file of the run cannot be used.
    """

    def __init__(
        self,
        grid: Grid,
        home: RunHome,
        *,
        command: bytes | None = None,
        wait: float | None = None,
        excluded: Excluded | None = None,
    ) -> None:
        self._home = home
        self._config = resolve(home.load_config())
        self._enrolment = home.load_roster()
        self._roster = self._enrolment.body
        self._key = home.load_key()
        self._wait = wait
        self._excluded = excluded
        self._books = Books(home.ledger, self._roster, self._key)
        try:
            if self._books.empty:
                self._books.append(self._enrolment)
            self._orders = Orders(self._books, self._roster, home.commands)
            self._check_order(command)
            self._exchange = Exchange(grid, self._config.performance.exchange_timeout)
            model = build_model(self._config.model, self._config.seed)
            if home.state.exists():
                self._state = ServerState.load(home.state)
            else:
                self._state = ServerState(secrets.token_hex(8), 0, GlobalModel(flatten(model)))
                self._state.save(home.state)
            self._plan = Plan(self._state.run, self._config, self._roster, layout(model))
            self._out: set[str] = set()
            """Sites that refused: they are not asked again in this run."""
            self._shown: set[str] = set()
            """Sites of which it was told that they are out."""
            self._there = Attendance(
                grid, self._exchange, self._roster, self._books, self._key, self._state.run
            )
            self._recover()
        except BaseException:
            self._books.close()
            raise

    def _check_order(self, command: bytes | None) -> None:
        """Carry out a command to run; without one, see that the ledger has one, where the roster asks for it."""
        if command is not None:
            self._orders.give(command)
        planned = plan_hash(self._config, len(self._roster.sites))
        if self._roster.coordinators and self._books.plan != planned:
            raise ConfigError(
                "no coordinator ordered this plan",
                who=str(self._home.config),
                advice="start it with `fedfuse server run HOME --as coordinator.key`",
            )

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

    @property
    def round(self) -> int:
        """The last round that was opened."""
        return self._state.round

    def run(self) -> None:
        """Run the planned rounds; stops early where too few sites are left, with the last opened model standing.

        Raises:
            ConfigError: fewer sites are there than secure aggregation needs.
        """
        try:
            self._meet()
            if len(self._there.nodes) < limits.MIN_SITES:
                raise ConfigError(
                    f"{len(self._there.nodes)} enrolled sites answered, secure aggregation needs at least "
                    f"{limits.MIN_SITES}",
                    advice="start more sites, or look at the sites' logs",
                )
            for number in range(self._state.round + 1, self._config.rounds + 1):
                if not self._round(number):
                    break
            self._there.settle()
        finally:
            self._books.checkpoint()
            self._books.close()

    # --- before and after the rounds ------------------------------------------------------------------------
    def _meet(self) -> None:
        """Carry out what was ordered meanwhile, and see who is there."""
        self._show_out()  # those of an earlier process must not even connect
        self._there.gather(self._wait, self._least(), lambda: self._out)
        before = len(self._books.given)
        self._orders.take_waiting()  # refusals are logged there
        if len(self._books.given) != before:
            self._there.settle(
                sorted(self._books.revoked)
            )  # what they were charged for belongs on the ledger
        self._show_out()
        tell(SitesThere(tuple(sorted(self._there.nodes.keys() - self._books.out))))

    def _show_out(self) -> None:
        """Tell of sites that are out since it was last told."""
        if self._books.out - self._shown:
            self._shown |= self._books.out
            tell(SitesOut(tuple(sorted(self._books.out))))
            if self._excluded is not None:
                self._excluded(self._books.out)

    def _least(self) -> int:
        """Return the fewest sites the configured bounds allow a round with."""
        enrolled = len(self._roster.sites)
        for participants in range(limits.MIN_SITES, enrolled):
            try:
                bounds_for(self._config, enrolled, participants)
            except ConfigError:
                continue
            return participants
        return enrolled

    # --- one round ------------------------------------------------------------------------------------------
    def _round(self, number: int) -> bool:
        """Return whether a round was opened within the allowed attempts."""
        reason = ""
        first = self._books.attempts[number] + 1
        for attempt in range(first, first + MAX_ATTEMPTS):
            self._meet()
            willing = sorted(self._there.nodes.keys() - self._out - self._books.out)
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
        attempt = Attempt(self._exchange, self._books, self._there.nodes, envelope, self._roster, self._key)
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
        offered = evaluation(self._config, len(self._roster.sites))
        if close.counts and offered is not None:
            noise = offered.noise_share * math.sqrt(len(close.survivors))
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
