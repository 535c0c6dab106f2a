"""A site's side of one round, as a state machine without I/O.

Rules (design page 2; Bonawitz et al. 2017, active-adversary variant):

1. The offer was checked against the site's policy before a session is made.
2. Nothing a peer sent changes the state before all of it is verified: signatures against the pinned roster,
   contexts, sets within sets, canonical keys.
3. One context, one of each: one key pair, one share set, one masked vector, one agreement, one reveal.
4. A vector is masked with *all* of its neighbourhood in U2: on the complete graph, all of U2. After the agreement
   is signed no vector leaves any more.
5. Seed shares are revealed for survivors, mask-key shares for the dropped, never both for one peer.
6. On the complete graph nothing is taken on trust: U1, U2 and U3 are what was forwarded. On a sparse one the server
   says who is in them (``Roll``), and this site checks that it was shown exactly its neighbourhood in each.

The state after every step is one immutable value; whoever drives the session makes it durable, together with the
reply, before the reply is sent. A step out of order raises ProtocolError, because the server chooses the order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from fedfuse_shared import limits
from fedfuse_shared.config.base import SERVER
from fedfuse_shared.crypto import shamir
from fedfuse_shared.crypto.derive import End, pair_key
from fedfuse_shared.crypto.keys import agree, public_of
from fedfuse_shared.crypto.keystream import Words, apply_masks
from fedfuse_shared.crypto.sealing import RandomBytes, seal, unseal
from fedfuse_shared.envelope import Body, Envelope, T, canonical, decode, encode, verify
from fedfuse_shared.envelope import seal as sign
from fedfuse_shared.errors import ProtocolError, StateError
from fedfuse_shared.messages import (
    Agreement,
    Dealing,
    Delivery,
    KeyList,
    Reveal,
    Roll,
    RoundBody,
    RoundKeys,
    Share,
    ShareNote,
    SharePair,
    Survivors,
    Unmasking,
)
from fedfuse_shared.offer import Offer
from fedfuse_shared.roster import Roster
from fedfuse_shared.secagg import transcript
from fedfuse_shared.secagg.graph import COMPLETE, Graph
from fedfuse_shared.secagg.masking import MaskOwner, pair_masks, self_mask
from fedfuse_shared.secagg.packing import pack
from fedfuse_shared.secagg.quantise import vector_length
from fedfuse_shared.secagg.site_state import PeerKeys, Received, SitePhase, SiteState


@dataclass(frozen=True)
class Identity:
    """A site's name, signing key and pinned roster."""

    name: str
    key: Ed25519PrivateKey
    roster: Roster


class SiteSession:
    """One site in one attempt at one round."""

    def __init__(
        self, offer: Offer, identity: Identity, random_bytes: RandomBytes, state: SiteState | None = None
    ) -> None:
        self._offer = offer
        self._me = identity
        self._random = random_bytes
        if state is not None and state.context != offer.context():
            raise StateError("stored round state belongs to another offer", who=identity.name)
        self._state = state or SiteState(
            phase=SitePhase.ADVERTISED,
            context=offer.context(),
            channel_private=random_bytes(32).hex(),
            mask_private=random_bytes(32).hex(),
            seed=random_bytes(32).hex(),
        )

    @property
    def state(self) -> SiteState:
        """The state to make durable before the last step's reply is sent."""
        return self._state

    # --- 1. keys --------------------------------------------------------------------------------------------
    def advertise(self) -> bytes:
        """Return the signed public halves of this context's two key pairs."""
        self._require(SitePhase.ADVERTISED)
        return self._sign(
            RoundKeys(
                context=self._state.context,
                channel=public_of(bytes.fromhex(self._state.channel_private)).hex(),
                mask=public_of(bytes.fromhex(self._state.mask_private)).hex(),
            )
        )

    # --- 2. shares ------------------------------------------------------------------------------------------
    def deal(self, raw: bytes) -> bytes:
        """Check U1 and return this site's shares of its seed and mask key, sealed for its neighbourhood in it.

        Raises:
            ProtocolError: U1 is not what rule 2 demands, or the step is out of order.
            VerificationError: a signature does not hold.
        """
        self._require(SitePhase.ADVERTISED)
        peers, roll = self._check_keys(self._from_server(raw, KeyList))
        names = sorted(peers)
        points = {name: self._point(name) for name in names}
        threshold, state = self._offer.threshold, self._state
        seeds = shamir.split(bytes.fromhex(state.seed), threshold, list(points.values()), self._random)
        masks = shamir.split(
            bytes.fromhex(state.mask_private), threshold, list(points.values()), self._random
        )
        pairs = {
            name: SharePair(seed=seeds[points[name]].hex(), mask=masks[points[name]].hex()) for name in names
        }
        commitment = transcript.seed_commitment(state.context, self._me.name, bytes.fromhex(state.seed))
        notes = tuple(self._note(name, pairs[name], peers[name], commitment) for name in names)
        reply = self._sign(Dealing(context=state.context, notes=notes))
        self._advance(phase=SitePhase.DEALT, peers=peers, keys_roll=roll, own_shares=pairs[self._me.name])
        return reply

    def _check_keys(self, message: KeyList) -> tuple[dict[str, PeerKeys], Roll]:
        peers: dict[str, PeerKeys] = {}
        for envelope in message.keys:
            name = self._check_peer(envelope, self._offer.participants)
            if name in peers:
                raise ProtocolError("is listed twice among the round's keys", who=name)
            for key in (envelope.body.channel, envelope.body.mask):
                # Tried before anything is dealt or charged: a low-order key would stop the masking itself.
                agree(bytes.fromhex(self._state.mask_private), bytes.fromhex(key), who=name)
            peers[name] = PeerKeys(channel=envelope.body.channel, mask=envelope.body.mask)
        all_keys = [key for peer in peers.values() for key in (peer.channel, peer.mask)]
        if len(set(all_keys)) != len(all_keys):
            raise ProtocolError("forwarded one public key twice: somebody advertises another's", who=SERVER)
        keys = {name: (peer.channel, peer.mask) for name, peer in peers.items()}
        roll = self._roll(message.roll, peers, transcript.keys_items(self._state.context, keys))
        members = self._require_enough(roll, peers, "keys")
        seed = transcript.roll_hash(self._state.context, "keys", roll)
        own = (
            public_of(bytes.fromhex(self._state.channel_private)).hex(),
            public_of(bytes.fromhex(self._state.mask_private)).hex(),
        )
        mine = peers.get(self._me.name)
        if mine is None or (mine.channel, mine.mask) != own or self._me.name not in members:
            raise ProtocolError("does not list this site's own keys", who=SERVER)
        if peers.keys() != Graph(seed, members, self._offer.neighbours).around(self._me.name):
            raise ProtocolError("forwarded other keys than those of this site's neighbourhood", who=SERVER)
        return peers, roll

    def _note(self, holder: str, pair: SharePair, keys: PeerKeys, commitment: str) -> Envelope[ShareNote]:
        context, name = self._state.context, self._me.name
        sealed = b""
        if holder != name:
            key = self._channel(holder, keys)
            sealed = seal(key, canonical(pair), context, name, holder, self._random)
        note = ShareNote(
            context=context,
            holder=holder,
            sealed=sealed.hex(),
            seed_share_hash=transcript.share_hash(context, name, holder, "seed", pair.seed),
            mask_share_hash=transcript.share_hash(context, name, holder, "mask", pair.mask),
            seed_commitment=commitment,
        )
        return sign(note, name, self._me.key)

    # --- 3. update ------------------------------------------------------------------------------------------
    def accept_delivery(self, raw: bytes) -> tuple[str, ...]:
        """Check U2, open what was dealt to this site, and return the dealers whose shares are bad.

        Raises:
            ProtocolError: U2 is not within U1 or below the bounds, or the step is out of order.
            VerificationError: a signature does not hold.
        """
        self._require(SitePhase.DEALT)
        message = self._from_server(raw, Delivery)
        received: dict[str, Received] = {}
        for envelope in message.notes:
            dealer = self._check_peer(envelope, self._state.peers)
            if dealer in received:
                raise ProtocolError("is listed twice among the round's dealers", who=dealer)
            if envelope.body.holder != self._me.name:
                raise ProtocolError("forwarded a share meant for another site", who=SERVER)
            received[dealer] = Received(
                seed_commitment=envelope.body.seed_commitment, shares=self._open_note(dealer, envelope.body)
            )
        commitments = {name: item.seed_commitment for name, item in received.items()}
        roll = self._roll(message.roll, received, transcript.dealings_items(self._state.context, commitments))
        if self._me.name not in received:
            raise ProtocolError("does not list this site among the dealers", who=SERVER)
        dealers = self._require_enough(roll, received, "dealings")
        if not set(dealers) <= set(self._members(self._state.keys_roll)):
            raise ProtocolError("lists a dealer that advertised no keys", who=SERVER)
        if received.keys() != self._state.peers.keys() & set(dealers):
            raise ProtocolError("keeps back a note that was dealt to this site", who=SERVER)
        self._advance(phase=SitePhase.DELIVERED, received=received, dealings_roll=roll)
        return self._bad_dealers()

    def _open_note(self, dealer: str, note: ShareNote) -> SharePair | None:
        if dealer == self._me.name:
            return self._state.own_shares
        context, name = self._state.context, self._me.name
        try:
            key = self._channel(dealer, self._state.peers[dealer])
            plain = unseal(key, bytes.fromhex(note.sealed), context, dealer, name)
            pair = SharePair.model_validate_json(plain)
        except (ProtocolError, ValidationError):
            return None
        hashes = (
            transcript.share_hash(context, dealer, name, "seed", pair.seed),
            transcript.share_hash(context, dealer, name, "mask", pair.mask),
        )
        return pair if hashes == (note.seed_share_hash, note.mask_share_hash) else None

    def mask(self, words: Words) -> tuple[bytes, str]:
        """Return the quantised vector under the masks of its neighbourhood in U2, packed, and its hash.

        Args:
            words: Shape ``(d + tail,)``; they are overwritten, so that no second copy of a vector is made.

        Raises:
            ProtocolError: the step is out of order: a vector was masked already, or the survivors agreed.
        """
        self._require(SitePhase.DELIVERED)
        if words.shape != (vector_length(self._offer),):
            raise ValueError(f"{words.shape} words for a vector of {vector_length(self._offer)}")
        state, me = self._state, self._me.name
        owner = MaskOwner(state.context, me, bytes.fromhex(state.mask_private))
        peers = [End(name, bytes.fromhex(state.peers[name].mask)) for name in state.received if name != me]
        masks = [self_mask(bytes.fromhex(state.seed), state.context, me), *pair_masks(owner, peers)]
        apply_masks(words, masks)
        masked = pack(words, self._offer.ring_bits)
        vector_hash = transcript.vector_hash(state.context, masked)
        self._advance(phase=SitePhase.MASKED, vector_hash=vector_hash)
        return masked, vector_hash

    # --- 4. agree -------------------------------------------------------------------------------------------
    def agree(self, raw: bytes) -> bytes:
        """Check U3 and return the one signature this site gives on who survived.

        Raises:
            ProtocolError: U3 is not within U2, below the bounds, or says something else of this site's vector.
        """
        self._require(SitePhase.DELIVERED, SitePhase.MASKED)
        message = self._from_server(raw, Survivors)
        vectors = message.vectors
        if not vectors.keys() <= self._state.received.keys():
            raise ProtocolError("lists a survivor that dealt no shares", who=SERVER)
        roll = self._roll(message.roll, vectors, transcript.vectors_items(self._state.context, vectors))
        survivors = set(self._require_enough(roll, vectors, "vectors"))
        if not survivors <= set(self._members(self._state.dealings_roll)):
            raise ProtocolError("lists a survivor that dealt no shares", who=SERVER)
        if vectors.keys() != self._state.received.keys() & survivors:
            raise ProtocolError("keeps back the hash of a neighbour's vector", who=SERVER)
        if vectors.get(self._me.name) != self._state.vector_hash:
            raise ProtocolError("says something else of this site's vector than this site", who=SERVER)
        reply = self._sign(self._agreement(roll))
        self._advance(phase=SitePhase.AGREED, agreed=dict(vectors), survivors_roll=roll)
        return reply

    def _agreement(self, survivors: Roll | None) -> Agreement:
        state, context = self._state, self._state.context
        if state.keys_roll is None or state.dealings_roll is None or survivors is None:
            raise StateError("a stored round state lacks its rolls", who=self._me.name)
        return Agreement(
            context=context,
            keys_hash=transcript.roll_hash(context, "keys", state.keys_roll),
            dealings_hash=transcript.roll_hash(context, "dealings", state.dealings_roll),
            survivors_hash=transcript.roll_hash(context, "vectors", survivors),
        )

    # --- 5. unmask ------------------------------------------------------------------------------------------
    def reveal(self, raw: bytes) -> bytes:
        """Check that t survivors signed the same survivors and return the shares that open their sum.

        Raises:
            ProtocolError: fewer than t agreements, or one that differs from this site's own.
            VerificationError: a signature does not hold.
        """
        self._require(SitePhase.AGREED)
        expected = self._agreement(self._state.survivors_roll)
        signers = set()
        for envelope in self._from_server(raw, Unmasking).agreements:
            # Survivors alone vouch for what may be opened: with others' signatures a lying server could open a sum
            # over sites that were shown a smaller U2 than everybody else (2t > n + c bounds survivors who signed).
            signer = self._check_peer(envelope, self._state.agreed)
            if envelope.body != expected:
                raise ProtocolError("agreed to something else than this site", who=signer)
            signers.add(signer)
        if len(signers) < self._offer.threshold:
            raise ProtocolError(
                f"shows {len(signers)} agreements of {self._offer.threshold} needed", who=SERVER
            )
        seed_shares: dict[str, Share] = {}
        mask_shares: dict[str, Share] = {}
        for dealer, item in self._state.received.items():
            if item.shares is not None and dealer in self._state.agreed:
                seed_shares[dealer] = item.shares.seed
            elif item.shares is not None:
                mask_shares[dealer] = item.shares.mask
        reply = self._sign(
            Reveal(
                context=self._state.context,
                seed_shares=seed_shares,
                mask_shares=mask_shares,
                bad_dealers=self._bad_dealers(),
            )
        )
        self._advance(phase=SitePhase.REVEALED)
        return reply

    # --- what every step needs ------------------------------------------------------------------------------
    def _roll(self, told: Roll | None, seen: Collection[str], items: str) -> Roll:
        """Return a set of the round: what was seen of it on the complete graph, what was told on a sparse one."""
        if (told is None) != (self._offer.neighbours == COMPLETE):
            raise ProtocolError("calls a roll where none belongs, or none where one does", who=SERVER)
        return told or transcript.roll(self._offer.participants, seen, items)

    def _members(self, roll: Roll | None) -> tuple[str, ...]:
        return () if roll is None else transcript.members_of(roll, self._offer.participants)

    def _require_enough(self, roll: Roll, seen: Collection[str], what: str) -> tuple[str, ...]:
        """Return the members of a set that is large enough, as is what this site saw of it.

        Raises:
            ProtocolError: it is not.
        """
        members = self._members(roll)
        if len(members) < self._offer.min_survivors or len(seen) < self._offer.threshold:
            raise ProtocolError(
                f"shows {what} of {len(seen)} sites among {len(members)}, below the offer's bounds",
                who=SERVER,
            )
        return members

    def _require(self, *phases: SitePhase) -> None:
        if self._state.phase not in phases:
            raise ProtocolError(
                f"asks for a step this site is past or not at (it has {self._state.phase.value})", who=SERVER
            )

    def _advance(self, **changes: object) -> None:
        # Validated anew, so that no step can leave a state that could not be loaded again.
        self._state = SiteState.model_validate({**dict(self._state), **changes})

    def _sign(self, body: Body) -> bytes:
        return encode(sign(body, self._me.name, self._me.key))

    def _from_server(self, raw: bytes, body_type: type[T]) -> T:
        envelope = decode(raw, body_type, who=SERVER)
        if envelope.author != SERVER:
            raise ProtocolError(f"a {body_type.kind} message must come from the server", who=envelope.author)
        verify(envelope, self._me.roster.key_of(SERVER))
        body = envelope.body
        if isinstance(body, RoundBody) and body.context != self._state.context:
            raise ProtocolError("message belongs to another attempt", who=SERVER)
        return body

    def _check_peer(self, envelope: Envelope[T], allowed: Mapping[str, object] | tuple[str, ...]) -> str:
        body, name = envelope.body, envelope.author
        if envelope.kind != body.kind:
            raise ProtocolError(f"sent a {envelope.kind} where a {body.kind} belongs", who=name)
        if name not in allowed:
            raise ProtocolError("is not among those who may take part in this step", who=name)
        if isinstance(body, RoundBody) and body.context != self._state.context:
            raise ProtocolError("signed for another attempt", who=name)
        verify(envelope, self._me.roster.key_of(name))
        return name

    def _channel(self, peer: str, keys: PeerKeys) -> bytes:
        private = bytes.fromhex(self._state.channel_private)
        ends = End(self._me.name, public_of(private)), End(peer, bytes.fromhex(keys.channel))
        secret = agree(private, ends[1].public, who=peer)
        return pair_key(limits.LABEL_CHANNEL, secret, self._state.context, *ends)

    def _point(self, name: str) -> int:
        return self._offer.participants.index(name) + 1

    def _bad_dealers(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, item in self._state.received.items() if item.shares is None))


__all__ = ["Identity", "SitePhase", "SiteSession", "SiteState"]
