"""A hostile server and hostile peers against the two state machines; each test is named after its attack."""

import numpy as np
import pytest
from support.federation import Federation, Round, SeededBytes, run_round

from fedfuse_shared.config.base import SERVER
from fedfuse_shared.crypto import shamir
from fedfuse_shared.crypto.keys import public_of
from fedfuse_shared.envelope import decode, encode, seal
from fedfuse_shared.errors import ConfigError, ProtocolError, RoundAborted, StateError, VerificationError
from fedfuse_shared.messages import (
    Agreement,
    Dealing,
    Delivery,
    KeyList,
    Reveal,
    RoundKeys,
    ShareNote,
    Survivors,
    Unmasking,
)
from fedfuse_shared.secagg import transcript
from fedfuse_shared.secagg.bounds import Bounds, choose
from fedfuse_shared.secagg.quantise import vector_length

FEDERATION = Federation.of(5)
A, B, C, D, E = FEDERATION.names
TOP_BIT = 1 << 255


def signed_by_server(body, federation=FEDERATION):
    return encode(seal(body, SERVER, federation.server))


def fresh(**changes):
    return Round(FEDERATION, FEDERATION.offer(**changes))


def words(sequence, fill=0):
    return np.full(vector_length(sequence.offer), fill, np.uint32)


def advertised(sequence):
    return {n: decode(sequence.sites[n].advertise(), RoundKeys, who=n) for n in sequence.offer.participants}


def key_list(sequence, envelopes):
    body = KeyList(context=sequence.offer.context(), keys=tuple(envelopes), roll=None)
    return signed_by_server(body, sequence.federation)


def up_to_delivery(sequence):
    everyone = list(sequence.offer.participants)
    return sequence.shares(everyone, sequence.keys(everyone))


def up_to_vectors(sequence, senders=None):
    deliveries = up_to_delivery(sequence)
    for name in senders or deliveries:
        sequence.send(name, words(sequence, 7), deliveries[name])
    return deliveries


def survivors(sequence, vectors):
    return signed_by_server(Survivors(context=sequence.offer.context(), vectors=vectors, roll=None))


# --- keys ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flip_top_bit", [False, True])
def test_twin_keys_a_colluder_advertises_an_honest_sites_mask_key(flip_top_bit):
    sequence = fresh()
    keys = advertised(sequence)
    stolen = int.from_bytes(bytes.fromhex(keys[A].body.mask), "little") | (TOP_BIT if flip_top_bit else 0)
    twin = RoundKeys(
        context=sequence.offer.context(),
        channel=keys[E].body.channel,
        mask=stolen.to_bytes(32, "little").hex(),
    )
    keys[E] = seal(twin, E, FEDERATION.keys[E])
    with pytest.raises(ProtocolError):
        sequence.sites[B].deal(key_list(sequence, keys.values()))
    sequence.server.receive_keys(A, encode(keys[A]))
    with pytest.raises(ProtocolError):
        sequence.server.receive_keys(E, encode(keys[E]))


def test_twin_keys_would_not_cancel_masks_even_if_they_were_let_through():
    # The second line of defence: both names are in the derivation, so equal keys give different masks.
    from fedfuse_shared.crypto.derive import End, pair_key

    secret, key = b"s" * 32, b"k" * 32
    context = fresh().offer.context()
    with_honest = pair_key(b"m", secret, context, End(B, b"b" * 32), End(A, key))
    with_twin = pair_key(b"m", secret, context, End(B, b"b" * 32), End(E, key))
    assert with_honest != with_twin


def test_key_substitution_by_the_server():
    sequence = fresh()
    keys = advertised(sequence)
    own = RoundKeys(
        context=sequence.offer.context(), channel=public_of(b"1" * 32).hex(), mask=public_of(b"2" * 32).hex()
    )
    keys[B] = seal(own, B, FEDERATION.server)  # the server does not have B's key
    with pytest.raises(VerificationError, match=B):
        sequence.sites[A].deal(key_list(sequence, keys.values()))


def test_own_key_substituted():
    sequence = fresh()
    keys = advertised(sequence)
    del keys[A]
    with pytest.raises(ProtocolError, match="own keys"):
        sequence.sites[A].deal(key_list(sequence, keys.values()))


def test_a_stranger_is_not_let_in():
    stranger = Federation.of(6)
    sequence = fresh()
    keys = advertised(sequence)
    other = RoundKeys(
        context=sequence.offer.context(), channel=public_of(b"3" * 32).hex(), mask=public_of(b"4" * 32).hex()
    )
    keys["mallory"] = seal(other, "mallory", stranger.keys["site05"])
    with pytest.raises(ProtocolError, match="mallory"):
        sequence.sites[A].deal(key_list(sequence, keys.values()))
    with pytest.raises(ProtocolError, match="mallory"):
        sequence.server.receive_keys("mallory", encode(keys["mallory"]))


def test_an_enrolled_site_that_is_no_participant_is_not_let_in():
    sequence = Round(FEDERATION, FEDERATION.offer(participants=(A, B, C, D)))
    keys = advertised(sequence)
    other = RoundKeys(
        context=sequence.offer.context(), channel=public_of(b"3" * 32).hex(), mask=public_of(b"4" * 32).hex()
    )
    keys[E] = seal(other, E, FEDERATION.keys[E])
    with pytest.raises(ProtocolError, match=E):
        sequence.sites[A].deal(key_list(sequence, keys.values()))


def test_one_site_listed_twice():
    sequence = fresh()
    keys = list(advertised(sequence).values())
    with pytest.raises(ProtocolError, match="twice"):
        sequence.sites[A].deal(key_list(sequence, [*keys, keys[1]]))


def test_a_low_order_key_is_refused_by_the_server_and_by_the_peer():
    sequence = fresh()
    bad = RoundKeys(context=sequence.offer.context(), channel="00" * 32, mask="01" + "00" * 31)
    envelope = seal(bad, B, FEDERATION.keys[B])
    with pytest.raises(ProtocolError, match="low order"):
        sequence.server.receive_keys(B, encode(envelope))
    keys = {**advertised(sequence), B: envelope}
    with pytest.raises(ProtocolError, match="low order"):
        sequence.sites[A].deal(key_list(sequence, keys.values()))


def test_too_few_keys_are_forwarded():
    sequence = fresh()
    keys = advertised(sequence)
    with pytest.raises(ProtocolError, match="below the offer's bounds"):
        sequence.sites[A].deal(key_list(sequence, [keys[A], keys[B], keys[C]]))


# --- replay -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [{"attempt": 2}, {"round": 2}, {"run": "run2"}, {"model_hash": "3" * 64}])
def test_replay_of_keys_from_another_attempt_round_run_or_model(change):
    old, new = fresh(), fresh(**change)
    keys = {**advertised(new), B: advertised(old)[B]}
    with pytest.raises(ProtocolError, match="another attempt"):
        new.sites[A].deal(key_list(new, keys.values()))
    with pytest.raises(ProtocolError, match="another attempt"):
        new.server.receive_keys(B, encode(keys[B]))


def test_replay_of_the_servers_own_messages():
    old, new = fresh(), fresh(attempt=2)
    with pytest.raises(ProtocolError, match="another attempt"):
        new.sites[A].deal(old.keys(list(FEDERATION.names))[A])


def test_a_different_model_shown_to_one_site_does_not_cancel_its_masks():
    # Another model hash is another context, so every mask differs and nobody accepts the odd site's keys.
    odd = FEDERATION.offer(model_hash="4" * 64)
    sequence = fresh()
    keys = advertised(sequence)
    keys[E] = decode(Round(FEDERATION, odd).sites[E].advertise(), RoundKeys, who=E)
    with pytest.raises(ProtocolError, match="another attempt"):
        sequence.sites[A].deal(key_list(sequence, keys.values()))


def test_a_message_not_signed_by_the_server_is_refused():
    sequence = fresh()
    keys = tuple(advertised(sequence).values())
    body = KeyList(context=sequence.offer.context(), keys=keys, roll=None)
    with pytest.raises(ProtocolError, match="must come from the server"):
        sequence.sites[A].deal(encode(seal(body, B, FEDERATION.keys[B])))
    with pytest.raises(VerificationError):
        sequence.sites[A].deal(encode(seal(body, SERVER, FEDERATION.keys[B])))


# --- shares -------------------------------------------------------------------------------------------------
def deal(sequence, name, key_list_bytes):
    return decode(sequence.sites[name].deal(key_list_bytes), Dealing, who=name).body


def test_u2_outside_u1():
    federation = Federation.of(6)
    sequence = Round(federation, federation.offer(bounds={"threshold": 5, "colluders": 1}))
    names = list(federation.names)
    keys = advertised(sequence)
    small = [keys[n] for n in names[:5]]
    everyone = key_list(sequence, keys.values())
    notes = {n: deal(sequence, n, everyone).notes for n in names[1:]}
    body = KeyList(context=sequence.offer.context(), keys=tuple(small), roll=None)
    own = deal(sequence, names[0], encode(seal(body, SERVER, federation.server))).notes
    mine = [note for notes in [own, *notes.values()] for note in notes if note.body.holder == names[0]]
    delivery = Delivery(context=sequence.offer.context(), notes=tuple(mine), roll=None)
    with pytest.raises(ProtocolError, match=names[5]):
        sequence.sites[names[0]].accept_delivery(encode(seal(delivery, SERVER, federation.server)))


def test_swapped_shares_meant_for_another_site():
    sequence = fresh()
    everyone = list(FEDERATION.names)
    listed = sequence.keys(everyone)[A]
    dealings = {n: deal(sequence, n, listed) for n in everyone}
    swapped = tuple(
        next(note for note in dealings[n].notes if note.body.holder == (B if n == C else A)) for n in everyone
    )
    with pytest.raises(ProtocolError, match="meant for another"):
        sequence.sites[A].accept_delivery(
            signed_by_server(Delivery(context=sequence.offer.context(), notes=swapped, roll=None))
        )


def test_too_few_dealers_are_forwarded():
    sequence = fresh()
    everyone = list(FEDERATION.names)
    listed = sequence.keys(everyone)[A]
    dealings = {n: deal(sequence, n, listed) for n in everyone}
    few = tuple(next(x for x in dealings[n].notes if x.body.holder == A) for n in (A, B, C))
    with pytest.raises(ProtocolError, match="below the offer's bounds"):
        sequence.sites[A].accept_delivery(
            signed_by_server(Delivery(context=sequence.offer.context(), notes=few, roll=None))
        )


class WrongDealer:
    """Deals shares of another seed or mask key than the one it committed to or advertised."""

    def __init__(self, monkeypatch, kind):
        self.split, self.kind, self.calls = shamir.split, kind, 0
        monkeypatch.setattr(shamir, "split", self)

    def __call__(self, secret, threshold, points, random_bytes):
        self.calls += 1
        wrong = (self.calls == 1) == (self.kind == "seed")
        return self.split(b"\x55" * 32 if wrong else secret, threshold, points, random_bytes)


@pytest.mark.parametrize("kind", ["seed", "mask"])
def test_a_wrong_dealer_is_named_and_nothing_is_opened(monkeypatch, kind):
    sequence = fresh()
    everyone = list(FEDERATION.names)
    listed = sequence.keys(everyone)[A]
    for name in everyone:
        with monkeypatch.context() as patch:
            if name == E:
                WrongDealer(patch, kind)
            sequence.server.receive_dealing(name, sequence.sites[name].deal(listed))
    deliveries = sequence.server.deliveries()
    senders = everyone if kind == "seed" else [A, B, C, D]
    for name in senders:
        sequence.send(name, words(sequence), deliveries[name])
    with pytest.raises(RoundAborted, match=E):
        sequence.unmask(senders, sequence.agree(senders))


def test_a_wrong_share_at_the_unmasking_is_told_from_a_wrong_dealer():
    sequence = fresh()
    up_to_vectors(sequence)
    unmasking = sequence.agree(list(FEDERATION.names))[A]
    honest = decode(sequence.sites[E].reveal(unmasking), Reveal, who=E).body
    lie = honest.model_copy(update={"seed_shares": {**honest.seed_shares, A: "00" * 33}})
    with pytest.raises(ProtocolError, match=rf"{E}.*another share than {A}"):
        sequence.server.receive_reveal(E, encode(seal(lie, E, FEDERATION.keys[E])))
    # The others still open the round.
    assert sequence.unmask([A, B, C, D], dict.fromkeys(FEDERATION.names, unmasking))[0] == 5 * 7


def test_a_bad_share_does_not_change_what_is_masked_with():
    sequence = fresh()
    everyone = list(FEDERATION.names)
    listed = sequence.keys(everyone)[A]
    for name in everyone:
        dealing = deal(sequence, name, listed)
        if name == E:  # E's note to A is sealed garbage, duly signed
            notes = tuple(
                seal(n.body.model_copy(update={"sealed": "ab" * 60}), E, FEDERATION.keys[E])
                if n.body.holder == A
                else n
                for n in dealing.notes
            )
            dealing = Dealing(context=sequence.offer.context(), notes=notes)
        sequence.server.receive_dealing(name, encode(seal(dealing, name, FEDERATION.keys[name])))
    deliveries = sequence.server.deliveries()
    for name in everyone:
        sequence.send(name, words(sequence, 3), deliveries[name])
    unmasking = sequence.agree(everyone)[A]
    assert decode(sequence.sites[A].reveal(unmasking), Reveal, who=A).body.bad_dealers == (E,)
    assert sequence.unmask([B, C, D, E], dict.fromkeys(FEDERATION.names, unmasking))[0] == 5 * 3


@pytest.mark.parametrize("fault", ["missing", "twice", "two seeds", "other context", "other author"])
def test_a_dealing_that_is_not_one_note_for_each(fault):
    sequence = fresh()
    listed = sequence.keys(list(FEDERATION.names))[A]
    notes = list(deal(sequence, E, listed).notes)
    body: ShareNote = notes[0].body
    change = {
        "two seeds": {"seed_commitment": "0" * 64},
        "other context": {"context": "0" * 64},
    }.get(fault, {})
    if fault == "missing":
        del notes[0]
    elif fault == "twice":
        notes.append(notes[0])
    else:
        author = D if fault == "other author" else E
        notes[0] = seal(body.model_copy(update=change), author, FEDERATION.keys[author])
    dealing = Dealing(context=sequence.offer.context(), notes=tuple(notes))
    with pytest.raises(ProtocolError, match=E):
        sequence.server.receive_dealing(E, encode(seal(dealing, E, FEDERATION.keys[E])))


# --- vectors ------------------------------------------------------------------------------------------------
def test_two_vectors_under_one_context():
    sequence = fresh()
    deliveries = up_to_delivery(sequence)
    sequence.send(A, words(sequence), deliveries[A])
    with pytest.raises(ProtocolError):
        sequence.sites[A].mask(words(sequence, 1))
    sequence.restart(A)  # also after a crash
    with pytest.raises(ProtocolError):
        sequence.sites[A].mask(words(sequence, 1))
    with pytest.raises(ProtocolError):
        sequence.sites[A].accept_delivery(deliveries[A])


def test_the_server_counts_no_site_twice():
    sequence = fresh()
    deliveries = up_to_delivery(sequence)
    masked = sequence.send(A, words(sequence), deliveries[A])
    vector_hash = transcript.vector_hash(sequence.offer.context(), masked)
    with pytest.raises(ProtocolError, match="twice"):
        sequence.server.receive_vector(A, sequence.receipt(A, vector_hash), masked)


def test_a_vector_that_is_not_the_one_its_receipt_is_for():
    sequence = fresh()
    deliveries = up_to_delivery(sequence)
    sequence.sites[A].accept_delivery(deliveries[A])
    masked, vector_hash = sequence.sites[A].mask(words(sequence))
    with pytest.raises(ProtocolError, match="another vector"):
        sequence.server.receive_vector(
            A, sequence.receipt(A, vector_hash), bytes([masked[0] ^ 1]) + masked[1:]
        )
    short = masked[:-1]
    short_hash = transcript.vector_hash(sequence.offer.context(), short)
    with pytest.raises(ProtocolError, match="bytes, not"):
        sequence.server.receive_vector(A, sequence.receipt(A, short_hash), short)
    with pytest.raises(ProtocolError, match=A):
        sequence.server.receive_vector(A, sequence.receipt(B, vector_hash), masked)


def test_a_late_vector_after_the_survivors_agreed():
    sequence = fresh()
    deliveries = up_to_vectors(sequence, [A, B, C, D])
    sequence.sites[E].accept_delivery(deliveries[E])
    shown = sequence.server.survivors()[A]
    sequence.sites[E].agree(shown)
    with pytest.raises(ProtocolError):
        sequence.sites[E].mask(words(sequence))
    with pytest.raises(ProtocolError):
        sequence.server.receive_vector(E, sequence.receipt(E, "0" * 64), words(sequence))


# --- agreement ----------------------------------------------------------------------------------------------
def test_u3_outside_the_sites_u2_split_views():
    # The server shows A a U2 without E, and others one with E; A must not agree to a U3 that holds E.
    sequence = fresh()
    everyone = list(FEDERATION.names)
    listed = sequence.keys(everyone)[A]
    dealings = {n: deal(sequence, n, listed) for n in everyone}
    for name in everyone:
        seen = [n for n in everyone if not (name == A and n == E)]
        notes = tuple(next(x for x in dealings[n].notes if x.body.holder == name) for n in seen)
        sequence.sites[name].accept_delivery(
            signed_by_server(Delivery(context=sequence.offer.context(), notes=notes, roll=None))
        )
    hashes = {n: sequence.sites[n].mask(words(sequence))[1] for n in everyone}
    with pytest.raises(ProtocolError, match="dealt no shares"):
        sequence.sites[A].agree(survivors(sequence, hashes))
    # Without E, A agrees, but to another U2 than the others: their signatures do not serve to unmask it.
    without = {n: h for n, h in hashes.items() if n != E}
    agreements = [
        decode(sequence.sites[n].agree(survivors(sequence, without)), Agreement, who=n) for n in (A, B, C, D)
    ]
    with pytest.raises(ProtocolError, match="something else"):
        sequence.sites[A].reveal(
            signed_by_server(Unmasking(context=sequence.offer.context(), agreements=tuple(agreements)))
        )


def test_split_survivor_views_do_not_unmask():
    sequence = fresh()
    up_to_vectors(sequence)
    hashes = sequence.server.vectors
    one = {n: h for n, h in hashes.items() if n != D}
    two = {n: h for n, h in hashes.items() if n != E}
    signed = {
        A: sequence.sites[A].agree(survivors(sequence, one)),
        B: sequence.sites[B].agree(survivors(sequence, one)),
        C: sequence.sites[C].agree(survivors(sequence, two)),
        D: sequence.sites[D].agree(survivors(sequence, two))
        if hashes[D] == two.get(D)
        else pytest.fail("D is listed"),
    }
    shown = tuple(decode(raw, Agreement, who=n) for n, raw in signed.items())
    for name in (A, C):
        with pytest.raises(ProtocolError, match="something else"):
            sequence.sites[name].reveal(
                signed_by_server(Unmasking(context=sequence.offer.context(), agreements=shown))
            )


def test_a_site_that_sent_a_vector_is_told_it_did_not():
    sequence = fresh()
    up_to_vectors(sequence)
    hashes = {n: h for n, h in sequence.server.vectors.items() if n != A}
    with pytest.raises(ProtocolError, match="this site's vector"):
        sequence.sites[A].agree(survivors(sequence, hashes))


def test_a_site_is_told_another_hash_of_its_vector():
    sequence = fresh()
    up_to_vectors(sequence)
    with pytest.raises(ProtocolError, match="this site's vector"):
        sequence.sites[A].agree(survivors(sequence, {**sequence.server.vectors, A: "0" * 64}))


def test_a_site_that_sent_nothing_is_told_it_did():
    sequence = fresh()
    deliveries = up_to_vectors(sequence, [A, B, C, D])
    sequence.sites[E].accept_delivery(deliveries[E])
    with pytest.raises(ProtocolError, match="this site's vector"):
        sequence.sites[E].agree(survivors(sequence, {**sequence.server.vectors, E: "0" * 64}))


def test_too_few_survivors_are_shown():
    sequence = fresh()
    up_to_vectors(sequence)
    few = dict(list(sequence.server.vectors.items())[:3])
    with pytest.raises(ProtocolError, match="below the offer's bounds"):
        sequence.sites[A].agree(survivors(sequence, few))


def test_a_site_agrees_once():
    sequence = fresh()
    up_to_vectors(sequence)
    shown = sequence.server.survivors()[A]
    sequence.sites[A].agree(shown)
    sequence.restart(A)
    with pytest.raises(ProtocolError):
        sequence.sites[A].agree(
            survivors(sequence, {n: h for n, h in sequence.server.vectors.items() if n != E})
        )


# --- unmasking ----------------------------------------------------------------------------------------------
def test_a_second_unmasking_is_refused():
    sequence = fresh()
    up_to_vectors(sequence)
    unmasking = sequence.agree(list(FEDERATION.names))[A]
    sequence.sites[A].reveal(unmasking)
    sequence.restart(A)
    with pytest.raises(ProtocolError):
        sequence.sites[A].reveal(unmasking)


def test_too_few_agreements_are_shown():
    sequence = fresh()
    up_to_vectors(sequence)
    shown = sequence.server.survivors()[A]
    signed = [decode(sequence.sites[n].agree(shown), Agreement, who=n) for n in (A, B, C)]
    body = Unmasking(context=sequence.offer.context(), agreements=(*signed, signed[0], signed[1]))
    with pytest.raises(ProtocolError, match="3 agreements of 4"):
        sequence.sites[A].reveal(signed_by_server(body))


def test_forged_agreements():
    sequence = fresh()
    up_to_vectors(sequence)
    shown = sequence.server.survivors()[A]
    signed = {n: decode(sequence.sites[n].agree(shown), Agreement, who=n) for n in (A, B)}
    forged = [seal(signed[A].body, n, FEDERATION.server) for n in (C, D, E)]
    body = Unmasking(context=sequence.offer.context(), agreements=(*signed.values(), *forged))
    with pytest.raises(VerificationError, match=C):
        sequence.sites[A].reveal(signed_by_server(body))


def test_never_both_shares_of_one_peer():
    sequence = fresh()
    up_to_vectors(sequence, [A, B, C, D])
    unmasking = sequence.agree([A, B, C, D])[A]
    for name in (A, B, C, D):
        body = decode(sequence.sites[name].reveal(unmasking), Reveal, who=name).body
        assert set(body.seed_shares) == {A, B, C, D}
        assert set(body.mask_shares) == {E}


def test_shares_of_the_wrong_kind_are_refused_by_the_server():
    sequence = fresh()
    up_to_vectors(sequence)
    unmasking = sequence.agree(list(FEDERATION.names))[A]
    honest = decode(sequence.sites[E].reveal(unmasking), Reveal, who=E).body
    swapped = honest.model_copy(update={"seed_shares": {}, "mask_shares": honest.seed_shares})
    with pytest.raises(ProtocolError, match="wrong kind"):
        sequence.server.receive_reveal(E, encode(seal(swapped, E, FEDERATION.keys[E])))


# --- bounds -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n", "t", "c", "m"),
    [
        (5, 2, 1, 5),
        (5, 3, 1, 5),
        (6, 4, 2, 6),
        (4, 4, 1, 3),
        (4, 4, 1, 5),
        (3, 3, 2, 3),
        (2, 2, 0, 2),
        (101, 90, 2, 95),
    ],
)
def test_a_lowered_threshold_or_unsafe_bounds(n, t, c, m):
    with pytest.raises(ConfigError):
        Bounds(n, t, c, m).check()


@pytest.mark.parametrize("n", range(3, 101))
def test_the_usual_choice_is_safe_for_every_number_of_sites(n):
    bounds = choose(n)
    assert 2 * bounds.threshold > n + bounds.colluders
    assert bounds.min_survivors - bounds.colluders >= 2


# --- bytes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mutate", [lambda raw: raw[:-1], lambda raw: raw + b" ", lambda _: b"", lambda _: b"[" * 10_000]
)
def test_truncated_padded_and_garbage_messages_change_nothing(mutate):
    sequence = fresh()
    everyone = list(FEDERATION.names)
    listed = sequence.keys(everyone)[A]
    before = sequence.sites[A].state
    with pytest.raises(ProtocolError):
        sequence.sites[A].deal(mutate(listed))
    assert sequence.sites[A].state == before
    sequence.sites[A].deal(listed)


def test_an_oversized_message_is_refused_unread():
    sequence = fresh()
    # What is over a limit is not parsed, even where it would parse.
    raw = sequence.sites[A].advertise()
    with pytest.raises(ProtocolError, match="over the limit"):
        decode(raw, RoundKeys, who=A, limit=len(raw) - 1)
    with pytest.raises(ProtocolError, match="over the limit"):
        sequence.sites[A].deal(b"x" * (16 * 2**20 + 1))


def test_a_second_spelling_of_a_signed_message_is_refused():
    sequence = fresh()
    raw = sequence.sites[A].advertise()
    with pytest.raises(ProtocolError, match="canonical"):
        sequence.server.receive_keys(A, raw.replace(b'":', b'": ', 1))


def test_messages_out_of_order_change_nothing():
    sequence = fresh()
    with pytest.raises(ProtocolError):
        sequence.sites[A].agree(survivors(sequence, {}))
    with pytest.raises(ProtocolError):
        sequence.sites[A].reveal(signed_by_server(Unmasking(context=sequence.offer.context(), agreements=())))
    with pytest.raises(ProtocolError):
        sequence.server.receive_reveal(A, b"{}")
    assert run_round(sequence, {n: words(sequence, 2) for n in FEDERATION.names})[0] == 10


def test_secrets_of_two_contexts_are_unrelated():
    # A key pair is made per context: nothing of one attempt opens anything of another.
    draw = SeededBytes("same source")
    from fedfuse_shared.secagg.site import SiteSession

    one = SiteSession(FEDERATION.offer(), FEDERATION.identity(A), draw).state
    two = SiteSession(FEDERATION.offer(attempt=2), FEDERATION.identity(A), draw).state
    assert not {one.seed, one.mask_private, one.channel_private} & {
        two.seed,
        two.mask_private,
        two.channel_private,
    }


# --- what narrow rings and sparse graphs add ----------------------------------------------------------------
def roll_of(sequence, names, items="5" * 64):
    return transcript.roll(sequence.offer.participants, names, items)


def test_a_roll_on_the_complete_graph_is_refused():
    # There a site sees whole sets; a roll would put the server's word in the place of what it saw.
    sequence = fresh()
    keys = advertised(sequence)
    body = KeyList(
        context=sequence.offer.context(), keys=tuple(keys.values()), roll=roll_of(sequence, FEDERATION.names)
    )
    with pytest.raises(ProtocolError, match="calls a roll"):
        sequence.sites[A].deal(signed_by_server(body))


def test_bits_beyond_the_last_word_of_a_packed_vector():
    # They would give one sum many spellings, and a receipt's hash could be met by none of the others.
    sequence = fresh(ring_bits=20)
    deliveries = up_to_delivery(sequence)
    sequence.sites[A].accept_delivery(deliveries[A])
    masked, _ = sequence.sites[A].mask(words(sequence))
    spelled = masked[:-1] + bytes([masked[-1] | 0x80])
    spelled_hash = transcript.vector_hash(sequence.offer.context(), spelled)
    with pytest.raises(ProtocolError, match="beyond its last word"):
        sequence.server.receive_vector(A, sequence.receipt(A, spelled_hash), spelled)
    assert not sequence.server.vectors


def test_a_key_carried_into_a_second_context():
    # A site that is asked to go on in another context than its stored state belongs to does not.
    one, two = fresh(), fresh(attempt=2)
    one.keys(list(FEDERATION.names))
    with pytest.raises(StateError, match="another offer"):
        two.session(A, one.sites[A].state)


SPARSE = Federation.of(12)
GRAPH = Bounds(12, 3, 0, 11, 6)


def sparse(**changes):
    GRAPH.check()
    return Round(SPARSE, SPARSE.offer(bounds=GRAPH, **changes))


def opened(raw, body_type):
    return decode(raw, body_type, who=SERVER).body


def tampered(sequence, raw, body_type, **changes):
    return signed_by_server(opened(raw, body_type).model_copy(update=changes), SPARSE)


def test_a_sparse_graph_without_a_roll_or_with_one_of_another_size():
    sequence = sparse()
    lists = sequence.keys(list(SPARSE.names))
    one = SPARSE.names[0]
    roll = opened(lists[one], KeyList).roll
    for wrong in (
        None,
        roll.model_copy(update={"members": roll.members + "00"}),
        roll.model_copy(update={"members": roll.members[:2]}),
        roll.model_copy(update={"members": "ffff"}),
    ):
        with pytest.raises(ProtocolError):
            sequence.sites[one].deal(tampered(sequence, lists[one], KeyList, roll=wrong))
    sequence.sites[one].deal(lists[one])


@pytest.mark.parametrize("lie", ["another graph", "fewer keys", "left out", "too few"])
def test_keys_of_others_than_this_sites_neighbourhood(lie):
    sequence = sparse()
    lists = sequence.keys(list(SPARSE.names))
    one = SPARSE.names[0]
    told = opened(lists[one], KeyList)
    members = [name for name in SPARSE.names if not (lie == "left out" and name == one)]
    if lie == "too few":
        members = members[:10]
    changes = {
        "another graph": {"roll": told.roll.model_copy(update={"items": "6" * 64})},
        "fewer keys": {"keys": told.keys[1:] if told.keys[0].author != one else told.keys[:-1]},
        "left out": {"roll": roll_of(sequence, members, told.roll.items)},
        "too few": {"roll": roll_of(sequence, members, told.roll.items)},
    }[lie]
    with pytest.raises(ProtocolError):
        sequence.sites[one].deal(tampered(sequence, lists[one], KeyList, **changes))


@pytest.mark.parametrize("lie", ["kept back", "dealer outside U1", "too few"])
def test_a_delivery_on_a_sparse_graph_that_is_not_what_was_dealt(lie):
    sequence = sparse()
    present = list(SPARSE.names)[:11]
    deliveries = sequence.shares(present, sequence.keys(present))
    one = SPARSE.names[0]
    told = opened(deliveries[one], Delivery)
    others = tuple(note for note in told.notes if note.author != one)
    mine = tuple(note for note in told.notes if note.author == one)
    changes = {
        "kept back": {"notes": (*mine, *others[1:])},
        "dealer outside U1": {"roll": roll_of(sequence, SPARSE.names, told.roll.items)},
        "too few": {"roll": roll_of(sequence, present[:10], told.roll.items)},
    }[lie]
    with pytest.raises(ProtocolError):
        sequence.sites[one].accept_delivery(tampered(sequence, deliveries[one], Delivery, **changes))


@pytest.mark.parametrize("lie", ["survivor outside U2", "kept back", "too few", "not among them"])
def test_survivors_on_a_sparse_graph_that_do_not_fit(lie):
    sequence = sparse()
    present = list(SPARSE.names)[:11]
    deliveries = sequence.shares(present, sequence.keys(present))
    for name in present:
        sequence.send(name, words(sequence, 1), deliveries[name])
    shown = sequence.server.survivors()
    one = SPARSE.names[0]
    told = opened(shown[one], Survivors)
    others = {name: told.vectors[name] for name in list(told.vectors) if name != one}
    first = next(iter(others))
    changes = {
        "survivor outside U2": {"roll": roll_of(sequence, SPARSE.names, told.roll.items)},
        "kept back": {"vectors": {name: h for name, h in told.vectors.items() if name != first}},
        "too few": {"roll": roll_of(sequence, present[:10], told.roll.items)},
        "not among them": {
            "roll": roll_of(sequence, [*present[1:], SPARSE.names[11]], told.roll.items),
            "vectors": others,
        },
    }[lie]
    with pytest.raises(ProtocolError):
        sequence.sites[one].agree(tampered(sequence, shown[one], Survivors, **changes))


def test_a_dealing_on_a_sparse_graph_to_others_than_the_neighbourhood():
    sequence = sparse()
    lists = sequence.keys(list(SPARSE.names))
    one = SPARSE.names[0]
    dealing = opened(sequence.sites[one].deal(lists[one]), Dealing)
    around = {note.body.holder for note in dealing.notes}
    stranger = next(name for name in SPARSE.names if name not in around)
    moved = dealing.notes[0].body.model_copy(update={"holder": stranger})
    notes = (seal(moved, one, SPARSE.keys[one]), *dealing.notes[1:])
    lie = Dealing(context=sequence.offer.context(), notes=notes)
    with pytest.raises(ProtocolError, match="did not deal"):
        sequence.server.receive_dealing(one, encode(seal(lie, one, SPARSE.keys[one])))


def test_agreements_of_others_than_the_neighbourhood():
    sequence = sparse()
    names = list(SPARSE.names)
    deliveries = sequence.shares(names, sequence.keys(names))
    for name in names:
        sequence.send(name, words(sequence, 1), deliveries[name])
    sequence.agree(names)
    one = names[0]
    around = sequence.sites[one].state.peers
    strangers = [name for name in names if name not in around][:3]
    agreements = tuple(seal(sequence.server.agreement(), name, SPARSE.keys[name]) for name in strangers)
    body = Unmasking(context=sequence.offer.context(), agreements=agreements)
    with pytest.raises(ProtocolError, match="may take part"):
        sequence.sites[one].reveal(signed_by_server(body, SPARSE))
