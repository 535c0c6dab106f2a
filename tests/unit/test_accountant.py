"""The accountant against the design's reference values, against Opacus, and at the edges of what can be asked."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy import accountant, calibration
from fedfuse_shared.privacy.accountant import epsilon, epsilon_enforced, epsilon_rdp
from fedfuse_shared.privacy.calibration import noise_multiplier
from fedfuse_shared.privacy.mechanisms import MAX_STEPS, merge

REFERENCE = [
    # q, sigma, steps, PLD, Opacus PRV upper bound, RDP; delta = 1e-5
    (0.01, 1.0, 1000, 1.828, 1.838, 2.101),
    (0.05, 2.0, 500, 2.532, 2.542, 2.769),
    (0.2, 4.0, 200, 3.070, 3.080, 3.341),
]


def charge(rate: float, sigma: float, steps: int) -> Charge:
    return Charge(sampling_rate=rate, noise_multiplier=sigma, steps=steps)


@pytest.mark.parametrize(("rate", "sigma", "steps", "pld", "prv", "rdp"), REFERENCE)
def test_reference_values(rate: float, sigma: float, steps: int, pld: float, prv: float, rdp: float) -> None:
    charges = [charge(rate, sigma, steps)]
    assert epsilon(charges, 1e-5) == pytest.approx(pld, abs=1e-3)
    assert epsilon_rdp(charges, 1e-5) == pytest.approx(rdp, abs=1e-3)
    assert epsilon(charges, 1e-5) < prv < epsilon_rdp(charges, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "sigma", "steps"), [row[:3] for row in REFERENCE])
def test_opacus_agrees_within_three_hundredths(rate: float, sigma: float, steps: int) -> None:
    from opacus.accountants import PRVAccountant

    theirs = PRVAccountant()
    theirs.history = [(sigma, rate, steps)]
    assert epsilon([charge(rate, sigma, steps)], 1e-5) == pytest.approx(theirs.get_epsilon(1e-5), abs=0.03)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == epsilon_rdp([], 1e-5) == 0.0


def test_order_and_splitting_do_not_matter() -> None:
    one, other = charge(0.1, 2.0, 30), charge(0.2, 3.0, 10)
    split = [charge(0.1, 2.0, 10), other, charge(0.1, 2.0, 20)]
    assert merge(split) == merge([other, one]) == (one, other)
    assert epsilon(split, 1e-5) == epsilon([other, one], 1e-5)


def test_what_may_have_been_chosen_on_the_way_is_enforced_by_renyi() -> None:
    """Design page 3, rule 3: the privacy loss distribution is no filter for parameters that change."""
    one, other = charge(0.25, 4.0, 20), charge(0.1, 2.0, 20)
    assert epsilon_enforced([one, one], 1e-5, Schedule.FIXED) == epsilon([one, one], 1e-5)
    for mixed, schedule in (([one, other], Schedule.FREE), ([one, other], Schedule.FIXED)):
        assert epsilon_enforced(mixed, 1e-5, schedule) == epsilon_rdp(mixed, 1e-5) > epsilon(mixed, 1e-5)
    assert epsilon_enforced([], 1e-5, Schedule.FIXED) == 0.0


def test_a_free_schedule_counts_by_renyi_before_anything_changed() -> None:
    """Changing from one bound to the other on the way would hold at twice delta only."""
    once = [charge(0.25, 4.0, 20)]
    assert epsilon_enforced(once, 1e-5, Schedule.FREE) == epsilon_rdp(once, 1e-5)


def test_steps_beyond_what_a_charge_can_state_are_not_lost() -> None:
    merged = merge([charge(0.1, 2.0, MAX_STEPS)] * 2 + [charge(0.1, 2.0, 5)])
    assert [part.steps for part in merged] == [MAX_STEPS, MAX_STEPS, 5]


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([0.01, 0.25, 1.0]),
    st.sampled_from([1.0, 1.5, 8.0]),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_more_steps_never_cost_less(rate: float, sigma: float, steps: int, more: int) -> None:
    """The audit searches the first prefix over a cap by bisection: this is why it may."""
    before = epsilon([charge(rate, sigma, steps)], 1e-5)
    assert before <= epsilon([charge(rate, sigma, steps + more)], 1e-5)
    assert before <= epsilon([charge(rate, sigma, steps), charge(0.05, 2.0, more)], 1e-5)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.floats(1e-3, 1.0), st.floats(0.8, 20.0), st.integers(1, 300), st.sampled_from([1e-9, 1e-6, 1e-5, 1e-3])
)
def test_renyi_is_never_below(rate: float, sigma: float, steps: int, delta: float) -> None:
    charges = [charge(rate, sigma, steps)]
    assert epsilon(charges, delta) <= epsilon_rdp(charges, delta) * (1 + 1e-9) + 2e-4


@pytest.mark.parametrize(
    "hostile",
    [
        [charge(0.25, 1e-300, 1)],
        [charge(1.0, 0.001, 10**9)],
        [charge(0.25, 1e300, 10**9)],
        [charge(1e-300, 1.0, 10**9)],
        [charge(0.25, 0.5, 10**9)],
        pytest.param(
            [charge(0.25, 1.0 + number / 1000, 1) for number in range(1000)], marks=pytest.mark.slow
        ),
    ],
    ids=[
        "no noise",
        "hardly any",
        "endless noise",
        "hardly any sampling",
        "endless steps",
        "1000 mechanisms",
    ],
)
def test_hostile_charges_give_a_bound_and_no_crash(hostile: list[Charge]) -> None:
    """From somebody else's ledger: no overflow, no gigabytes; an unbounded epsilon is infinite, never small."""
    spent = epsilon(hostile, 1e-5)
    assert spent >= 0
    if min(part.noise_multiplier for part in hostile) < 1e-3:
        assert math.isinf(spent)


def test_large_budgets_are_bounded_without_the_distribution() -> None:
    charges = [charge(1.0, 0.3, 20)]
    assert epsilon(charges, 1e-5) == epsilon_rdp(charges, 1e-5) > accountant.MAX_EPSILON


def test_rare_mechanisms_are_charged_together_and_never_less() -> None:
    """A long-lived data set sees many schedules; those beyond the limit cost more than alone, never less."""
    common = [charge(0.1, 5.0 + number / 100, 50) for number in range(accountant.MAX_MECHANISMS - 1)]
    rare = [charge(0.05, 6.0, 2), charge(0.1, 8.0, 3)]
    together = charge(0.1, 6.0, 5)
    assert epsilon_rdp([*common, *rare], 1e-5) == epsilon_rdp([*common, together], 1e-5)
    assert epsilon_rdp([*common, *rare], 1e-5) > epsilon_rdp([*common, rare[0]], 1e-5)


def test_delta_below_the_cut_tails_still_gives_a_number() -> None:
    assert 0 < epsilon([charge(0.25, 4.0, 10)], 1e-100) < 100


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        epsilon([charge(0.1, 1.0, 1)], delta)


def test_accounting_loads_no_torch_and_nothing_before_it_is_asked() -> None:
    code = (
        "import sys; from fedfuse_shared.privacy.accountant import epsilon\n"
        "from fedfuse_shared.ledger.records import Charge\n"
        "assert 'dp_accounting' not in sys.modules\n"
        "epsilon([Charge(sampling_rate=0.5, noise_multiplier=2.0, steps=1)], 1e-5)\n"
        "assert 'dp_accounting' in sys.modules\n"
        "assert not {'torch', 'flwr', 'opacus'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- calibration ------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedfuse" / "calibration"


PLAN = (1e-5, 0.25, 120)


@pytest.mark.parametrize(("target", "design"), [(1.0, 10.35), (3.0, 3.97), (8.0, 1.84)])
def test_calibration_is_tight_and_never_over(target: float, design: float) -> None:
    """The design's three noise multipliers; one part in ten thousand less noise is too little."""
    sigma = noise_multiplier(target, *PLAN)
    assert sigma == pytest.approx(design, rel=1e-3)
    assert len(repr(sigma).replace(".", "").lstrip("0")) <= 5
    assert epsilon([charge(0.25, sigma, 120)], 1e-5) <= target
    assert epsilon([charge(0.25, sigma * (1 - 1.01e-4), 120)], 1e-5) > target


def test_answer_is_remembered_and_checked_before_it_is_believed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigma = noise_multiplier(3.0, *PLAN)
    (entry,) = cache.iterdir()
    assert json.loads(entry.read_bytes()) == sigma
    with monkeypatch.context() as patched:
        patched.setattr(calibration, "_search", lambda *_: pytest.fail("it was remembered"))
        assert noise_multiplier(3.0, *PLAN) == sigma
    for poison in ("0.5", "2.0", "9.0", "1e9", "NaN", "true", "[]", "\xff", ""):
        entry.write_text(poison, encoding="latin-1")
        assert noise_multiplier(3.0, *PLAN) == sigma, poison
        assert json.loads(entry.read_bytes()) == sigma, poison


def test_another_question_is_another_entry(cache: Path) -> None:
    questions = [(1.0, 1e-5, 0.1, 50), (1.1, 1e-5, 0.1, 50), (1.0, 1e-6, 0.1, 50), (1.0, 1e-5, 0.1, 51)]
    answers = {noise_multiplier(*question) for question in questions}
    assert len(answers) == len(list(cache.iterdir())) == 4


def test_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "fedfuse").write_text("a file where a folder should be")
    assert epsilon([charge(0.5, noise_multiplier(2.0, 1e-5, 0.5, 3), 3)], 1e-5) <= 2.0


def test_target_that_hardly_needs_noise_gets_the_least() -> None:
    sigma = noise_multiplier(5000.0, 1e-5, 0.01, 1)
    assert sigma == 0.2


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ((0.0, 1e-5, 0.25, 120), "epsilon 0.0 is not a positive number"),
        ((math.inf, 1e-5, 0.25, 120), "not a positive number"),
        ((math.nan, 1e-5, 0.25, 120), "not a positive number"),
        ((1.0, 0.0, 0.25, 120), "delta 0.0"),
        ((1.0, 1e-5, 1.5, 120), "sampling rate 1.5"),
        ((1.0, 1e-5, 0.25, 0), "0 steps"),
        ((0.001, 1e-5, 1.0, 10**6), "reaches epsilon 0.001 at delta 1e-05"),
    ],
)
def test_impossible_targets_say_the_numbers(question: tuple, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        noise_multiplier(*question)


@pytest.mark.parametrize("factor", [0.4, 0.97, 1.0, 1.03, 2.5])
def test_a_guess_good_or_bad_does_not_change_the_answer(cache: Path, factor: float) -> None:
    question = 20.0, 1e-5, 0.5, 4
    answer = noise_multiplier(*question)
    shutil.rmtree(cache)
    assert noise_multiplier(*question, near=factor * answer) == answer


@pytest.mark.parametrize("guess", [math.nan, math.inf, -1.0, 0.0, 1e9])
def test_an_impossible_guess_is_no_guess(cache: Path, guess: float) -> None:
    assert noise_multiplier(20.0, 1e-5, 0.5, 4, near=guess) == noise_multiplier(20.0, 1e-5, 0.5, 4)
