"""Prefixes of a schedule against a cap: exactly the accountant's answer, in few evaluations."""

import pytest

from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy import accountant, budget
from fedfuse_shared.privacy.accountant import epsilon


def steps(count, sigma=4.0):
    return [Charge(sampling_rate=0.25, noise_multiplier=sigma, steps=1)] * count


def test_it_says_what_the_accountant_says_for_every_prefix(monkeypatch):
    cap = epsilon(steps(23), 1e-5)
    asked = []
    monkeypatch.setattr(accountant, "epsilon", lambda *question: asked.append(1) or epsilon(*question))
    answers = [budget.fits(steps(count), 1e-5, cap) for count in range(40)]
    assert answers == [count <= 23 for count in range(40)]
    assert len(asked) <= 14


def test_a_cap_that_is_no_number_fits_nothing():
    assert not budget.fits(steps(1), 1e-5, float("nan"))


def test_several_mechanisms_are_not_its_business():
    with pytest.raises(ValueError, match="several"):
        budget.fits([*steps(1), *steps(1, sigma=5.0)], 1e-5, 8.0)
