"""The server's side of one round, as a state machine without I/O.

It holds public keys, sealed shares it cannot open, one running sum of masked vectors, and the shares that open
exactly that sum. There is no place in it for one site's vector: a vector is added to the sum when it arrives and
is not kept, and masks come off the sum chunk by chunk, so that memory does not grow with the sites.

A site that breaks a rule raises an error that names it, changes nothing, and is left out; a step that leaves too few
sites raises RoundAborted.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from enum import IntEnum

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_shared.config.base import SERVER
from fedfuse_shared.crypto import shamir
from fedfuse_shared.crypto.derive import End
from fedfuse_shared.crypto.keys import agree, public_of
from fedfuse_shared.crypto.keystream import Mask, Words, apply_masks
from fedfuse_shared.crypto.sealing import RandomBytes
from fedfuse_shared.envelope import Envelope, T, decode, encode, verify
from fedfuse_shared.envelope import seal as sign
from fedfuse_shared.errors import ProtocolError, RoundAborted, WrongDealer
from fedfuse_shared.ledger.records import Receipt
from fedfuse_shared.messages import (
    Agreement,
    Dealing,
    Delivery,
    KeyList,
    Reveal,
    Roll,
    RoundBody,
    RoundKeys,
    ShareNote,
    Survivors,
    Unmasking,
)
from fedfuse_shared.offer import Offer
from fedfuse_shared.roster import Roster
from fedfuse_shared.secagg import transcript
from fedfuse_shared.secagg.graph import COMPLETE, Graph
from fedfuse_shared.secagg.masking import MaskOwner, inverse, pair_masks, self_mask
from fedfuse_shared.secagg.packing import add_packed
from fedfuse_shared.secagg.quantise import vector_length
from fedfuse_shared.secagg.transcript import ShareKind


class ServerPhase(IntEnum):
    """Which replies the server is collecting."""

    KEYS = 1
    DEALINGS = 2
    VECTORS = 3
    AGREEMENTS = 4
    REVEALS = 5
    OPENED = 6


class ServerSession:
    """The server in one attempt at one round."""

    def __init__(
        self, offer: Offer, roster: Roster, key: Ed25519PrivateKey, random_bytes: RandomBytes
    ) -> None:
        self._offer = offer
        self._roster = roster
        self._key = key
        self._context = offer.context()
        self._phase = ServerPhase.KEYS
        self._probe = random_bytes(32)
        self._proof = max(2, min(offer.threshold, offer.colluders + 1))
        """Sites whose word proves that a dealer sealed garbage: not all of them lie, as c may and any one may. On a
        sparse graph no site has t corrupt neighbours."""
        self._points = {name: place for place, name in enumerate(offer.participants, start=1)}
        self._keys: dict[str, Envelope[RoundKeys]] = {}
        self._public: set[str] = set()
        """Every key advertised so far."""
        self._graph: Graph | None = None
        self._notes: dict[str, dict[str, Envelope[ShareNote]]] = {}
        self._sum = np.zeros(vector_length(offer), dtype=np.uint32)
        self._vectors: dict[str, str] = {}
        self._agreed: Agreement | None = None
        self._agreements: dict[str, Envelope[Agreement]] = {}
        self._reveals: dict[str, Reveal] = {}

    @property
    def context(self) -> str:
        """The hash of the offer this session serves."""
        return self._context

    @property
    def vectors(self) -> dict[str, str]:
        """Whose masked vectors arrived, U3, and their hashes."""
        return dict(self._vectors)

    @property
    def agreements(self) -> dict[str, str]:
        """Who signed the survivors, and the signatures."""
        return {name: envelope.sig for name, envelope in self._agreements.items()}

    def agreement(self) -> Agreement:
        """Return what every site must sign in step 4: U1, U2 and U3 as this server saw them."""
        return Agreement(
            context=self._context,
            keys_hash=transcript.roll_hash(self._context, "keys", self._keys_roll()),
            dealings_hash=transcript.roll_hash(self._context, "dealings", self._dealings_roll()),
            survivors_hash=transcript.roll_hash(self._context, "vectors", self._vectors_roll()),
        )

    def _keys_roll(self) -> Roll:
        keys = {name: (e.body.channel, e.body.mask) for name, e in self._keys.items()}
        return transcript.roll(self._offer.participants, keys, transcript.keys_items(self._context, keys))

    def _dealings_roll(self) -> Roll:
        commitments = {name: self._commitment(name) for name in self._notes}
        items = transcript.dealings_items(self._context, commitments)
        return transcript.roll(self._offer.participants, commitments, items)

    def _vectors_roll(self) -> Roll:
        items = transcript.vectors_items(self._context, self._vectors)
        return transcript.roll(self._offer.participants, self._vectors, items)

    def _told(self, roll: Roll) -> Roll | None:
        """Return a roll as it is told: on the complete graph a site sees the whole set itself."""
        return None if self._offer.neighbours == COMPLETE else roll

    def _around(self, site: str) -> frozenset[str]:
        """Return a site's neighbourhood in U1."""
        if self._graph is None:
            raise RuntimeError("the graph is not there before keys are closed")
        return self._graph.around(site)

    # --- 1. keys --------------------------------------------------------------------------------------------
    def receive_keys(self, site: str, raw: bytes) -> None:
        """Take a site's two public keys.

        Raises:
            ProtocolError: malformed, out of order, or an unusable key.
            VerificationError: the signature does not hold.
        """
        envelope = self._open(ServerPhase.KEYS, site, raw, RoundKeys, self._offer.participants, self._keys)
        body = envelope.body
        for key in (body.channel, body.mask):
            agree(self._probe, bytes.fromhex(key), who=site)
        if body.channel == body.mask or {body.channel, body.mask} & self._public:
            raise ProtocolError("advertised a public key that is already in use in this round", who=site)
        self._public |= {body.channel, body.mask}
        self._keys[site] = envelope

    def key_lists(self) -> dict[str, bytes]:
        """Close step 1 and return what each member of U1 is sent.

        Raises:
            RoundAborted: too few sites advertised keys.
        """
        self._close(ServerPhase.KEYS, len(self._keys), "advertised keys")
        roll = self._keys_roll()
        self._graph = Graph(
            transcript.roll_hash(self._context, "keys", roll), self._keys, self._offer.neighbours
        )

        def told(around: frozenset[str]) -> KeyList:
            keys = tuple(self._keys[name] for name in sorted(around))
            return KeyList(context=self._context, keys=keys, roll=self._told(roll))

        return self._to_each(self._keys, told)

    # --- 2. shares ------------------------------------------------------------------------------------------
    def receive_dealing(self, site: str, raw: bytes) -> None:
        """Take a site's sealed shares, one note for every member of its neighbourhood.

        Raises:
            ProtocolError: malformed, out of order, or not exactly one note for each.
            VerificationError: a signature does not hold.
        """
        dealing = self._open(ServerPhase.DEALINGS, site, raw, Dealing, tuple(self._keys), self._notes).body
        notes: dict[str, Envelope[ShareNote]] = {}
        for note in dealing.notes:
            if note.author != site or note.kind != ShareNote.kind or note.body.context != self._context:
                raise ProtocolError("dealt a note that is not its own for this attempt", who=site)
            verify(note, self._roster.key_of(site))
            if note.body.holder in notes:
                raise ProtocolError(f"dealt twice to {note.body.holder}", who=site)
            notes[note.body.holder] = note
        if notes.keys() != self._around(site) or len({n.body.seed_commitment for n in notes.values()}) != 1:
            raise ProtocolError("did not deal one and the same secret to every site of the round", who=site)
        self._notes[site] = notes

    def deliveries(self) -> dict[str, bytes]:
        """Close step 2 and return what each member of U2 is sent.

        Raises:
            RoundAborted: too few sites dealt shares.
        """
        self._close(ServerPhase.DEALINGS, len(self._notes), "dealt shares")
        told = self._told(self._dealings_roll())
        found = {}
        for holder in sorted(self._notes):
            notes = tuple(self._notes[d][holder] for d in sorted(self._around(holder) & self._notes.keys()))
            found[holder] = self._sign(Delivery(context=self._context, notes=notes, roll=told))
        return found

    # --- 3. vectors -----------------------------------------------------------------------------------------
    def receive_vector(self, site: str, receipt: Envelope[Receipt], packed: bytes) -> None:
        """Add a site's masked vector to the sum; only its hash is kept.

        Args:
            site: Who sent it.
            receipt: The site's signed receipt.
            packed: ``d + tail`` words of ``ring_bits`` bits.

        Raises:
            ProtocolError: out of order, wrong length, or not the vector the receipt is for.
            VerificationError: the receipt's signature does not hold.
        """
        self._expect(ServerPhase.VECTORS, site, tuple(self._notes), self._vectors)
        if receipt.author != site or receipt.kind != Receipt.kind or receipt.body.context != self._context:
            raise ProtocolError("sent a receipt that is not its own for this attempt", who=site)
        verify(receipt, self._roster.key_of(site))
        vector_hash = transcript.vector_hash(self._context, packed)
        if vector_hash != receipt.body.vector_hash:
            raise ProtocolError("sent another vector than its receipt is for", who=site)
        add_packed(self._sum, packed, self._offer.ring_bits, who=site)
        self._vectors[site] = vector_hash

    def survivors(self) -> dict[str, bytes]:
        """Close step 3 and return what each member of U3 is asked to agree to.

        Raises:
            RoundAborted: too few vectors arrived.
        """
        self._close(ServerPhase.VECTORS, len(self._vectors), "sent a masked vector")
        roll = self._told(self._vectors_roll())

        def told(around: frozenset[str]) -> Survivors:
            vectors = {name: self._vectors[name] for name in sorted(around & self._vectors.keys())}
            return Survivors(context=self._context, vectors=vectors, roll=roll)

        self._agreed = self.agreement()
        return self._to_each(self._vectors, told)

    # --- 4. agreements --------------------------------------------------------------------------------------
    def receive_agreement(self, site: str, raw: bytes) -> None:
        """Take a site's signature on the survivors.

        Raises:
            ProtocolError: malformed, out of order, or it agreed to something else.
            VerificationError: the signature does not hold.
        """
        envelope = self._open(
            ServerPhase.AGREEMENTS, site, raw, Agreement, tuple(self._vectors), self._agreements
        )
        if envelope.body != self._agreed:
            raise ProtocolError("agreed to other survivors than were shown", who=site)
        self._agreements[site] = envelope

    def unmasking(self) -> dict[str, bytes]:
        """Close step 4 and return, for each site that agreed, the agreements that let it reveal its shares.

        Raises:
            RoundAborted: fewer than t sites agreed.
        """
        self._close(ServerPhase.AGREEMENTS, len(self._agreements), "agreed", needed=self._offer.threshold)

        def told(around: frozenset[str]) -> Unmasking:
            names = sorted(around & self._agreements.keys())
            return Unmasking(context=self._context, agreements=tuple(self._agreements[n] for n in names))

        return self._to_each(self._agreements, told)

    # --- 5. reveals -----------------------------------------------------------------------------------------
    def receive_reveal(self, site: str, raw: bytes) -> None:
        """Take a site's shares: of survivors' seeds and of dropped sites' mask keys.

        Raises:
            ProtocolError: malformed, out of order, shares of the wrong kind, or a share its dealer did not sign.
            VerificationError: the signature does not hold.
        """
        reveal = self._open(
            ServerPhase.REVEALS, site, raw, Reveal, tuple(self._agreements), self._reveals
        ).body
        dealers = self._around(site) & self._notes.keys()
        dropped = dealers - self._vectors.keys()
        if not reveal.seed_shares.keys() <= self._vectors.keys() or not reveal.mask_shares.keys() <= dropped:
            raise ProtocolError("revealed shares of the wrong kind", who=site)
        shown = [*reveal.seed_shares, *reveal.mask_shares, *reveal.bad_dealers]
        if len(shown) != len(set(shown)) or set(shown) != dealers:
            raise ProtocolError("keeps shares back without calling their dealers bad", who=site)
        kinds: tuple[tuple[ShareKind, dict[str, str]], ...] = (
            ("seed", reveal.seed_shares),
            ("mask", reveal.mask_shares),
        )
        for kind, shares in kinds:
            for dealer, share in shares.items():
                note = self._notes[dealer][site].body
                signed = note.seed_share_hash if kind == "seed" else note.mask_share_hash
                if transcript.share_hash(self._context, dealer, site, kind, share) != signed:
                    raise ProtocolError(f"revealed another share than {dealer} dealt it", who=site)
        self._reveals[site] = reveal

    def open(self) -> Words:
        """Close step 5 and return the sum of the survivors' vectors, shape ``(d + tail,)``.

        Raises:
            RoundAborted: too few shares of some secret, or its dealer dealt nonsense.
        """
        self._close(ServerPhase.REVEALS, len(self._reveals), "revealed shares", needed=self._offer.threshold)
        masks = list(self._left_on_the_sum())
        total = self._sum
        apply_masks(total, map(inverse, masks))
        total &= np.uint32(2**self._offer.ring_bits - 1)
        return total

    def _left_on_the_sum(self) -> Iterator[Mask]:
        """Restore and check every secret, and return the masks that did not cancel each other."""
        for site in self._vectors:
            seed = self._restore(site, "seed")
            if transcript.seed_commitment(self._context, site, seed) != self._commitment(site):
                raise WrongDealer("dealt shares of a seed it did not commit to", who=site)
            yield self_mask(seed, self._context, site)
        for site in self._notes.keys() - self._vectors.keys():
            private = self._restore(site, "mask")
            if public_of(private).hex() != self._keys[site].body.mask:
                raise WrongDealer("dealt shares of a mask key it did not advertise", who=site)
            # What its surviving neighbours put on for it is the opposite of what it would have put on for them.
            survivors = sorted(self._around(site) & self._vectors.keys())
            ends = [End(name, bytes.fromhex(self._keys[name].body.mask)) for name in survivors]
            yield from map(inverse, pair_masks(MaskOwner(self._context, site, private), ends))

    def _restore(self, dealer: str, kind: ShareKind) -> bytes:
        shares: dict[int, bytes] = {}
        for holder in sorted(self._around(dealer) & self._reveals.keys()):
            reveal = self._reveals[holder]
            share = (reveal.seed_shares if kind == "seed" else reveal.mask_shares).get(dealer)
            if share is not None and len(shares) < self._offer.threshold:
                shares[self._points[holder]] = bytes.fromhex(share)
        if len(shares) < self._offer.threshold:
            against = sorted(name for name, reveal in self._reveals.items() if dealer in reveal.bad_dealers)
            if len(against) >= self._proof:
                raise WrongDealer(
                    f"sealed garbage to {', '.join(against)}",
                    who=dealer,
                    advice="the next attempt goes without it",
                )
            # Nobody is accused: either the dealer sealed garbage or these sites say so of an honest one.
            raise RoundAborted(
                f"only {len(shares)} of {self._offer.threshold} shares of a {kind} secret were revealed; "
                f"{', '.join(against)} cannot use those of {dealer}",
                who=f"round {self._offer.round}",
                advice="look at both ends",
            )
        try:
            return shamir.combine(shares, who=dealer)
        except ProtocolError as problem:
            raise WrongDealer(
                problem.message, who=dealer, advice="the next attempt goes without it"
            ) from problem

    # --- what every step needs ------------------------------------------------------------------------------
    def _expect(self, phase: ServerPhase, site: str, allowed: tuple[str, ...], seen: Container[str]) -> None:
        if self._phase is not phase:
            raise ProtocolError(
                f"sent {phase.name.lower()} while {self._phase.name.lower()} are collected", who=site
            )
        if site not in allowed:
            raise ProtocolError("was not asked in this step", who=site)
        if site in seen:
            raise ProtocolError("answered twice", who=site)

    def _open(
        self,
        phase: ServerPhase,
        site: str,
        raw: bytes,
        body_type: type[T],
        allowed: tuple[str, ...],
        seen: Container[str],
    ) -> Envelope[T]:
        self._expect(phase, site, allowed, seen)
        envelope = decode(raw, body_type, who=site)
        if envelope.author != site:
            raise ProtocolError(f"sent a message signed by {envelope.author}", who=site)
        verify(envelope, self._roster.key_of(site))
        body = envelope.body
        if isinstance(body, RoundBody) and body.context != self._context:
            raise ProtocolError("message belongs to another attempt", who=site)
        return envelope

    def _close(self, phase: ServerPhase, count: int, did: str, *, needed: int | None = None) -> None:
        if self._phase is not phase:
            raise RuntimeError(f"step {phase.name} is closed in step {self._phase.name}")
        # On a sparse graph the threshold is one of neighbourhoods: each secret shows in the end if it was reached.
        least = max(self._offer.threshold, self._offer.min_survivors) if needed is None else needed
        if count < least:
            raise RoundAborted(
                f"only {count} of {len(self._offer.participants)} sites {did}, {least} are needed",
                who=f"round {self._offer.round}",
                advice="the next attempt asks again",
            )
        self._phase = ServerPhase(phase + 1)

    def _to_each(self, sites: Iterable[str], told: Callable[[frozenset[str]], RoundBody]) -> dict[str, bytes]:
        """Return what each site is sent, made of its neighbourhood; equal neighbourhoods are signed for once."""
        signed: dict[frozenset[str], bytes] = {}
        found = {}
        for site in sorted(sites):
            around = self._around(site)
            if around not in signed:
                signed[around] = self._sign(told(around))
            found[site] = signed[around]
        return found

    def _sign(self, body: RoundBody) -> bytes:
        return encode(sign(body, SERVER, self._key))

    def _commitment(self, dealer: str) -> str:
        return self._notes[dealer][dealer].body.seed_commitment
