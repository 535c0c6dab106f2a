"""Rounds in which anything may happen between two steps: what is promised holds in every interleaving.

Sites drop out, restart from what they stored, are sent earlier messages again, other sites' messages, garbage, and
what a lying server makes of signed parts; the server is given everything twice. Whatever happens, only typed errors
are raised, a sum that is opened is exact, no site answers a step in two ways or reveals both shares of one peer, and
all that reveal do so for the same survivors.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.federation import Federation, Round
from support.weakened import Weakening, weaken

from fedfuse_shared.config.base import SERVER
from fedfuse_shared.envelope import decode, encode, seal
from fedfuse_shared.errors import FedfuseError, RoundAborted
from fedfuse_shared.messages import Delivery, KeyList, Reveal, Survivors, Unmasking
from fedfuse_shared.offer import Segment
from fedfuse_shared.secagg.bounds import Bounds
from fedfuse_shared.secagg.packing import RING_BITS
from fedfuse_shared.secagg.server import ServerPhase

LENGTH = 11
HANDLERS = {"deal": KeyList, "accept_delivery": Delivery, "agree": Survivors, "reveal": Unmasking}


class Rounds(RuleBasedStateMachine):
    """One round, its faults, and what is known to have left each site."""

    @initialize(data=st.data())
    def begin(self, data):
        if data.draw(st.booleans(), label="sparse"):
            self.federation, bounds = Federation.of(12), Bounds(12, 3, 0, 11, 6)
        else:
            n = data.draw(st.integers(3, 7), label="sites")
            self.federation = Federation.of(n)
            c = data.draw(st.integers(0, -(-n // 3) - 1), label="colluders")
            t = data.draw(st.integers((n + c) // 2 + 1, n), label="threshold")
            m = data.draw(st.integers(max(t, c + 2), n), label="min_survivors")
            bounds = Bounds(n, t, c, m)
        bounds.check()
        offer = self.federation.offer(
            bounds=bounds,
            ring_bits=data.draw(st.sampled_from(RING_BITS), label="bits"),
            layout=(Segment(name="head", size=LENGTH),),
        )
        self.round = Round(self.federation, offer, seed=str(data.draw(st.integers(0, 10**6), label="seed")))
        self.numbers = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="inputs"))
        self.words = {n: self.numbers.integers(0, 2**32, LENGTH, dtype=np.uint32) for n in offer.participants}
        self.present = list(offer.participants)
        self.told: dict[str, bytes] = {}
        self.messages: list[bytes] = []
        self.left: dict[tuple[str, str], bytes] = {}
        self.reveals: dict[str, Reveal] = {}
        self.total = None
        self.over = False

    # --- the round goes on ----------------------------------------------------------------------------------
    @precondition(lambda self: not self.over)
    @rule(data=st.data())
    def advance(self, data):
        """Play one exchange: who is left answers in any order, but for up to two who drop out."""
        order = data.draw(st.permutations(self.present), label="order")
        lost = order[: data.draw(st.sampled_from([0, 0, 0, 0, 1, 2]), label="lost")]
        play = {
            ServerPhase.KEYS: self._keys,
            ServerPhase.DEALINGS: self._dealings,
            ServerPhase.VECTORS: self._vectors,
            ServerPhase.AGREEMENTS: self._agreements,
            ServerPhase.REVEALS: self._reveals,
        }[self.round.server._phase]
        try:
            play([name for name in order if name not in lost])
        except RoundAborted:
            self.over = True
        self.messages += self.told.values()
        self.present = list(self.told)

    def _keys(self, names):
        for name in names:
            self._take(self.round.server.receive_keys, name, self.round.sites[name].advertise())
        self.told = self.round.server.key_lists()

    def _dealings(self, names):
        for name in names:
            reply = self.round.sites[name].deal(self.told[name])
            self._note(name, "deal", reply)
            self._take(self.round.server.receive_dealing, name, reply)
        self.told = self.round.server.deliveries()

    def _vectors(self, names):
        for name in names:
            self.round.sites[name].accept_delivery(self.told[name])
            masked, vector_hash = self.round.sites[name].mask(self.words[name].copy())
            self._note(name, "vector", masked)
            self._take(self.round.server.receive_vector, name, self.round.receipt(name, vector_hash), masked)
        self.senders = names
        self.told = self.round.server.survivors()

    def _agreements(self, names):
        for name in names:
            reply = self.round.sites[name].agree(self.told[name])
            self._note(name, "agree", reply)
            self._take(self.round.server.receive_agreement, name, reply)
        self.told = self.round.server.unmasking()

    def _reveals(self, names):
        for name in names:
            raw = self.round.sites[name].reveal(self.told[name])
            self._note(name, "reveal", raw)
            self._take(self.round.server.receive_reveal, name, raw)
        self.over = True
        self.total = self.round.server.open()

    def _take(self, take, *arguments):
        """Give the server what a site sent, and again: nothing is counted twice."""
        take(*arguments)
        self._expect_refusal(take, *arguments)

    def _note(self, name, what, reply):
        """Remember what left a site; it has one answer to each step."""
        known = self.left.setdefault((name, what), reply)
        assert known == reply, f"{name} answered {what} in two ways"
        if what == "reveal":
            body = decode(reply, Reveal, who=name).body
            assert not body.seed_shares.keys() & body.mask_shares.keys(), "both shares of one peer"
            self.reveals[name] = body

    # --- what may happen in between -------------------------------------------------------------------------
    @rule(data=st.data())
    def restart(self, data):
        """A site's process is killed; a new one goes on from what was stored."""
        self.round.restart(data.draw(st.sampled_from(sorted(self.round.sites)), label="site"))

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def earlier_message(self, data):
        """A site is sent any message of the server again, or one that was meant for another step or site."""
        raw = data.draw(st.sampled_from(self.messages), label="message")
        self._send(data, raw)

    @rule(data=st.data(), raw=st.binary(max_size=40))
    def garbage(self, data, raw):
        """A site, and the server, are sent bytes that nobody signed."""
        self._send(data, raw)
        name = data.draw(st.sampled_from(sorted(self.round.sites)), label="from")
        for take in (
            self.round.server.receive_keys,
            self.round.server.receive_dealing,
            self.round.server.receive_agreement,
            self.round.server.receive_reveal,
        ):
            self._expect_refusal(take, name, raw)

    @precondition(lambda self: self.told and self.round.server._phase is not ServerPhase.OPENED)
    @rule(data=st.data())
    def part_of_the_truth(self, data):
        """A lying server shows a site some of what was signed: a smaller set than the others see."""
        name = data.draw(st.sampled_from(sorted(self.told)), label="site")
        phase = self.round.server._phase
        kind = {
            ServerPhase.DEALINGS: KeyList,
            ServerPhase.VECTORS: Delivery,
            ServerPhase.AGREEMENTS: Survivors,
            ServerPhase.REVEALS: Unmasking,
        }[phase]
        body = decode(self.told[name], kind, who=SERVER).body
        field = {KeyList: "keys", Delivery: "notes", Survivors: "vectors", Unmasking: "agreements"}[kind]
        whole = getattr(body, field)
        keep = data.draw(st.sets(st.sampled_from(range(len(whole)))), label="shown")
        if isinstance(whole, dict):
            part = {key: whole[key] for place, key in enumerate(whole) if place in keep}
        else:
            part = tuple(item for place, item in enumerate(whole) if place in keep)
        if len(part) == len(whole):
            return
        lie = seal(body.model_copy(update={field: part}), SERVER, self.federation.server)
        self._send(data, encode(lie), name)

    def _send(self, data, raw, name=None):
        name = name or data.draw(st.sampled_from(sorted(self.round.sites)), label="site")
        site = self.round.sites[name]
        fitting = [name for name, kind in HANDLERS.items() if b'"kind":"' + kind.kind.encode() + b'"' in raw]
        handler = data.draw(st.sampled_from(fitting or sorted(HANDLERS)), label="handler")
        before = site.state
        try:
            reply = getattr(site, handler)(raw)
        except FedfuseError:
            assert site.state == before, "a refused message changed the state"
            return
        # The message was good: the lie was one this site cannot see through. It is out of step with the others now,
        # as a site that answered a server which then ignored it would be.
        if handler == "accept_delivery":
            # It trains anew: another vector than before, if it had one.
            reply, _ = site.mask(self.numbers.integers(0, 2**32, LENGTH, dtype=np.uint32))
            handler = "vector"
        self._note(name, handler, reply)
        if name in self.present:
            self.present.remove(name)
            self.told.pop(name, None)
        if not self.present:
            self.over = True

    def _expect_refusal(self, take, *arguments):
        try:
            take(*arguments)
        except FedfuseError:
            return
        raise AssertionError("the server took what it must not")

    # --- what always holds ----------------------------------------------------------------------------------
    @invariant()
    def whoever_reveals_does_so_for_the_same_survivors(self):
        shown = [set(reveal.seed_shares) for reveal in self.reveals.values()]
        dropped = [set(reveal.mask_shares) for reveal in self.reveals.values()]
        assert not set().union(*shown) & set().union(*dropped)

    @invariant()
    def an_opened_sum_is_exact(self):
        if self.total is None:
            return
        expected = sum(self.words[name].astype(object) for name in self.senders)
        assert self.total.tolist() == (expected % 2**self.round.offer.ring_bits).tolist()


Rounds.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRounds = Rounds.TestCase


@pytest.mark.parametrize(
    "weakening",
    [
        Weakening("secagg.site", "if self._state.phase not in phases:", "if False:"),
        Weakening(
            "secagg.site",
            "            elif item.shares is not None:\n",
            "            if item.shares is not None:\n",
        ),
        Weakening("secagg.server", "if site in seen:", "if False:"),
        Weakening("secagg.masking", "return Mask(mask.key, subtract=not mask.subtract)", "return mask"),
    ],
    ids=["any step at any time", "both kinds of shares", "counted twice", "masks put on again"],
)
def test_the_machine_finds_what_was_weakened(weakening, monkeypatch):
    weaken(monkeypatch, [weakening])
    with pytest.raises((AssertionError, FedfuseError)):
        # Found is enough: the smallest example is not looked for.
        run_state_machine_as_test(
            Rounds,
            settings=settings(
                Rounds.TestCase.settings, max_examples=400, phases=[Phase.generate], database=None
            ),
        )
