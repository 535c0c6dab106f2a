"""What a lying server, a cloned site or a careless operator might put on a ledger, each found under its own code.

The server signs the checkpoint itself, so here it is always true of the ledger shown: what is found is found by the
content. Tampering that the checkpoint shows is in ``test_ledger_tampering``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.federation import Federation
from support.ledgers import LedgerBuilder, codes, digest, head_of

from fedfuse_shared.config.base import OPERATOR, SERVER, Trust
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.ledger.records import FIRST_LINK, Charge, Close, Outcome, Receipt, Refusal, Reservation
from fedfuse_shared.ledger.verification import verify_ledger
from fedfuse_shared.ledger.verification_report import MAX_FINDINGS, Code, Report
from fedfuse_shared.privacy.accountant import epsilon, epsilon_rdp

Attack = Callable[[], Report]
ATTACKS: dict[str, tuple[set[str], Attack]] = {}


def attack(*expected: Code) -> Callable[[Attack], Attack]:
    """Register an attack and the findings it must give, exactly."""

    def register(run: Attack) -> Attack:
        ATTACKS[run.__name__] = ({code.value for code in expected}, run)
        return run

    return register


def started() -> LedgerBuilder:
    builder = LedgerBuilder().enrol()
    builder.round()
    return builder


def ended(builder: LedgerBuilder) -> Report:
    """Go on honestly after the attack, so that it cannot hide at the end."""
    builder.round()
    return builder.audit()


GRID = {"scale": 2.0**14, "clip_range": 1000.0}
"""A grid that shared noise of the offers here can be drawn on."""


def privacy(builder: LedgerBuilder, **changes: object):
    return builder.federation.offer().privacy.model_copy(update=changes)


# --- authors and signatures -------------------------------------------------------------------------------------
@attack(Code.BAD_SIGNATURE)
def receipt_forged_by_the_server() -> Report:
    builder = started()
    body = Receipt(seq=99, prev=FIRST_LINK, context="a" * 64, steps=1, vector_hash="b" * 64)
    builder.leaves.append(seal(body, "site00", builder.federation.server))
    return ended(builder)


@attack(Code.WRONG_AUTHOR)
def close_written_by_a_site() -> Report:
    builder = started()
    builder.leaves.append(seal(builder.leaves[-1].body, "site00", builder.federation.keys["site00"]))
    return ended(builder)


@attack(Code.WRONG_AUTHOR)
def reservation_written_by_the_server() -> Report:
    builder = started()
    body = builder.leaves[builder.find(Reservation)[0]].body
    builder.leaves.append(seal(body, SERVER, builder.federation.server))
    return ended(builder)


@attack(Code.UNKNOWN_AUTHOR)
def leaf_of_a_stranger() -> Report:
    builder = started()
    body = Refusal(seq=1, prev=FIRST_LINK, context="a" * 64, reason="")
    builder.leaves.append(seal(body, "stranger", Ed25519PrivateKey.generate()))
    return ended(builder)


@attack(Code.MALFORMED)
def leaf_with_a_second_spelling() -> Report:
    builder = started()
    lines = builder.lines()
    lines.append(lines[-1].replace(b'{"author"', b'{ "author"', 1))
    return verify_ledger(lines, builder.federation.roster, head_of(lines))


@attack(Code.MALFORMED)
def leaf_of_an_unknown_kind() -> Report:
    builder = started()
    lines = [*builder.lines(), b'{"author":"site00","kind":"rumour"}', b"[]", b"\xff", b"", b"[" * 10_000]
    return verify_ledger(lines, builder.federation.roster, head_of(lines))


# --- the ledger as a whole --------------------------------------------------------------------------------------
@attack(Code.CUT_OFF)
def tail_cut_off_after_it_was_signed() -> Report:
    builder = started()
    lines = builder.lines()
    return verify_ledger(lines[:-1], builder.federation.roster, head_of(lines))


@attack(Code.ROOT_MISMATCH)
def other_ledger_of_the_same_length() -> Report:
    lines = started().lines()
    other = LedgerBuilder().enrol()
    other.round(run="run2")
    return verify_ledger(lines, other.federation.roster, head_of(other.lines()))


@attack(Code.BEYOND_CHECKPOINT)
def leaves_after_the_last_signature() -> Report:
    builder = started()
    lines = builder.lines()
    return verify_ledger(lines, builder.federation.roster, head_of(lines[:-3]))


@attack(Code.ENROLMENT)
def second_roster_slipped_in() -> Report:
    builder = started()
    more = builder.federation.roster.model_copy(update={"sites": {"ghost": "c" * 64}})
    builder.leaves.append(seal(more, OPERATOR, builder.federation.operator))
    return ended(builder)


@attack(Code.ENROLMENT)
def ledger_without_its_enrolment() -> Report:
    builder = started()
    del builder.leaves[0]
    return ended(builder)


@attack(Code.ENROLMENT)
def empty_ledger() -> Report:
    return LedgerBuilder().audit()


# --- chains -----------------------------------------------------------------------------------------------------
@attack(Code.CHAIN_GAP, Code.NO_RESERVATION)
def hidden_reservation() -> Report:
    builder = started()
    del builder.leaves[builder.find(Reservation, "site01")[0]]
    return ended(builder)


@attack(Code.CHAIN_GAP)
def hidden_reservation_of_a_site_that_dropped_out() -> Report:
    builder = started()
    offer = builder.offer()
    for site in offer.participants:
        builder.reserve(site, offer)
    builder.abort(offer)
    del builder.leaves[builder.find(Reservation, "site02")[-1]]
    return ended(builder)


@attack(Code.DUPLICATE_SEQ, Code.DUPLICATE_RECEIPT)
def receipt_logged_twice() -> Report:
    builder = started()
    builder.leaves.append(builder.leaves[builder.find(Receipt, "site03")[0]])
    return ended(builder)


@attack(Code.DUPLICATE_SEQ, Code.CHAIN_BROKEN)
def cloned_site_with_two_branches() -> Report:
    builder = started()
    offer = builder.offer()
    before = builder.chains["site00"]
    builder.reserve("site00", offer)
    builder.chains["site00"] = before
    builder.refuse("site00", offer)
    builder.abort(offer)
    return ended(builder)


@attack(Code.CHAIN_BROKEN)
def site_that_rewrote_its_past() -> Report:
    builder = started()
    builder.chains["site00"] = (builder.chains["site00"][0], digest("another past"))
    return ended(builder)


# --- offers -----------------------------------------------------------------------------------------------------
@attack(Code.OFFER_ROSTER)
def offer_under_another_roster() -> Report:
    builder = started()
    builder.round(roster_hash="d" * 64)
    return ended(builder)


@attack(Code.OFFER_PARTICIPANTS)
def offer_to_a_stranger() -> Report:
    builder = started()
    builder.abort(builder.offer(participants=("site00", "site01", "site02", "nobody")))
    return ended(builder)


@attack(Code.OFFER_PARTICIPANTS, Code.OFFER_BOUNDS)
def offer_that_names_a_site_twice() -> Report:
    builder = started()
    builder.abort(
        builder.offer(participants=("site00", "site01", "site02", "site02"), threshold=4, min_survivors=4)
    )
    return ended(builder)


@attack(Code.OFFER_BOUNDS)
def offer_with_a_lowered_threshold() -> Report:
    builder = started()
    builder.round(threshold=2)  # 2t = 4 = n: two halves could be opened apart
    return ended(builder)


@attack(Code.OFFER_BOUNDS)
def offer_that_opens_below_its_threshold() -> Report:
    builder = started()
    builder.abort(builder.offer(threshold=4, min_survivors=3))
    return ended(builder)


@attack(Code.OFFER_BOUNDS)
def offer_of_a_sparse_graph_too_sparse_for_its_colluders() -> Report:
    builder = started()
    builder.abort(builder.offer(neighbours=2, threshold=1, colluders=1))
    return ended(builder)


@attack(Code.OFFER_BOUNDS)
def offer_of_a_sparse_graph_with_numbers_that_make_no_sense() -> Report:
    builder = started()
    builder.abort(builder.offer(neighbours=2, threshold=1, colluders=10_000, min_survivors=10_000))
    return ended(builder)


@attack(Code.OFFER_BOUNDS)
def offer_of_shared_noise_on_a_sparse_graph() -> Report:
    builder = started()
    shared = privacy(builder, trust=Trust.AGGREGATE, noise_sites=4, noise_share=0.75)
    sparse = {"neighbours": 2, "threshold": 1, "colluders": 0, "min_survivors": 4}
    builder.abort(builder.offer(privacy=shared, **GRID, **sparse))
    return ended(builder)


@attack(Code.OUTSIDE_POLICY)
def charged_on_a_sparse_graph_that_the_sites_policy_does_not_allow() -> Report:
    builder = started()
    for site in builder.federation.names:
        builder.policy(site, min_threshold=1)
    builder.round(neighbours=2, threshold=1, colluders=0, min_survivors=4)
    return ended(builder)


@attack(Code.OFFER_NOISE)
def offer_of_less_noise_than_is_accounted() -> Report:
    builder = started()
    builder.round(privacy=privacy(builder, noise_share=0.75))
    return ended(builder)


@attack(Code.OFFER_NOISE)
def shared_noise_that_counts_on_colluders() -> Report:
    builder = started()
    shared = privacy(builder, trust=Trust.AGGREGATE, noise_sites=3, noise_share=1.5 / 3**0.5)
    builder.round(privacy=shared, colluders=1, threshold=3, min_survivors=3, **GRID)
    return ended(builder)


@attack(Code.OFFER_NOISE)
def shared_noise_that_does_not_add_up() -> Report:
    builder = started()
    shared = privacy(builder, trust=Trust.AGGREGATE, noise_sites=2, noise_share=1.0)
    builder.round(privacy=shared, **GRID)
    return ended(builder)


def shared(builder: LedgerBuilder, **changes: object):
    """Constants of a round in which two honest survivors share the noise, as an honest server offers them."""
    values = {"trust": Trust.AGGREGATE, "noise_sites": 2, "noise_share": 1.5 / 2**0.5}
    return privacy(builder, **{**values, **changes})


@attack(Code.OVER_CAP)
def more_spent_than_the_policy_allows_if_all_others_collude() -> Report:
    builder = started()
    builder.policy("site02", max_epsilon_all_collude=1.5)
    builder.round(privacy=shared(builder), **GRID)
    return ended(builder)


@attack(Code.OUTSIDE_POLICY)
def shared_noise_that_a_sites_policy_does_not_trust() -> Report:
    builder = started()
    builder.policy("site02", trust=(Trust.SITE,))
    builder.round(privacy=shared(builder), **GRID)
    return ended(builder)


@attack(Code.PARAMETERS)
def reservation_that_counts_on_more_shares_than_were_offered() -> Report:
    builder = started()
    offer = builder.offer(privacy=shared(builder), **GRID)
    builder.reserve("site00", offer, noise_sites=3, noise_share=1.5 / 3**0.5)
    builder.abort(offer)
    return ended(builder)


@attack(Code.ELSEWHERE_SHRANK)
def draws_elsewhere_that_become_fewer() -> Report:
    builder = started()
    for draws in (5, 4):
        offer = builder.offer()
        builder.reserve("site00", offer, elsewhere_draws=draws)
        builder.abort(offer)
    return builder.audit()


@attack(Code.OFFER_NOISE)
def shared_noise_over_several_steps() -> Report:
    builder = started()
    builder.round(privacy=shared(builder, steps=2), **GRID)
    return ended(builder)


@attack(Code.OFFER_NOISE)
def shared_noise_whose_shares_look_larger_than_they_are() -> Report:
    """What a site adds follows from the multiplier; the share is what counts if all others collude."""
    builder = started()
    builder.round(privacy=shared(builder, noise_share=20.0), **GRID)
    return ended(builder)


@attack(Code.OFFER_NOISE)
def shared_noise_of_no_site() -> Report:
    builder = started()
    builder.round(privacy=shared(builder, noise_sites=0), **GRID)
    return ended(builder)


@attack(Code.OFFER_NOISE)
def shared_noise_on_a_grid_that_scaling_rounds_on() -> Report:
    builder = started()
    builder.round(privacy=shared(builder), scale=3.0 * 2**12, clip_range=1000.0)
    return ended(builder)


@attack(Code.OFFER_NOISE)
def shared_noise_on_a_grid_too_coarse() -> Report:
    builder = started()
    builder.round(privacy=shared(builder), scale=2.0**13, clip_range=1000.0)
    return ended(builder)


@attack(Code.OFFER_NOISE)
def shared_noise_too_fine_to_be_drawn_closely_enough() -> Report:
    builder = started()
    builder.round(privacy=shared(builder), scale=2.0**25, clip_range=1.0)
    return ended(builder)


@attack(Code.OFFER_NOISE)
def shared_noise_of_too_few_steps_to_be_smooth() -> Report:
    builder = started()
    few = shared(builder, clip=1.0, noise_multiplier=2.0**-12, noise_share=2.0**-12 / 2**0.5)
    builder.abort(builder.offer(privacy=few, **GRID))
    return ended(builder)


@attack(Code.DUPLICATE_OFFER)
def offer_logged_twice() -> Report:
    builder = started()
    offer = builder.offer()
    builder.leaves.append(builder.leaves[-1])
    builder.abort(offer)
    return ended(builder)


@attack(Code.OFFER_ORDER)
def two_offers_for_one_attempt() -> Report:
    builder = started()
    builder.abort(builder.offer())
    builder.abort(builder.offer(round=builder.round_number, clip_range=2.0))
    return ended(builder)


@attack(Code.MODEL_CHAIN)
def round_started_from_another_model() -> Report:
    builder = started()
    builder.round(model_hash=digest("poisoned"))
    return ended(builder)


# --- what sites charge ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"charge": Charge(sampling_rate=0.2, noise_multiplier=1.5, steps=1)},
        {"charge": Charge(sampling_rate=0.25, noise_multiplier=1.6, steps=1)},
        {"charge": Charge(sampling_rate=0.25, noise_multiplier=1.5, steps=2)},
        {"noise_share": 1.4},
        {"noise_sites": 2},
        {"colluders": 0},
        {"clip": 0.5},
        {"trust": Trust.AGGREGATE},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_charged_parameter_is_compared_with_the_offer(changes: dict) -> None:
    builder = started()
    builder.policy("site00", schedule=Schedule.FREE)  # or another mechanism would be a finding of its own
    offer = builder.offer()
    builder.reserve("site00", offer, **changes)
    builder.abort(offer)
    assert codes(ended(builder)) == {"parameters"}


@attack(Code.PARAMETERS)
def site_that_charges_half_the_steps() -> Report:
    builder = started()
    offer = builder.offer(privacy=privacy(builder, steps=2))
    builder.reserve("site00", offer, charge=Charge(sampling_rate=0.25, noise_multiplier=1.5, steps=1))
    builder.abort(offer)
    return ended(builder)


@attack(Code.NO_OFFER)
def reservation_for_an_offer_kept_off_the_ledger() -> Report:
    builder = started()
    offer = builder.offer()
    builder.leaves.pop()
    builder.reserve("site00", offer)
    return ended(builder)


@attack(Code.NO_OFFER)
def close_of_an_attempt_never_offered() -> Report:
    builder = started()
    builder.abort(builder.federation.offer(round=77))
    return ended(builder)


@attack(Code.NOT_PARTICIPANT)
def site_that_was_not_asked() -> Report:
    builder = started()
    offer = builder.offer(participants=("site00", "site01", "site02"))
    builder.refuse("site03", offer)
    builder.abort(offer)
    return ended(builder)


@attack(Code.NO_POLICY)
def site_without_a_policy() -> Report:
    builder = LedgerBuilder(Federation.of(4))
    builder.leaves.append(seal(builder.federation.roster, OPERATOR, builder.federation.operator))
    for site in builder.federation.names[1:]:
        builder.policy(site)
    return ended(builder)


@pytest.mark.parametrize(
    "bound",
    [
        {"min_noise_multiplier": 1.6},
        {"max_sampling_rate": 0.2},
        {"max_clip": 0.5},
        {"min_participants": 5},
        {"min_survivors": 4},
        {"min_threshold": 4},
        {"min_colluders": 3},
        {"trust": (Trust.AGGREGATE,)},
        {"delta": 1e-6},
    ],
    ids=lambda bound: next(iter(bound)),
)
def test_every_bound_of_a_policy_is_held_against_the_site(bound: dict) -> None:
    builder = started()
    builder.policy("site02", **bound)
    report = ended(builder)
    assert codes(report) == {"outside-policy"}
    assert {finding.site for finding in report.findings} == {"site02"}


@attack(Code.OUTSIDE_POLICY)
def more_steps_than_the_policy_allows() -> Report:
    builder = started()
    builder.round(privacy=privacy(builder, steps=5))
    return ended(builder)


@attack(Code.OUTSIDE_POLICY)
def policy_that_pins_another_roster() -> Report:
    builder = started()
    builder.policy("site02", roster_hash="f" * 64)
    return ended(builder)


@attack(Code.ELSEWHERE_SHRANK)
def spending_elsewhere_that_is_forgotten() -> Report:
    builder = started()
    offer = builder.offer()
    builder.reserve("site00", offer, elsewhere=(Charge(sampling_rate=0.1, noise_multiplier=2.0, steps=50),))
    builder.abort(offer)
    return ended(builder)


@attack(Code.OVER_CAP)
def site_that_trains_past_its_cap() -> Report:
    builder = LedgerBuilder(cap=1.5).enrol()
    for _ in range(6):
        builder.round()
    return builder.audit()


@attack(Code.OVER_CAP)
def parameters_changed_to_slip_under_the_cap() -> Report:
    """Epsilon for a schedule fixed beforehand stays below the cap; what is enforced where it changes does not."""
    one = Charge(sampling_rate=0.25, noise_multiplier=4.0, steps=1)
    other = Charge(sampling_rate=0.1, noise_multiplier=2.0, steps=1)
    low, high = epsilon([one, other], 1e-5), epsilon_rdp([one, other], 1e-5)
    builder = LedgerBuilder(cap=(low + high) / 2).enrol()
    for site in builder.federation.names:
        builder.policy(site, schedule=Schedule.FREE)
    for part in (one, other):
        sigma = part.noise_multiplier
        asked = {"sampling_rate": part.sampling_rate, "noise_multiplier": sigma, "noise_share": sigma}
        builder.round(privacy=privacy(builder, **asked))
    report = builder.audit()
    assert {row.epsilon for row in report.sites} == {high}
    return report


@attack(Code.SCHEDULE)
def parameters_changed_under_a_fixed_schedule() -> Report:
    """A site that promised one mechanism was talked into a second one: its tighter bound no longer holds."""
    builder = started()
    builder.round(privacy=privacy(builder, noise_multiplier=2.5, noise_share=2.5))
    return builder.audit()


@attack(Code.DUPLICATE_RESERVATION)
def two_reservations_for_one_attempt() -> Report:
    builder = started()
    offer = builder.offer()
    builder.reserve("site00", offer)
    builder.reserve("site00", offer)
    builder.abort(offer)
    return ended(builder)


@attack(Code.NO_RESERVATION)
def training_before_it_is_charged() -> Report:
    builder = started()
    offer = builder.offer()
    builder.receipt("site00", offer)
    builder.reserve("site00", offer)
    builder.abort(offer)
    return ended(builder)


@attack(Code.STEPS)
def more_steps_done_than_charged() -> Report:
    builder = started()
    offer = builder.offer()
    builder.reserve("site00", offer)
    builder.receipt("site00", offer, steps=2)
    builder.abort(offer)
    return ended(builder)


@attack(Code.DUPLICATE_RECEIPT)
def two_vectors_under_one_mask() -> Report:
    builder = started()
    offer = builder.offer()
    builder.reserve("site00", offer)
    builder.receipt("site00", offer)
    builder.receipt("site00", offer, vector_hash=digest("second"))
    builder.abort(offer)
    return ended(builder)


# --- what the server opens --------------------------------------------------------------------------------------
def opening(**changes: object) -> LedgerBuilder:
    """A round that all four sites took part in, closed as the server pleases."""
    builder = started()
    offer = builder.offer()
    for site in offer.participants:
        builder.reserve(site, offer)
        builder.receipt(site, offer)
    builder.close(offer, changes.pop("survivors_named", offer.participants), **changes)
    return builder


@attack(Code.DUPLICATE_CLOSE)
def attempt_closed_twice() -> Report:
    builder = opening()
    builder.leaves.append(builder.leaves[-1])
    return ended(builder)


@attack(Code.CLOSE_MALFORMED)
def opened_without_a_model() -> Report:
    return opening(model_hash=None).audit()


@attack(Code.CLOSE_MALFORMED)
def opened_without_saying_over_which_keys() -> Report:
    return opening(keys_hash=None).audit()


@attack(Code.CLOSE_MALFORMED)
def opened_and_aborted_at_once() -> Report:
    return opening(reason="and yet").audit()


@attack(Code.CLOSE_MALFORMED)
def aborted_with_a_new_model() -> Report:
    builder = started()
    builder.abort(builder.offer(), model_hash=digest("sneaked in"))
    return ended(builder)


@attack(Code.CLOSE_MALFORMED)
def aborted_without_a_reason() -> Report:
    builder = started()
    builder.abort(builder.offer(), reason="")
    return ended(builder)


@attack(Code.SURVIVORS, Code.AGREEMENTS)
def opened_over_too_few() -> Report:
    names = LedgerBuilder().federation.names
    return opening(survivors_named=names[:2], agreers=names[:2]).audit()


@attack(Code.SURVIVORS, Code.NO_RECEIPT)
def opened_over_a_site_that_was_not_asked() -> Report:
    builder = started()
    asked = builder.federation.names[:3]
    offer = builder.offer(participants=asked)
    for site in asked:
        builder.reserve(site, offer)
        builder.receipt(site, offer)
    builder.close(offer, builder.federation.names, agreers=asked)
    return ended(builder)


@attack(Code.NO_RECEIPT)
def survivor_without_a_receipt() -> Report:
    builder = started()
    offer = builder.offer()
    for site in offer.participants[1:]:
        builder.reserve(site, offer)
        builder.receipt(site, offer)
    builder.close(offer, offer.participants)
    return ended(builder)


@attack(Code.NO_RECEIPT)
def opened_before_the_receipt_was_there() -> Report:
    builder = started()
    offer = builder.offer()
    for site in offer.participants:
        builder.reserve(site, offer)
    for site in offer.participants[1:]:
        builder.receipt(site, offer)
    builder.close(offer, offer.participants)
    builder.receipt(offer.participants[0], offer)
    return ended(builder)


@attack(Code.VECTOR)
def other_vector_opened_than_was_sent() -> Report:
    builder = started()
    offer = builder.offer()
    for site in offer.participants:
        builder.reserve(site, offer)
        builder.receipt(site, offer)
    vectors = {site: builder.vector(site, offer) for site in offer.participants}
    builder.close(offer, offer.participants, survivors={**vectors, "site00": digest("other")})
    return ended(builder)


@attack(Code.AGREEMENTS)
def opened_with_too_few_agreements() -> Report:
    return opening(agreers=("site00", "site01")).audit()


@attack(Code.AGREEMENTS)
def agreement_replayed_from_another_round() -> Report:
    builder = opening()
    old = next(leaf.body for leaf in builder.leaves if isinstance(leaf.body, Close))
    assert old.outcome is Outcome.OPENED
    offer = builder.offer()
    for site in offer.participants:
        builder.reserve(site, offer)
        builder.receipt(site, offer)
    builder.close(offer, offer.participants, agreements=old.agreements)
    return ended(builder)


@attack(Code.AGREEMENTS)
def agreement_of_a_site_outside_the_offer() -> Report:
    builder = started()
    asked = builder.federation.names[:3]
    offer = builder.offer(participants=asked)
    for site in asked:
        builder.reserve(site, offer)
        builder.receipt(site, offer)
    builder.close(offer, asked, agreers=builder.federation.names)
    return ended(builder)


@attack(Code.UNKNOWN_AUTHOR, Code.LEFT_OUT)
def flood_of_findings() -> Report:
    builder = LedgerBuilder().enrol()
    body = Refusal(seq=1, prev=FIRST_LINK, context="a" * 64, reason="")
    noise = encode(seal(body, "stranger", Ed25519PrivateKey.generate()))
    lines = builder.lines() + [noise] * (MAX_FINDINGS + 5)
    return verify_ledger(lines, builder.federation.roster, head_of(lines))


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_found_under_its_own_code(name: str) -> None:
    expected, run = ATTACKS[name]
    report = run()
    assert codes(report) == expected
    assert not report.ok


def test_every_code_is_reached_by_an_attack() -> None:
    reached = set().union(*(expected for expected, _ in ATTACKS.values()))
    # Commands and leaving have attacks of their own, which compare codes by these words.
    elsewhere = Path(__file__).with_name("test_ledger_commands.py").read_text()
    reached |= {code.value for code in Code if f'"{code.value}"' in elsewhere}
    assert {code.value for code in Code} == reached


def test_flood_is_bounded_and_counted() -> None:
    report = flood_of_findings()
    assert len(report.findings) == MAX_FINDINGS + 1
    assert report.findings[-1].detail.startswith("5 ")


def test_blame_falls_on_the_author() -> None:
    report = hidden_reservation_of_a_site_that_dropped_out()
    assert [(finding.site, finding.code) for finding in report.findings] == [("site02", Code.CHAIN_GAP)]
    report = offer_with_a_lowered_threshold()
    assert {finding.site for finding in report.findings} == {None}


def test_cap_finding_names_the_first_leaf_over_it() -> None:
    builder = LedgerBuilder(cap=1.5).enrol()
    for _ in range(6):
        builder.round()
    report = builder.audit()
    for finding in report.findings:
        reservations = builder.find(Reservation, finding.site)
        assert finding.leaf in reservations
        assert finding.site not in {f.site for f in cut(builder, finding.leaf).findings}, "not yet"
        assert finding.site in {f.site for f in cut(builder, finding.leaf + 1).findings}
    assert len(report.findings) == 4


def cut(builder: LedgerBuilder, end: int) -> Report:
    lines = builder.lines()[:end]
    return verify_ledger(lines, builder.federation.roster, head_of(lines))


def test_shared_noise_as_it_should_be_is_found_nothing_wrong_with() -> None:
    builder = started()
    builder.round(privacy=shared(builder), **GRID)
    assert ended(builder).findings == ()


def test_what_was_spent_elsewhere_counts_with_its_shares_and_draws() -> None:
    """Shared noise spent in another federation is half as much if all others collude, and takes of delta here."""
    builder = LedgerBuilder().enrol()
    offer = builder.offer()
    spent = Charge(sampling_rate=0.25, noise_multiplier=1.5, steps=40)
    own = spent.model_copy(update={"noise_multiplier": 1.5 / 2**0.5})
    builder.reserve("site00", offer, elsewhere=(spent,), elsewhere_alone=(own,), elsewhere_draws=80)
    builder.abort(offer)
    report = builder.audit()
    assert report.ok, report.findings
    row = next(row for row in report.sites if row.site == "site00")
    here = Charge(sampling_rate=0.25, noise_multiplier=1.5, steps=1)
    usable = 1e-5 * (1 - 2.0**-10)
    assert row.epsilon == epsilon([spent, here], usable) > epsilon([spent, here], 1e-5)
    assert row.epsilon_rdp == epsilon_rdp([spent, here], usable)
    assert row.epsilon_all_collude == epsilon_rdp([own, here], usable) > row.epsilon


def test_data_once_trained_on_without_noise_stays_unprotected() -> None:
    builder = LedgerBuilder().enrol()
    for site in builder.federation.names:
        builder.policy(site, trust=tuple(Trust), min_noise_multiplier=1e-6)
    none = privacy(builder, trust=Trust.NONE, noise_multiplier=1e-6, noise_share=1e-6)
    builder.round(privacy=none)
    builder.round(privacy=shared(builder), **GRID)
    assert {row.trust for row in builder.audit().sites} == {Trust.NONE}
