"""`trust = "aggregate"` end to end: it opens, learns, is accounted and refused as promised; every part real.

Four sites, one of which may collude, three of which survive: h = 2 shares of noise are counted on. One site feeds
pictures only. The true integer sums are looked at inside the sites, which nobody else could do.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats
from support.small_federation import SITES, SmallFederation

from fedfuse_client import budget, shared_round
from fedfuse_client.home import SiteHome
from fedfuse_server import coordinator
from fedfuse_server.events import RoundAbandoned, RoundOpened, RunStopped, SiteLeftOut
from fedfuse_server.home import ServerState
from fedfuse_server.optimiser import GlobalModel
from fedfuse_server.plan import bounds_for, resolve, scale_for
from fedfuse_server.shared_noise import count_share
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.evaluation import Detail
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.files import save_toml
from fedfuse_shared.envelope import decode
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.evaluation import summarise
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Charge, Close, Outcome, Policy, Refusal, Reservation
from fedfuse_shared.messages import Step
from fedfuse_shared.models import build_model, flatten
from fedfuse_shared.offer import Offer
from fedfuse_shared.privacy import accountant, aggregate
from fedfuse_shared.privacy.integer_noise import SMOOTH
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

SIGMA, HONEST, ROUNDS = 1.5, 2, 4
PRIVACY = {"trust": "aggregate", "noise_multiplier": SIGMA, "epsilon": 30.0}
USABLE = 1e-5 * (1 - 2.0**-10)
"""What inexact draws leave of delta."""


def leaves(federation, kind):
    lines = [entry.raw for entry in read_ledger(federation.home.ledger)]
    return [decode(raw, kind, who="ledger") for raw in lines if kind_of(raw) == kind.kind]


def change_policy(federation, site, **changes):
    home = SiteHome(federation.folders[site])
    save_toml(home.policy, home.load_policy().model_copy(update=changes))


class Watched:
    """What the sites added noise to, and what was opened, round by round."""

    def __init__(self) -> None:
        self.sums = defaultdict(list)
        self.opened = {}

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        real_share, real_average = shared_round.with_share, coordinator.average

        def with_share(steps, offer, noise):
            self.sums[offer.round].append(steps.copy())
            return real_share(steps, offer, noise)

        def average(total, offer, survivors):
            self.opened[offer.round] = total.copy(), offer, survivors
            return real_average(total, offer, survivors)

        patch.setattr(shared_round, "with_share", with_share)
        patch.setattr(coordinator, "average", average)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    changes = {"rounds": ROUNDS, "privacy": PRIVACY}
    federation = SmallFederation(tmp_path_factory.mktemp("aggregate"), changes)
    change_policy(federation, "rome", modalities=(Modality.IMAGE,))
    federation.watched = Watched()
    with pytest.MonkeyPatch.context() as patch:
        federation.watched.watch(patch)
        federation.run()
    return federation


# --- a run as it should be ----------------------------------------------------------------------------------------


def test_every_round_is_opened_with_everyone(run):
    assert [(event.round, event.survivors) for event in run.told(RoundOpened)] == [
        (number, SITES) for number in range(1, ROUNDS + 1)
    ]
    assert not run.told(SiteLeftOut)


def test_the_model_learns(run):
    from fedfuse_client.data.manifest import load_dataset
    from fedfuse_simulations.examiner import Examiner

    scores = Examiner(run.config.model, load_dataset(run.root / "data")).examine_published(run.home)
    # Chance is 0.5; eight runs of this scored 0.9 to 1.0, so noise alone does not turn it red.
    assert scores.all_rows.accuracy > 0.7


def test_offers_and_reservations_state_mode_colluders_shares_and_both_multipliers(run):
    offers = {envelope.body.context(): envelope.body for envelope in leaves(run, Offer)}
    for offer in offers.values():
        asked = offer.privacy
        assert (asked.trust, asked.steps, offer.neighbours) == (Trust.AGGREGATE, 1, 0)
        assert (offer.colluders, offer.min_survivors, asked.noise_sites) == (1, 3, HONEST)
        assert (asked.noise_multiplier, asked.noise_share) == (SIGMA, SIGMA / math.sqrt(HONEST))
        assert offer.scale == aggregate.least_scale(asked.clip, offer.dimension())
    found = leaves(run, Reservation)
    assert len(found) == ROUNDS * len(SITES)
    for body in (envelope.body for envelope in found):
        asked = offers[body.context].privacy
        assert (body.trust, body.colluders, body.noise_sites) == (Trust.AGGREGATE, 1, HONEST)
        assert (body.charge.noise_multiplier, body.noise_share) == (SIGMA, asked.noise_share)
        assert (body.draws, body.charge.steps) == (HONEST, 1)


def test_the_audit_holds_and_states_both_epsilons_at_the_delta_that_draws_leave(run):
    report = audit(run.home)
    assert report.ok, report.findings
    (body, *_) = (envelope.body for envelope in leaves(run, Reservation))
    charge = body.charge.model_copy(update={"steps": ROUNDS})
    alone = charge.model_copy(update={"noise_multiplier": SIGMA / math.sqrt(HONEST)})
    for row in report.sites:
        assert (row.trust, row.colluders, row.rounds, row.delta) == (Trust.AGGREGATE, 1, ROUNDS, 1e-5)
        assert row.epsilon == pytest.approx(accountant.epsilon([charge], USABLE), rel=1e-12)
        assert row.epsilon_rdp == pytest.approx(accountant.epsilon_rdp([charge], USABLE), rel=1e-12)
        assert row.epsilon_all_collude == pytest.approx(accountant.epsilon([alone], USABLE), rel=1e-12)
        assert accountant.epsilon([charge], 1e-5) < row.epsilon < row.epsilon_rdp
        assert row.epsilon < row.epsilon_all_collude
        slack = aggregate.slack_of_draws(row.epsilon, ROUNDS * HONEST)
        assert 0 < slack <= 1e-5 * 2.0**-10


def test_a_site_reckons_what_the_audit_reckons(run, monkeypatch):
    row = audit(run.home).sites[0]
    home = SiteHome(run.folders[row.site])
    # What is left and how it came about takes many evaluations of the accountant.
    monkeypatch.setattr(budget, "POINTS", 1)
    monkeypatch.setattr(budget, "_MOST_ROUNDS", 1)
    with home.open_store() as store:
        (statement,) = budget.statements(store, home.load_policy())
    assert statement.epsilon == row.epsilon


def test_the_opened_sum_is_the_true_one_plus_exactly_the_promised_noise(run):
    """Four shares of v^2 = (sigma C' s)^2 / h + 4 each, on every coordinate of every modality.

    Chi-square in both tails over all coordinates of four rounds: false alarms 1e-9 for each of the three parts. The
    largest part sees 4 % more or less variance, so one share of the four that is missing anywhere shows.
    """
    squares, counted = defaultdict(float), defaultdict(int)
    for number, (total, offer, survivors) in run.watched.opened.items():
        sums = run.watched.sums[number]
        assert len(sums) == survivors == len(SITES)
        d = offer.dimension()
        noise = total[:d].view(np.int32).astype(np.int64) - sum(sums)
        moved = aggregate.sensitivity(offer.privacy.clip, offer.scale, d) * offer.scale
        variance = survivors * ((SIGMA * moved) ** 2 / HONEST + SMOOTH**2)
        start = 0
        for segment in offer.layout:
            part = noise[start : start + segment.size] / math.sqrt(variance)
            squares[segment.modality] += float((part**2).sum())
            counted[segment.modality] += segment.size
            start += segment.size
    for modality, total in squares.items():
        tails = stats.chi2.sf(total, counted[modality]), stats.chi2.cdf(total, counted[modality])
        assert min(tails) > 0.5e-9, (modality, total / counted[modality])
    largest = max(counted.values())
    assert stats.chi2.isf(0.5e-9, largest) / largest < 1.1


def test_a_site_without_a_modality_adds_noise_to_nothing_there(run):
    _, offer, _ = run.watched.opened[1]
    start = 0
    absent = 0
    for segment in offer.layout:
        part = slice(start, start + segment.size)
        silent = [sums for sums in run.watched.sums[1] if not sums[part].any()]
        if segment.modality is Modality.TEXT:
            assert len(silent) == 1, "rome has no text; its share is among those the variance is tested of"
            absent += segment.size
        start += segment.size
    assert absent > 100


def test_the_server_steps_against_the_opened_sum_by_public_constants(run):
    """Momentum and moving average over the opened sums give the model on disk to float32."""
    model = GlobalModel(flatten(build_model(run.config.model, run.config.seed)))
    for number in range(1, ROUNDS + 1):
        total, offer, survivors = run.watched.opened[number]
        signed = total.view(np.int32).astype(np.float64)
        step = offer.training.step_size(SIGMA / math.sqrt(HONEST)) / offer.privacy.expected_batch_size
        update, start = np.zeros(offer.dimension()), 0
        for segment in offer.layout:
            # Rome declares no text.
            feed = survivors - (segment.modality is Modality.TEXT)
            update[start : start + segment.size] = (
                -step * signed[start : start + segment.size] / offer.scale / feed
            )
            start += segment.size
        model.apply(update.astype(np.float32), run.config.aggregation)
    state = ServerState.load(run.home.state).model
    for mine, theirs in ((model.weights, state.weights), (model.published, state.published)):
        assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


# --- who is missing, who refuses ----------------------------------------------------------------------------------


def test_a_policy_that_trusts_nobody_refuses_and_the_others_go_on_with_the_same_h(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1, "privacy": PRIVACY})
    change_policy(federation, "oslo", trust=(Trust.SITE,))
    federation.run()
    (refusal,) = leaves(federation, Refusal)
    assert refusal.author == "oslo"
    assert (
        "relies on trust = aggregate, policy allows site; add it to trust in policy.toml"
        in refusal.body.reason
    )
    assert {e.body.privacy.noise_sites for e in leaves(federation, Offer)} == {HONEST}
    (opened,) = federation.told(RoundOpened)
    assert opened.survivors == ("bern", "lyon", "rome")
    report = audit(federation.home)
    assert report.ok, report.findings
    assert {row.site: row.reservations for row in report.sites}["oslo"] == 0


def test_a_site_whose_training_fails_answers_with_its_share_of_the_noise_alone(tmp_path, monkeypatch):
    """Whether and what a site answers must not depend on its records: a failure looks as if none had been drawn."""
    federation = SmallFederation(tmp_path, {"rounds": 1, "privacy": PRIVACY})
    watched, real, failed = Watched(), shared_round.gradient_sum, []
    watched.watch(monkeypatch)

    def gradient_sum(model, data, *arguments, **options):
        if len(data) and not failed:
            failed.append(data)
            raise MemoryError
        return real(model, data, *arguments, **options)

    monkeypatch.setattr(shared_round, "gradient_sum", gradient_sum)
    federation.run()
    assert failed
    assert [event.survivors for event in federation.told(RoundOpened)] == [SITES]
    total, offer, survivors = watched.opened[1]
    assert sorted(bool(sums.any()) for sums in watched.sums[1]) == [False, True, True, True]
    d = offer.dimension()
    noise = total[:d].view(np.int32).astype(np.int64) - sum(watched.sums[1])
    moved = aggregate.sensitivity(offer.privacy.clip, offer.scale, d) * offer.scale
    variance = survivors * ((SIGMA * moved) ** 2 / HONEST + SMOOTH**2)
    assert stats.chi2.cdf(float((noise**2 / variance).sum()), d) > 1e-9, "its share is there all the same"


def test_fewer_than_min_survivors_are_never_opened_and_stay_charged(tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator, "MAX_ATTEMPTS", 2)
    federation = SmallFederation(tmp_path, {"rounds": 1, "privacy": PRIVACY})

    def loses(site, step):
        return site in {"oslo", "rome"} and step == Step.UPDATE.value

    federation.run(federation.grid(loses))
    assert not federation.told(RoundOpened)
    assert federation.told(RunStopped)
    assert len(federation.told(RoundAbandoned)) == 2
    closes = leaves(federation, Close)
    assert {close.body.outcome for close in closes} == {Outcome.ABORTED}
    state = ServerState.load(federation.home.state)
    before = flatten(build_model(federation.config.model, federation.config.seed))
    assert state.round == 0
    assert np.array_equal(state.model.weights, before)
    report = audit(federation.home)
    assert report.ok, report.findings
    # Two attempts with fresh noise and a fresh draw are two charges.
    assert {row.site: (row.rounds, row.reservations) for row in report.sites} == dict.fromkeys(SITES, (0, 2))


def test_caps_on_both_epsilons_refuse_with_their_words(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 2, "privacy": PRIVACY})
    cost, cost_alone = (
        accountant.epsilon([Charge(sampling_rate=0.5, noise_multiplier=noise, steps=1)], USABLE)
        for noise in (SIGMA, SIGMA / math.sqrt(HONEST))
    )
    # One round fits, two do not; and where either cap is passed by the first round, no record is read at all.
    change_policy(federation, "oslo", max_epsilon_all_collude=cost_alone * 1.01)
    change_policy(federation, "rome", max_epsilon_all_collude=cost_alone * 0.99)
    change_policy(federation, "lyon", epsilon_cap=cost * 1.01)
    federation.run()
    reasons = {e.author: e.body.reason for e in leaves(federation, Refusal)}
    assert set(reasons) == {"lyon", "oslo", "rome"}
    assert (
        f"epsilon to {cost_alone:.6g} of {cost_alone * 0.99} if all others help the server" in reasons["rome"]
    )
    assert "raise max_epsilon_all_collude in policy.toml" in reasons["rome"]
    assert "round 2 would bring epsilon to" in reasons["oslo"]
    assert "if all others help the server" in reasons["oslo"]
    assert "round 2 would bring epsilon to" in reasons["lyon"]
    assert "if all others help" not in reasons["lyon"]
    assert [event.round for event in federation.told(RoundOpened)] == [1]
    assert audit(federation.home).ok
    # What the policies say stands on the ledger, so the audit can hold them to it.
    assert {e.author: e.body.max_epsilon_all_collude for e in leaves(federation, Policy)}[
        "rome"
    ] == cost_alone * 0.99


# --- going on, and evaluation -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL inside one process."""


def test_a_stopped_run_goes_on_and_evaluates_with_shared_noise_on_counts(tmp_path, monkeypatch):
    noise = 12.0
    changes = {"rounds": 3, "privacy": PRIVACY, "evaluation": {"every": 1, "noise": noise}}
    federation = SmallFederation(tmp_path, changes)
    append = coordinator.Books.append

    def stop(self, *envelopes):
        if envelopes and isinstance(envelopes[0].body, Close) and envelopes[0].body.model_hash:
            raise Killed
        append(self, *envelopes)

    with monkeypatch.context() as patch:
        patch.setattr(coordinator.Books, "append", stop)
        with pytest.raises(Killed):
            federation.run()
    federation.run()
    opened = federation.told(RoundOpened)
    assert [event.round for event in opened] == [1, 2, 3]
    share = count_share(noise, HONEST)
    assert share == pytest.approx(math.hypot(noise, SMOOTH) / math.sqrt(HONEST), rel=1e-9)
    assert [len(e.body.counts) for e in leaves(federation, Close)] == [0, 2, 2]
    # Every site adds a share, so the opened counts hold the noise of all four.
    for event, close in zip(opened[1:], leaves(federation, Close)[1:], strict=True):
        expected = summarise(close.body.counts, Detail.ACCURACY, share * math.sqrt(len(SITES)))
        assert event.evaluated == expected  # a deviation is given only where noise leaves rows enough
    for body in (e.body for e in leaves(federation, Reservation) if e.body.evaluation):
        assert body.evaluation.noise == noise
        assert body.evaluation.noise_share == share
        assert [charge.noise_multiplier for charge in body.own_charges][1] == body.evaluation.noise_share
        assert body.draws == HONEST
    report = audit(federation.home)
    assert report.ok, report.findings
    (body, *_) = (e.body for e in leaves(federation, Reservation) if e.body.evaluation)
    charges = [body.charge.model_copy(update={"steps": 3}), body.evaluation.charge, body.evaluation.charge]
    own = [*body.own_charges, *body.own_charges, body.own_charges[0]]
    for row in report.sites:
        assert row.epsilon == pytest.approx(accountant.epsilon_rdp(charges, USABLE), rel=1e-12)
        assert row.epsilon_rdp == row.epsilon
        assert row.epsilon_all_collude == pytest.approx(accountant.epsilon_rdp(own, USABLE), rel=1e-12)


# --- what cannot be configured ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(run):
    return run.config


def changed(config: RunConfig, **sections: dict) -> RunConfig:
    whole = config.model_dump(mode="json", exclude_none=True)
    for name, values in sections.items():
        whole[name] = {**whole[name], **values} if isinstance(values, dict) else values
    return RunConfig.model_validate_json(json.dumps(whole))


def settled_scale(config: RunConfig) -> float:
    """What is checked before a run begins."""
    settled = resolve(config)
    return scale_for(settled, bounds_for(settled, len(SITES), len(SITES)), 10_000)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"privacy": {"steps_per_round": 3}},
            r"with 3 local steps a round: a second step would start from weights that only one site's share",
        ),
        (
            {"secure_aggregation": {"graph": "sparse"}},
            r"on a sparse graph: a lying server could take one site's",
        ),
        (
            {"secure_aggregation": {"ring_bits": 20}},
            r"a ring of 20 bits holds sums up to 524287; 4 sites clamped",
        ),
        (
            {"secure_aggregation": {"clip_range": 1e6}},
            r"a ring of 32 bits holds sums up to 2147483647; 4 sites",
        ),
        ({"privacy": {"noise_multiplier": 1e-5}}, r"integer noise of deviation .* steps cannot be drawn"),
        ({"privacy": {"noise_multiplier": 1e4}}, r"integer noise of deviation|a ring of 32 bits holds"),
        (
            {"rounds": 100_000, "privacy": {"delta": 1e-9}},
            r"what drawing it inexactly may add to delta passes",
        ),
        ({"secure_aggregation": {"colluders": 3}}, r"leave fewer than two honest sites"),
        ({"privacy": {"clip": 1e-310}}, r"no grid of float64 fits"),
    ],
)
def test_settings_that_cannot_share_noise_are_errors_that_say_why(config, sections, says):
    assert settled_scale(config) == 2.0**17
    broken = changed(config, **sections)
    with pytest.raises(ConfigError, match=says):
        settled_scale(broken)
