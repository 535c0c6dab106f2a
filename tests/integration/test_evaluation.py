"""Evaluation under the budget: off by default, charged, noised, opened only as a sum, and on the ledger."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.small_federation import SITES, SmallFederation

from fedfuse_client.data.manifest import load_dataset
from fedfuse_client.home import SiteHome
from fedfuse_client.policy import check_offer
from fedfuse_server.events import RoundOpened, SiteLeftOut
from fedfuse_server.plan import evaluation, resolve
from fedfuse_shared.config.evaluation import Detail
from fedfuse_shared.config.files import load_toml, save_toml
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import decode
from fedfuse_shared.errors import ConfigError, PolicyError
from fedfuse_shared.evaluation import summarise
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Close, Refusal, Reservation
from fedfuse_shared.offer import Offer
from fedfuse_shared.privacy.accountant import epsilon_rdp, usable_delta
from fedfuse_simulations.session import audit

pytestmark = pytest.mark.slow

EVALUATION = {"every": 2, "noise": 8.0}
BUDGET = {"epsilon": 200.0}


def leaves(home, kind):
    lines = [entry.raw for entry in read_ledger(home.ledger)]
    return [decode(raw, kind, who="ledger") for raw in lines if kind_of(raw) == kind.kind]


@pytest.fixture(scope="module", params=list(Detail))
def run(request, tmp_path_factory):
    changes = {"rounds": 5, "privacy": BUDGET, "evaluation": {**EVALUATION, "detail": request.param.value}}
    federation = SmallFederation(tmp_path_factory.mktemp("run"), changes)
    federation.run()
    return federation


def test_rounds_three_and_five_evaluate_and_are_charged(run):
    offers = {offer.body.context(): offer.body for offer in leaves(run.home, Offer)}
    cells = 2 if run.config.evaluation.detail is Detail.ACCURACY else 4
    assert {offer.round: offer.counts for offer in offers.values()} == {1: 0, 2: 0, 3: cells, 4: 0, 5: cells}
    for reservation in leaves(run.home, Reservation):
        offer = offers[reservation.body.context]
        assert (reservation.body.evaluation is not None) == (offer.round in {3, 5})
        assert len(reservation.body.charges) == (2 if offer.round in {3, 5} else 1)
    for close in leaves(run.home, Close):
        assert len(close.body.counts) == offers[close.body.context].counts


def test_the_audit_composes_both_mechanisms_by_renyi(run):
    report = audit(run.home)
    assert report.ok, report.findings
    for row in report.sites:
        own = [c for r in leaves(run.home, Reservation) if r.author == row.site for c in r.body.charges]
        assert row.schedule is Schedule.FREE
        assert row.mechanisms == 2
        # A little of delta is kept for the integer noise's distance from its ideal.
        kept = usable_delta(1e-5, shared=True)
        assert row.epsilon == row.epsilon_rdp == pytest.approx(epsilon_rdp(own, kept))
        assert row.epsilon > epsilon_rdp(own, 1e-5)


def test_counts_are_those_of_the_test_rows_up_to_noise(run):
    """All rows counted lie within seven deviations of the truth: false alarms below 1e-9 in all."""
    opened = {event.round: event for event in run.told(RoundOpened)}
    truth = len(load_dataset(run.root / "data").select(split="test"))
    for number in (3, 5):
        evaluated = opened[number].evaluated
        cells = 2 if run.config.evaluation.detail is Detail.ACCURACY else 4
        assert abs(evaluated.rows - truth) < 7 * 8.0 * np.sqrt(len(SITES) * cells)
        assert (
            evaluated.rows != truth or number == 3
        )  # with noise, both hitting the truth has a chance of 1e-3
    assert opened[1].evaluated is opened[2].evaluated is opened[4].evaluated is None


def test_noise_on_the_opened_counts_is_everybodys(tmp_path):
    """Four sites' noise: the variance of many opened counts, chi-square with 199 degrees of freedom, at 1e-9."""
    from fedfuse_client.evaluation import noised

    federation = SmallFederation(tmp_path, {"rounds": 3, "privacy": BUDGET, "evaluation": EVALUATION})
    federation.run()
    (offer,) = [offer.body for offer in leaves(federation.home, Offer) if offer.body.round == 3]
    zeros = np.zeros(2, dtype=np.int64)
    draws = np.array([sum(noised(zeros, offer) for _ in SITES) for _ in range(100)]).flatten()
    chi = (draws**2).sum() / (len(SITES) * 8.0**2)
    assert 106 < chi < 340


def test_a_count_cannot_wrap_whatever_a_site_counts(run):
    from fedfuse_client.evaluation import noised

    offer = next(o.body for o in leaves(run.home, Offer) if o.body.counts)
    most = noised(np.full(offer.counts, 2**40), offer)
    assert (most * len(offer.participants) < 2 ** (offer.ring_bits - 1)).all()


def test_without_the_setting_nothing_is_evaluated_or_promised(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    policy = SiteHome(federation.folders["bern"]).load_policy()
    assert policy.min_evaluation_noise is None
    assert policy.schedule is Schedule.FIXED
    federation.run()
    assert all(offer.body.evaluation is None for offer in leaves(federation.home, Offer))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_evaluation_noise": None}, "releases none"),
        ({"min_evaluation_noise": 9.0}, "noise 8.0 on counts, policy allows at least 9.0"),
        ({"schedule": Schedule.FIXED}, "fixed to one mechanism"),
    ],
)
def test_a_site_whose_policy_does_not_allow_it_refuses_before_data_are_read(tmp_path, changes, said):
    federation = SmallFederation(tmp_path, {"rounds": 3, "privacy": BUDGET, "evaluation": EVALUATION})
    home = SiteHome(federation.folders["bern"])
    policy = home.load_policy()
    save_toml(home.policy, load_toml(home.policy, type(policy)).model_copy(update=changes))
    federation.run()
    (refusal,) = [leaf.body for leaf in leaves(federation.home, Refusal) if leaf.author == "bern"]
    assert said in refusal.reason
    assert not [leaf for leaf in leaves(federation.home, Reservation) if leaf.author == "bern"]
    assert any(event.site == "bern" for event in federation.told(SiteLeftOut))


def test_a_ring_too_narrow_for_counts_is_refused(run):
    offer = next(o.body for o in leaves(run.home, Offer) if o.body.counts)
    policy = SiteHome(run.folders["bern"]).load_policy()
    check_offer(policy.model_copy(update={"plans": ()}), offer)
    loud = offer.evaluation.model_copy(update={"noise": 2.0**19, "noise_share": 2.0**19})
    narrow = offer.model_copy(update={"ring_bits": 16, "scale": 1.0, "evaluation": loud})
    with pytest.raises(PolicyError, match="no room for counts"):
        check_offer(policy.model_copy(update={"plans": ()}), narrow)


def test_a_site_that_charges_no_evaluation_is_found(run):
    """The plan binds evaluation: an offer that leaves it out, or adds it, is another plan."""
    offer = next(o.body for o in leaves(run.home, Offer) if o.body.counts)
    assert offer.model_copy(update={"evaluation": None}).plan_hash != offer.plan_hash


# --- planning ----------------------------------------------------------------------------------------------------
def settings(run, **evaluation):
    config = run.config
    privacy = config.privacy.model_copy(update={"epsilon": 3.0, "noise_multiplier": None})
    asked = config.evaluation.model_copy(update={"noise": None, **evaluation})
    return config.model_copy(update={"rounds": 11, "privacy": privacy, "evaluation": asked})


def test_training_and_evaluations_together_cost_what_was_asked(run):
    from fedfuse_shared.ledger.records import Charge, gaussian

    config = resolve(settings(run, every=5))
    q, sigma = config.privacy.sampling_rate, config.privacy.noise_multiplier
    counted = [gaussian(config.evaluation.noise)] * 2
    training = Charge(sampling_rate=q, noise_multiplier=sigma, steps=11)
    assert 2.99 < epsilon_rdp([training, *counted], 1e-5) <= 3.0
    assert epsilon_rdp(counted, 1e-5) <= 0.3


def test_no_round_to_evaluate_in_is_an_error(run):
    with pytest.raises(ConfigError, match="end before the first evaluation"):
        resolve(settings(run, every=11))


def test_too_little_noise_is_an_error(run):
    loud = settings(run, every=5, noise=1.0)
    with pytest.raises(ConfigError, match="at least 8"):
        evaluation(loud, len(SITES))


def test_what_counts_say():
    said = summarise([20, 80], Detail.ACCURACY, 2.0)
    assert (said.accuracy, said.rows) == (0.8, 100)
    numbers = np.random.default_rng(1)
    draws = np.array([20, 80]) + numbers.normal(0, 2.0, (20_000, 2))
    assert said.deviation == pytest.approx((draws[:, 1] / draws.sum(axis=1)).std(), rel=0.05)
    matrix = np.array([[30, 5, 5], [2, 20, 3], [1, 4, 30]])
    said = summarise(matrix.flatten().tolist(), Detail.CONFUSION, 1.0)
    assert (said.accuracy, said.rows) == (0.8, 100)
    draws = matrix + numbers.normal(0, 1.0, (20_000, 3, 3))
    accuracy = np.trace(draws, axis1=1, axis2=2) / draws.sum(axis=(1, 2))
    assert said.deviation == pytest.approx(accuracy.std(), rel=0.05)
    drowned = summarise([-5, 3], Detail.ACCURACY, 20.0)
    assert drowned.accuracy is drowned.deviation is None


def test_the_run_says_what_the_sites_counted(tmp_path, monkeypatch):
    """Metrics, JSON and report of a run through the command's own path."""
    from support.small_federation import write_data

    from fedfuse_server.home import RunHome
    from fedfuse_simulations.session import run_session
    from fedfuse_simulations.simulation import Simulation, begin

    home = RunHome(tmp_path / "run")
    settings = {
        "rounds": 3,
        "privacy": {"expected_batch_size": 8, "noise_multiplier": 4.0, **BUDGET},
        "evaluation": EVALUATION,
    }
    simulation = Simulation(data=write_data(tmp_path / "data"), settings=settings)
    begin(home, simulation)
    run_session(home, simulation, json=False)
    metrics = json.loads((home.root / "metrics.json").read_text())
    assert metrics["rounds"][2]["evaluated"]["rows"]
    page = (home.root / "report.html").read_text()
    assert "By the sites, under the budget" in page
    assert "no message of a site carries a score" not in page
