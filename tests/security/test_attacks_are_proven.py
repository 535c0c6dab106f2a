"""Every attack succeeds against a copy of the code without the check that stops it: so the test of it can fail.

An attack counts as successful where its test fails because nothing was raised, or because something was opened or
sent that must not be. Where two checks stand behind each other both are taken out: the table lists both.
"""

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
from support.weakened import Weakening, weaken

SITE, SERVER = "secagg.site", "secagg.server"


def load():
    """Return the attacks as a module of its own, so that weakened classes can be put into it."""
    if "attacks" not in sys.modules:
        path = Path(__file__).with_name("test_secagg_attacks.py")
        spec = importlib.util.spec_from_file_location("attacks", path)
        sys.modules["attacks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["attacks"])
    return sys.modules["attacks"]


def gone(module, *statements):
    """Take statements out: each ``if`` is never true any more."""
    found = []
    for old in statements:
        first, newline, rest = old.removeprefix("if ").partition("\n")
        found.append(Weakening(module, old, f"if False and ({first.removesuffix(':')}):{newline}{rest}"))
    return found


SIGNED = [
    Weakening(
        "envelope", "    try:\n        Ed25519PublicKey", "    try:\n        return\n        Ed25519PublicKey"
    )
]
ANOTHER = "if isinstance(body, RoundBody) and body.context != self._state.context:\n            raise ProtocolError("
CONTEXTS = [
    *gone(SITE, ANOTHER + '"message belongs'),
    *gone(SITE, ANOTHER + '"signed for'),
    *gone(SERVER, "if isinstance(body, RoundBody) and body.context != self._context:"),
]
ENOUGH = gone(SITE, "if len(members) < self._offer.min_survivors or len(seen) < self._offer.threshold:")
ONCE = gone(SITE, "if self._state.phase not in phases:")
OWN_VECTOR = gone(SITE, "if vectors.get(self._me.name) != self._state.vector_hash:")
AMONG = gone(SITE, 'if name not in allowed:\n            raise ProtocolError("is not among')
ANYBODY = [
    Weakening(SITE, "return self._offer.participants.index(name) + 1", "return hash(name) % 1000 + 1"),
    *gone(SITE, "if peers.keys() != Graph(seed, members, self._offer.neighbours).around(self._me.name):"),
]
ENROLLED = [
    Weakening(
        "roster", "        if key is None:", "        key = key or self.server\n        if key is None:"
    )
]
SAME = gone(SITE, "if envelope.body != expected:")
VOUCHING = [
    Weakening(
        SITE,
        "self._check_peer(envelope, self._state.agreed)",
        "self._check_peer(envelope, self._state.received)",
    )
]
DEALING = [
    *gone(
        SERVER, "if note.author != site or note.kind != ShareNote.kind or note.body.context != self._context:"
    ),
    *gone(SERVER, "if note.body.holder in notes:"),
    *gone(
        SERVER,
        "if notes.keys() != self._around(site) or len({n.body.seed_commitment for n in notes.values()}) != 1:",
    ),
    *SIGNED,
]
ROLLS = gone(SITE, "if (told is None) != (self._offer.neighbours == COMPLETE):")
SIZES = gone("secagg.transcript", "if len(raw) != -(-len(participants) // 8) or bits >> len(participants):")
NEIGHBOURHOOD = gone(
    SITE, "if peers.keys() != Graph(seed, members, self._offer.neighbours).around(self._me.name):"
)
NOT_MINE = gone(SITE, "if mine is None or (mine.channel, mine.mask) != own or self._me.name not in members:")
NOTES = gone(
    SITE,
    "if not set(dealers) <= set(self._members(self._state.keys_roll)):",
    "if received.keys() != self._state.peers.keys() & set(dealers):",
)
SURVIVORS = gone(
    SITE,
    "if not survivors <= set(self._members(self._state.dealings_roll)):",
    "if vectors.keys() != self._state.received.keys() & survivors:",
)
STRICT = gone("envelope", "if canonical(envelope) != raw:")

PROOFS = {
    "test_twin_keys_a_colluder_advertises_an_honest_sites_mask_key": (
        {"flip_top_bit": False},
        gone(SITE, "if len(set(all_keys)) != len(all_keys):"),
    ),
    "test_twin_keys_a_colluder_advertises_an_honest_sites_mask_key/top bit": (
        {"flip_top_bit": True},
        [
            *gone("crypto.keys", 'if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _P:'),
        ],
    ),
    "test_twin_keys_would_not_cancel_masks_even_if_they_were_let_through": (
        {},
        [
            Weakening(
                "crypto.derive",
                'names = low.name.encode() + b"\\0" + high.name.encode() + b"\\0"',
                'names = b""',
            ),
            Weakening("crypto.derive", "names + low.public + high.public", "names"),
        ],
    ),
    "test_key_substitution_by_the_server": ({}, SIGNED),
    "test_own_key_substituted": (
        {},
        gone(SITE, "if mine is None or (mine.channel, mine.mask) != own or self._me.name not in members:")
        + gone(SITE, "if peers.keys() != Graph(seed, members, self._offer.neighbours).around(self._me.name):")
        + [Weakening(SITE, "own_shares=pairs[self._me.name]", "own_shares=pairs.get(self._me.name)")],
    ),
    "test_a_stranger_is_not_let_in": (
        {},
        AMONG
        + ENROLLED
        + SIGNED
        + [
            *ANYBODY,
        ],
    ),
    "test_an_enrolled_site_that_is_no_participant_is_not_let_in": (
        {},
        [*AMONG, *ANYBODY],
    ),
    "test_one_site_listed_twice": ({}, gone(SITE, "if name in peers:")),
    "test_a_low_order_key_is_refused_by_the_server_and_by_the_peer": (
        {},
        [
            Weakening(
                SERVER, "            agree(self._probe, bytes.fromhex(key), who=site)", "            pass"
            ),
            *gone(SERVER, "if body.channel == body.mask or {body.channel, body.mask} & self._public:"),
        ],
    ),
    "test_too_few_keys_are_forwarded": (
        {},
        [*ENOUGH, Weakening("crypto.shamir", "not 1 <= threshold <= len(points)", "threshold < 1")],
    ),
    "test_replay_of_keys_from_another_attempt_round_run_or_model": ({"change": {"attempt": 2}}, CONTEXTS),
    "test_replay_of_the_servers_own_messages": (
        {},
        CONTEXTS
        + gone(SITE, "if mine is None or (mine.channel, mine.mask) != own or self._me.name not in members:"),
    ),
    "test_a_different_model_shown_to_one_site_does_not_cancel_its_masks": ({}, CONTEXTS),
    "test_a_message_not_signed_by_the_server_is_refused": (
        {},
        gone(SITE, "if envelope.author != SERVER:") + SIGNED,
    ),
    "test_u2_outside_u1": (
        {},
        AMONG
        + gone(SITE, "if not set(dealers) <= set(self._members(self._state.keys_roll)):")
        + gone(SITE, "if received.keys() != self._state.peers.keys() & set(dealers):")
        + [
            Weakening(
                SITE,
                "except (ProtocolError, ValidationError):",
                "except (ProtocolError, ValidationError, KeyError):",
            )
        ],
    ),
    "test_swapped_shares_meant_for_another_site": (
        {},
        gone(SITE, "if envelope.body.holder != self._me.name:"),
    ),
    "test_too_few_dealers_are_forwarded": ({}, ENOUGH),
    "test_a_wrong_dealer_is_named_and_nothing_is_opened": (
        {"kind": "seed"},
        gone(SERVER, "if transcript.seed_commitment(self._context, site, seed) != self._commitment(site):"),
    ),
    "test_a_wrong_dealer_is_named_and_nothing_is_opened/mask": (
        {"kind": "mask"},
        gone(SERVER, "if public_of(private).hex() != self._keys[site].body.mask:"),
    ),
    "test_a_wrong_share_at_the_unmasking_is_told_from_a_wrong_dealer": (
        {},
        gone(SERVER, "if transcript.share_hash(self._context, dealer, site, kind, share) != signed:"),
    ),
    "test_a_bad_share_does_not_change_what_is_masked_with": (
        {},
        [
            Weakening(
                SITE,
                "for name in state.received if name != me]",
                "for name, item in state.received.items() if name != me and item.shares is not None]",
            )
        ],
    ),
    **{
        f"test_a_dealing_that_is_not_one_note_for_each/{fault}": ({"fault": fault}, DEALING)
        for fault in ("missing", "twice", "two seeds", "other context", "other author")
    },
    "test_two_vectors_under_one_context": ({}, ONCE),
    "test_the_server_counts_no_site_twice": ({}, gone(SERVER, "if site in seen:")),
    "test_a_vector_that_is_not_the_one_its_receipt_is_for": (
        {},
        gone(SERVER, "if vector_hash != receipt.body.vector_hash:"),
    ),
    "test_a_late_vector_after_the_survivors_agreed": ({}, ONCE),
    "test_u3_outside_the_sites_u2_split_views": (
        {},
        gone(SITE, "if not vectors.keys() <= self._state.received.keys():")
        + gone(SITE, "if not survivors <= set(self._members(self._state.dealings_roll)):")
        + gone(SITE, "if vectors.keys() != self._state.received.keys() & survivors:"),
    ),
    "test_split_survivor_views_do_not_unmask": ({}, SAME + VOUCHING),
    "test_a_site_that_sent_a_vector_is_told_it_did_not": ({}, OWN_VECTOR),
    "test_a_site_is_told_another_hash_of_its_vector": ({}, OWN_VECTOR),
    "test_a_site_that_sent_nothing_is_told_it_did": ({}, OWN_VECTOR),
    "test_too_few_survivors_are_shown": ({}, ENOUGH),
    "test_a_site_agrees_once": ({}, ONCE),
    "test_a_second_unmasking_is_refused": ({}, ONCE),
    "test_too_few_agreements_are_shown": ({}, gone(SITE, "if len(signers) < self._offer.threshold:")),
    "test_forged_agreements": ({}, SIGNED),
    "test_never_both_shares_of_one_peer": (
        {},
        [
            Weakening(
                SITE,
                "            elif item.shares is not None:\n",
                "            if item.shares is not None:\n",
            ),
        ],
    ),
    "test_shares_of_the_wrong_kind_are_refused_by_the_server": (
        {},
        gone(
            SERVER,
            "if not reveal.seed_shares.keys() <= self._vectors.keys() or not reveal.mask_shares.keys() <= dropped:",
        )
        + gone(SERVER, "if transcript.share_hash(self._context, dealer, site, kind, share) != signed:"),
    ),
    "test_a_lowered_threshold_or_unsafe_bounds": (
        {"n": 5, "t": 3, "c": 1, "m": 5},
        gone("secagg.bounds", "if 2 * t <= n + c:"),
    ),
    "test_a_lowered_threshold_or_unsafe_bounds/survivors": (
        {"n": 4, "t": 4, "c": 1, "m": 3},
        gone("secagg.bounds", "if not t <= m <= n:"),
    ),
    "test_the_usual_choice_is_safe_for_every_number_of_sites": (
        {"n": 20},
        [
            Weakening(
                "secagg.bounds",
                "max(2 * n // 3 + 1, (n + c) // 2 + 1) if threshold is None",
                "(n + c) // 2 if threshold is None",
            ),
            *gone("secagg.bounds", "if 2 * t <= n + c:"),
        ],
    ),
    "test_truncated_padded_and_garbage_messages_change_nothing": (
        {"mutate": lambda raw: raw + b" "},
        STRICT,
    ),
    "test_an_oversized_message_is_refused_unread": ({}, gone("envelope", "if len(raw) > limit:")),
    "test_a_second_spelling_of_a_signed_message_is_refused": ({}, STRICT),
    "test_messages_out_of_order_change_nothing": (
        {},
        [
            *ONCE,
            Weakening(SITE, "expected = self._agreement(self._state.survivors_roll)", "expected = None"),
            *gone(SITE, "if len(signers) < self._offer.threshold:"),
        ],
    ),
    "test_secrets_of_two_contexts_are_unrelated": (
        {},
        [Weakening(SITE, "mask_private=random_bytes(32).hex()", 'mask_private="77" * 32')],
    ),
    "test_a_roll_on_the_complete_graph_is_refused": ({}, ROLLS),
    "test_bits_beyond_the_last_word_of_a_packed_vector": (
        {},
        gone("secagg.packing", "if spare and _unpack_groups(raw[-bits:], bits)[_GROUP - spare :].any():"),
    ),
    "test_a_key_carried_into_a_second_context": (
        {},
        gone(SITE, "if state is not None and state.context != offer.context():"),
    ),
    "test_a_sparse_graph_without_a_roll_or_with_one_of_another_size": ({}, [*ROLLS, *NEIGHBOURHOOD, *SIZES]),
    **{
        f"test_keys_of_others_than_this_sites_neighbourhood/{lie}": (
            {"lie": lie},
            [*NEIGHBOURHOOD, *ENOUGH, *NOT_MINE],
        )
        for lie in ("another graph", "fewer keys", "left out", "too few")
    },
    **{
        f"test_a_delivery_on_a_sparse_graph_that_is_not_what_was_dealt/{lie}": (
            {"lie": lie},
            [*NOTES, *ENOUGH],
        )
        for lie in ("kept back", "dealer outside U1", "too few")
    },
    **{
        f"test_survivors_on_a_sparse_graph_that_do_not_fit/{lie}": (
            {"lie": lie},
            [*SURVIVORS, *ENOUGH, *OWN_VECTOR],
        )
        for lie in ("survivor outside U2", "kept back", "too few", "not among them")
    },
    "test_a_dealing_on_a_sparse_graph_to_others_than_the_neighbourhood": ({}, DEALING),
    "test_agreements_of_others_than_the_neighbourhood": ({}, AMONG),
}


def fails(attack, arguments, monkeypatch):
    """Return how an attack's test fails: what it says."""
    if "monkeypatch" in inspect.signature(attack).parameters:
        arguments = {**arguments, "monkeypatch": monkeypatch}
    try:
        attack(**arguments)
    except pytest.fail.Exception as failure:
        return str(failure)
    except AssertionError as failure:
        return str(failure) or "assertion"
    return ""


@pytest.mark.parametrize("proof", PROOFS)
def test_the_attack_succeeds_where_its_check_is_taken_out(proof, monkeypatch):
    arguments, weakenings = PROOFS[proof]
    name = proof.split("/")[0]
    with monkeypatch.context() as patch:
        assert not fails(getattr(load(), name), arguments, patch), (
            "the attack succeeds against the code itself"
        )
    weaken(monkeypatch, weakenings)
    said = fails(getattr(load(), name), arguments, monkeypatch)
    assert said, "the test passes without the check it is about"
    # Something else stopped the attack: then the check that was taken out was not all of its defence.
    assert "Regex pattern did not match" not in said


def test_every_attack_is_proven():
    attacks = {name for name, value in vars(load()).items() if name.startswith("test_") and callable(value)}
    assert attacks == {proof.split("/")[0] for proof in PROOFS}
