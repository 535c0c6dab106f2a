"""One round as the site sees it: check, reserve, train, mask, receipt; durable before it is sent.

Every handler may run in a fresh process: what a step needs of the steps before comes from the site's store, and a
step that was answered is answered again with the identical bytes. Nothing here imports torch before the offer is
checked and the privacy is reserved.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from fedfuse_client.home import SiteHome
from fedfuse_client.learner import Learner
from fedfuse_client.policy import check_offer
from fedfuse_shared.config.base import SERVER, Frozen
from fedfuse_shared.envelope import Envelope, canonical, decode, encode, seal, verify
from fedfuse_shared.errors import BudgetError, PolicyError, ProtocolError, StateError, VerificationError
from fedfuse_shared.ledger.records import Leave, Policy, Receipt, Refusal
from fedfuse_shared.messages import Hello, Introduction, Step
from fedfuse_shared.offer import Offer
from fedfuse_shared.parcel import Parcel
from fedfuse_shared.secagg.site import SiteSession, SiteState

log = logging.getLogger(__name__)

_SAYABLE = (PolicyError, BudgetError, ProtocolError, VerificationError)
"""Errors whose text is made of public values alone (offer, policy, ledger, roster) and may leave the site."""

LEAVES_PER_ANSWER = 1000
"""Leaves of the chain handed over at once; the server asks again while there are more."""
_OWN_LOG = "cannot take part in this step; the reason is in the site's own log"
_MAX_REASON = 400
_CLOCK_STEP = 300
"""How far a clock may be put back while an attempt goes on (seconds): time servers correct by less."""
_LENGTH = 8
"""Bytes that say how long a stored reply's message is; the vector follows it."""


class _Stored(Frozen):
    """What the store holds of a round in progress; secret."""

    offer: Envelope[Offer]
    session: SiteState


class Site:
    """One site of one federation, as its messages are answered.

    Args:
        home: Its folder.
        clock: Seconds since 1970.
        threads: Threads that torch may use; left out, as many as the process was given.
    """

    def __init__(
        self, home: SiteHome, clock: Callable[[], float] = time.time, *, threads: int | None = None
    ) -> None:
        self._clock = clock
        self._policy = home.load_policy()
        self._me = home.load_identity(self._policy)
        self._store = home.open_store()
        self._chain = self._store.chain(self._policy.federation, self._policy.site)
        self._learner = Learner(self._policy, threads=threads)
        self._charged: Offer | None = None
        self.erase_expired()

    def foresee(self) -> None:
        """Account for one more round like the last, whose offer is then checked at once; charges nothing."""
        offer, self._charged = self._charged, None
        if offer is not None:
            with suppress(PolicyError, BudgetError):  # it would be refused: said when it is asked for
                self._chain.check_budget(self._policy, offer, self._learner.dataset(self._store))

    def close(self) -> None:
        """Let go of the store, so that another process can have it."""
        self._store.close()

    def answer(self, step: Step, parcel: Parcel) -> Parcel:
        """Return the answer to one message; a problem is said in the answer and changes nothing it should not."""
        body, vector, problem = b"", b"", ""
        leaves: tuple[bytes, ...] = ()
        try:
            self.erase_expired()
            if step is Step.HELLO:
                body = self._introduce(parcel)
            elif step is not Step.SETTLE:
                body, vector = self._in_round(step, parcel)
        except _SAYABLE as error:
            problem = str(error)
        except StateError as error:  # of this site's files: its words are for its operator
            log.error("%s: step %s failed: %s", self._policy.site, step.value, error)  # noqa: TRY400 - no bug
            problem = _OWN_LOG
        except Exception:  # whatever else went wrong may hold file names, rows or counts: those stay here
            log.exception("%s: step %s failed", self._policy.site, step.value)
            problem = _OWN_LOG
        if (
            step is not Step.HELLO
        ):  # the server does not know yet who asks, nor what it has of this site's chain
            leaves = tuple(self._chain.leaves_after(parcel.known)[:LEAVES_PER_ANSWER])
        return Parcel(parcel.context, body, leaves, 0, vector, problem)

    # --- outside rounds -------------------------------------------------------------------------------------
    def _introduce(self, parcel: Parcel) -> bytes:
        hello = decode(parcel.body, Hello, who=SERVER)
        verify(hello, self._me.roster.key_of(SERVER))
        if hello.author != SERVER or hello.body.federation != self._policy.federation:
            raise ProtocolError("greets another federation", who=SERVER)
        self._publish_policy()
        return encode(seal(Introduction(**hello.body.model_dump()), self._me.name, self._me.key))

    def _publish_policy(self) -> None:
        """Put the policy that rules now on the ledger, if it is not the one that stands there."""
        if self._chain.latest(Leave) is not None:
            return  # it still says who it is, so that the server can ask for its last leaf
        published = self._chain.latest(Policy)
        if published is None or published.body.policy_hash != self._policy.hash():
            self._chain.append(self._policy.leaf, self._me.key)

    # --- in a round -----------------------------------------------------------------------------------------
    def _in_round(self, step: Step, parcel: Parcel) -> tuple[bytes, bytes]:
        self._chain.check_member()
        if not parcel.leaves:
            raise ProtocolError("does not show this site's last leaf on the ledger", who=SERVER)
        # In every step: a store restored in the middle of a round would mask a second vector.
        self._chain.check_head(parcel.leaves[-1], self._me.key.public_key().public_bytes_raw())
        answered = self._store.load_reply(parcel.context, step.value)
        if answered is not None:
            return _split(answered)
        if step is Step.KEYS:
            return self._begin(parcel), b""
        stored = self._load(parcel.context)
        session = SiteSession(stored.offer.body, self._me, os.urandom, stored.session)
        if step is Step.UPDATE:
            return self._update(session, stored.offer, parcel)
        reply = {Step.SHARES: session.deal, Step.AGREE: session.agree, Step.UNMASK: session.reveal}[step](
            parcel.body
        )
        if step is Step.UNMASK:
            # Only the reply is kept, to be sent again; the round's secrets are gone.
            self._store.finish(parcel.context, step.value, _join(reply))
        else:
            self._save(step, stored.offer, session, _join(reply))
        return reply, b""

    def _begin(self, parcel: Parcel) -> bytes:
        """Check the offer, remember it, and return this context's public keys."""
        envelope = decode(parcel.body, Offer, who=SERVER)
        verify(envelope, self._me.roster.key_of(SERVER))
        offer = envelope.body
        if envelope.author != SERVER or offer.context() != parcel.context:
            raise ProtocolError("sent an offer under another context", who=SERVER)
        if self._store.is_finished(parcel.context):
            raise ProtocolError("offers an attempt that is over", who=SERVER)
        # It may have been edited since the last greeting: nothing is charged under a cap that nobody can see.
        self._publish_policy()
        try:
            check_offer(self._policy, offer)
            self._check_enrolled(offer)
            self._learner.check_classes(offer)
            self._chain.check_budget(self._policy, offer, self._learner.dataset(self._store))
        except (PolicyError, BudgetError) as problem:
            self._refuse(parcel.context, str(problem))
            raise
        # A site is in one attempt at a time: whatever was begun before is over, its secrets are overwritten.
        for context in self._store.stored_contexts():
            self._store.erase(context)
        session = SiteSession(offer, self._me, os.urandom)
        reply = session.advertise()
        # An offer says how long, this site's own clock says when.
        self._save(Step.KEYS, envelope, session, _join(reply), expires=self._clock() + offer.lifetime)
        return reply

    def _check_enrolled(self, offer: Offer) -> None:
        """Refuse participants that are on no roster: they would count towards the policy's floors and never come."""
        strangers = sorted(set(offer.participants) - self._me.roster.sites.keys())
        if strangers:
            raise PolicyError(
                f"offer of round {offer.round} names {len(strangers)} sites that are not enrolled, as {strangers[0]}",
                who=f"site {self._policy.site}",
                advice="report it: the roster this site pins does not list them",
            )

    def _refuse(self, context: str, reason: str) -> None:
        if self._chain.find(Refusal, context) is None:
            self._chain.append(
                lambda seq, prev: Refusal(seq=seq, prev=prev, context=context, reason=reason[:_MAX_REASON]),
                self._me.key,
            )

    def _update(self, session: SiteSession, envelope: Envelope[Offer], parcel: Parcel) -> tuple[bytes, bytes]:
        """Reserve, train, mask and write the receipt; return the masked vector."""
        offer = envelope.body
        weights = self._learner.check_weights(offer, parcel.vector)
        self._learner.check_gradients(offer)
        session.accept_delivery(parcel.body)
        self._chain.reserve(self._policy, offer, self._learner.dataset(self._store), self._me.key)
        # From here on nothing may refuse or vary with the data (design page 2).
        words = self._learner.update(offer, weights)
        vector, vector_hash = session.mask(words)
        with self._store.transaction():
            self._chain.append(
                lambda seq, prev: Receipt(
                    seq=seq,
                    prev=prev,
                    context=offer.context(),
                    steps=offer.privacy.steps,
                    vector_hash=vector_hash,
                ),
                self._me.key,
            )
            self._save(Step.UPDATE, envelope, session, _join(b"", vector))
        self._charged = offer
        return b"", vector

    # --- the store ------------------------------------------------------------------------------------------
    def _save(
        self,
        step: Step,
        offer: Envelope[Offer],
        session: SiteSession,
        reply: bytes,
        *,
        expires: float | None = None,
    ) -> None:
        stored = canonical(_Stored(offer=offer, session=session.state))
        self._store.save_step(session.state.context, step.value, stored, reply, expires=expires)

    def erase_expired(self) -> bool:
        """Erase the secrets of attempts whose deadline has passed, and return whether other attempts' are left."""
        longest = self._policy.max_lifetime + _CLOCK_STEP
        for context in self._store.erase_expired(self._clock(), longest=longest):
            log.warning(
                "%s: attempt %s was not finished in time; its secrets are erased",
                self._policy.site,
                context[:16],
            )
        return bool(self._store.stored_contexts())

    def _load(self, context: str) -> _Stored:
        found = self._store.load_state(context)
        if found is None:
            raise ProtocolError("continues an attempt that this site is not in", who=SERVER)
        try:
            return _Stored.model_validate_json(found[1])
        except ValidationError as problem:
            raise StateError(
                "a stored round cannot be read", who=self._policy.site, advice="wait for the next attempt"
            ) from problem


def _join(body: bytes, vector: bytes = b"") -> bytes:
    return len(body).to_bytes(_LENGTH, "big") + body + vector


def _split(reply: bytes) -> tuple[bytes, bytes]:
    end = _LENGTH + int.from_bytes(reply[:_LENGTH], "big")
    return reply[_LENGTH:end], reply[end:]


_open: dict[str, Site] = {}
"""One process may serve many messages of one site, or of many in a simulation; each store is opened once."""


def site_in(folder: str) -> Site:
    """Return the site in a folder.

    Raises:
        FedfuseError: its policy, key, roster or store cannot be used.
    """
    if folder not in _open:
        _open[folder] = Site(SiteHome(Path(folder)))
    return _open[folder]


def close_sites() -> None:
    """Let go of every store this process holds."""
    while _open:
        _open.popitem()[1].close()
