"""`trust = "aggregate"` with one defect put in, again and again: a check that holds of the real code notices each.

As in ``test_privacy_mutants``: every test runs one check on the code as it is and on a copy with one defect, and the
checks look at behaviour alone. Statistical ones are exact tests of what is promised, with a false-alarm rate of 1e-9
per decision; all decisions of this file together give a false alarm in fewer than one run in 10^7.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import stats
from support.data_folder import write_folder
from support.federation import Federation
from support.weakened import Weakening, weaken

from fedfuse_client import shared_round
from fedfuse_client.learner import Learner
from fedfuse_client.policy import SitePolicy, check_offer
from fedfuse_client.store import SiteStore
from fedfuse_server import plan as server_plan
from fedfuse_server import shared_noise
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.config.privacy import PrivacyConfig
from fedfuse_shared.errors import PolicyError
from fedfuse_shared.models import build_model, flatten, layout, model_hash
from fedfuse_shared.offer import Offer, RoundPrivacy
from fedfuse_shared.privacy import aggregate
from fedfuse_shared.privacy.integer_noise import IntegerGaussian
from fedfuse_shared.privacy.noise import NoiseSource

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ALARM = 1e-9
"""False-alarm rate of every statistical decision below."""
SITE = "lyon"
NAMES = (SITE, "oslo", "porto", "turin", "ulm", "york")
MODEL = ModelConfig(
    classes=("cat", "dog"),
    encoders={
        Modality.TEXT: EncoderConfig(name="hashed-words"),
        Modality.IMAGE: EncoderConfig(name="oriented-gradients"),
    },
)
WEIGHTS = flatten(build_model(MODEL, 0))
LAYOUT = layout(build_model(MODEL, 0))
SIGMA, HONEST = 3.0, 4
ROUND = "fedfuse_client.shared_round"
WITH_SHARE = "return steps + IntegerGaussian(deviation).draw(noise, len(steps))"
ON_GRID = "return np.rint(clamped * offer.scale).astype(np.int64)"


class Caught(Exception):
    """A check saw something that the real code never does."""


def expect(holds: bool, seen: str) -> None:
    if not holds:
        raise Caught(seen)


def notices(check, defects: list[Weakening], monkeypatch: pytest.MonkeyPatch, seen: str) -> None:
    """Assert that a check holds of the real code, and of the code with a defect says what it saw."""
    check()
    with monkeypatch.context() as patch:
        weaken(patch, defects)
        with pytest.raises(Caught, match=seen):
            check()


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a thousand weights are slowed down by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def constants(**changes: object) -> RoundPrivacy:
    values = {
        "trust": Trust.AGGREGATE,
        # Every record is drawn, so two answers differ by their noise alone.
        "sampling_rate": 1.0,
        "steps": 1,
        "clip": 1.0,
        "noise_multiplier": SIGMA,
        "noise_share": SIGMA / math.sqrt(HONEST),
        "noise_sites": HONEST,
        "expected_batch_size": 8,
        "delta": 1e-5,
    }
    return RoundPrivacy(**{**values, **changes})


def offer_of(**changes: object) -> Offer:
    """Return an offer to six sites, five of which survive, one of those colludes: four honest shares count."""
    values = {
        "model": MODEL,
        "layout": LAYOUT,
        "model_hash": model_hash(WEIGHTS, LAYOUT),
        "bounds": {"colluders": 1, "min_survivors": 5},
        "privacy": constants(),
        "scale": aggregate.least_scale(1.0, len(WEIGHTS)),
        "clip_range": 64.0,
    }
    return Federation(NAMES).offer(**{**values, **changes})


def policy_of(data: Path, **changes: object) -> SitePolicy:
    values = {
        "site": SITE,
        "federation": "lab",
        "roster_hash": Federation(NAMES).roster.hash(),
        "data": data,
        "modalities": (Modality.TEXT,),
        "epsilon_cap": 100.0,
        "delta": 1e-5,
        "min_participants": 3,
        "min_survivors": 3,
        "min_threshold": 2,
        "min_colluders": 1,
        "trust": (Trust.AGGREGATE,),
        "min_noise_multiplier": 1.0,
        "max_sampling_rate": 1.0,
        "max_steps_per_round": 1,
        "max_clip": 1.0,
    }
    return SitePolicy(**{**values, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("aggregate") / "data")


def answers(folder: Path, offer: Offer, count: int = 2) -> list[np.ndarray]:
    """Return what the site of text alone answers in so many attempts, as signed integers ``(d,)``."""
    learner = Learner(policy_of(folder))
    words = [learner.update(offer, WEIGHTS) for _ in range(count)]
    return [each[: len(WEIGHTS)].view(np.int32).astype(np.int64) for each in words]


def promised(offer: Offer) -> float:
    """Return the deviation of the sum of h honest sites' noise, by the formula of the proof and nothing else."""
    d, scale, clip = offer.dimension(), offer.scale, offer.privacy.clip
    moved = clip * scale * (1 + 2.0**-12) + math.sqrt(d)
    return offer.privacy.noise_multiplier * moved


def parts(offer: Offer) -> dict[str, np.ndarray]:
    """Return the coordinates that belong to each modality, and those of none."""
    found, start = {}, 0
    for segment in offer.layout:
        found.setdefault(str(segment.modality), []).append(range(start, start + segment.size))
        start += segment.size
    return {name: np.concatenate([np.array(r) for r in ranges]) for name, ranges in found.items()}


# --- what is added ------------------------------------------------------------------------------------------------


def honest_shares_carry_the_promised_noise(folder: Path) -> None:
    """h times the variance of a site's noise is at least what is charged, on the coordinates of every modality.

    Two answers over one and the same sum differ by two shares. Chi-square, lower tail, false alarms 1e-9 a modality;
    1,200 coordinates and more see a share a third short.
    """
    offer = offer_of()
    first, second = answers(folder, offer)
    for name, where in parts(offer).items():
        if len(where) < 100:
            continue
        ratio = (((first - second)[where] / promised(offer)) ** 2).sum() / 2 * offer.privacy.noise_sites
        expect(stats.chi2.sf(ratio, len(where)) < 1 - ALARM, f"too little noise on {name}")


@pytest.mark.parametrize(
    "where",
    [
        Weakening(
            ROUND,
            "privacy.noise_multiplier, privacy.noise_sites,",
            "privacy.noise_multiplier, len(offer.participants),",
        ),
        Weakening("privacy.aggregate", "return sigma / math.sqrt(honest)", "return sigma / honest"),
        Weakening(ROUND, WITH_SHARE, "return steps"),
        Weakening(ROUND, WITH_SHARE, WITH_SHARE + " // 2"),
    ],
    ids=["for all sites", "divided twice", "none", "halved"],
)
def test_mutant_share_sized_for_all_sites_instead_of_h(where, monkeypatch, folder):
    check = partial(honest_shares_carry_the_promised_noise, folder)
    notices(check, [where], monkeypatch, "too little noise on")


def offers_count_on_those_who_are_sure_to_be_honest(folder: Path) -> None:
    """The offers of every plan say h = min_survivors - c or less, and their shares add up; nothing is random."""
    policy = policy_of(folder, max_sampling_rate=1.0, plans=())
    for sites in (3, 4, 6, 10):
        privacy = PrivacyConfig(trust=Trust.AGGREGATE, noise_multiplier=SIGMA)
        config = RunConfig(model=MODEL, rounds=3, privacy=privacy)
        roster = Federation.of(sites).roster
        plan = server_plan.Plan("run", config, roster, LAYOUT)
        for present in (sites, sites - 1):
            if present < plan.bounds(sites).min_survivors:
                continue
            offer = plan.offer(
                number=1, attempt=1, model_hash="2" * 64, participants=list(roster.sites)[:present]
            )
            asked = offer.privacy
            expect(
                asked.noise_sites <= offer.min_survivors - offer.colluders,
                f"counts on {asked.noise_sites} sites of {present}",
            )
            allowed = policy.model_copy(
                update={
                    "site": offer.participants[0],
                    "federation": offer.federation,
                    "roster_hash": offer.roster_hash,
                    "min_colluders": 0,
                }
            )
            try:
                check_offer(allowed, offer)
            except PolicyError as problem:
                raise Caught(f"an honest plan is refused: {problem}") from problem


@pytest.mark.parametrize(
    ("where", "seen"),
    [
        (
            Weakening(
                "fedfuse_server.shared_noise",
                "return bounds.min_survivors - bounds.colluders",
                "return bounds.participants",
            ),
            "counts on",
        ),
        (
            Weakening(
                "fedfuse_server.shared_noise",
                "return bounds.min_survivors - bounds.colluders",
                "return bounds.min_survivors",
            ),
            "counts on",
        ),
        (
            Weakening(
                "fedfuse_server.plan",
                "noise_share=share(privacy.noise_multiplier, noise_sites),",
                "noise_share=share(privacy.noise_multiplier, sites),",
            ),
            "an honest plan is refused: .* do not add up",
        ),
    ],
    ids=["all sites", "colluders too", "shares of all sites"],
)
def test_mutant_plan_that_counts_on_more_than_h(where, seen, monkeypatch, folder):
    notices(partial(offers_count_on_those_who_are_sure_to_be_honest, folder), [where], monkeypatch, seen)


BY_SEGMENT = """drawn = IntegerGaussian(deviation).draw(noise, len(steps)); start = 0
    for part in offer.layout:
        if part.modality and not steps[start : start + part.size].any():
            drawn[start : start + part.size] = 0
        start += part.size
    return steps + drawn"""


@pytest.mark.parametrize(
    "new",
    [
        WITH_SHARE.replace("steps + ", "steps + (steps != 0) * "),
        "drawn = IntegerGaussian(deviation).draw(noise, len(steps)); drawn[steps == 0] = 0; return steps + drawn",
        BY_SEGMENT,
    ],
    ids=["times what is there", "where the sum is zero", "by segment"],
)
def test_mutant_no_noise_on_absent_modalities(new, monkeypatch, folder):
    check = partial(honest_shares_carry_the_promised_noise, folder)
    notices(check, [Weakening(ROUND, WITH_SHARE, new)], monkeypatch, "too little noise on")


# --- what it is added to ------------------------------------------------------------------------------------------


def one_record_moves_the_integers_within_the_bound() -> None:
    """No record moves the rounded sum by more than s C' in L2; its worst is a sum just below a boundary.

    Looked for at the boundaries of the grid and of coarser ones, with records on all and on some of the coordinates.
    Nothing is random.
    """
    offer = offer_of()
    d, scale, clip = offer.dimension(), offer.scale, offer.privacy.clip
    bound = aggregate.sensitivity(clip, scale, d) * scale
    for steps in (1, 2, 4, 16, 64):
        for touched in np.linspace(0.5, 1, 20):
            size = int(touched * d)
            largest = clip * scale / math.sqrt(size)
            below = np.full(d, (steps / 2 - 2.0**-20) / scale)
            record = np.where(np.arange(d) < size, (largest // steps * steps + 2.0**-18) / scale, 0.0)
            if np.linalg.norm(record) > clip:
                continue
            gap = shared_round.on_grid(below + record, offer) - shared_round.on_grid(below, offer)
            moved = np.linalg.norm(gap)
            expect(moved <= bound, f"one record moves the sum by {moved:.6g} steps, charged are {bound:.6g}")


@pytest.mark.parametrize(
    "where",
    [
        Weakening("privacy.aggregate", " + math.sqrt(dimension) / scale) * _UP", ") * _UP"),
        Weakening(ROUND, ON_GRID, "return (16 * np.rint(clamped * offer.scale / 16)).astype(np.int64)"),
        Weakening(ROUND, ON_GRID, "return (np.rint(clamped * offer.scale / 64).astype(np.int64) * 64)"),
        Weakening(ROUND, ON_GRID, "return np.rint(2 * clamped * offer.scale).astype(np.int64)"),
    ],
    ids=["left out of the bound", "coarser", "much coarser", "another scale"],
)
def test_mutant_rounding_the_sensitivity_ignores(where, monkeypatch):
    notices(
        one_record_moves_the_integers_within_the_bound, [where], monkeypatch, "one record moves the sum by"
    )


def one_sum_has_one_rounding() -> None:
    """A sum is rounded to the nearest step, and the same way again: its rounding is no part of the noise."""
    offer = offer_of()
    total = np.linspace(-30, 30, offer.dimension())
    once, twice = shared_round.on_grid(total, offer), shared_round.on_grid(total, offer)
    expect(bool((once == twice).all()), "one sum is rounded in two ways")
    expect(float(np.abs(once - total * offer.scale).max()) <= 0.5, "rounded by more than half a step")


@pytest.mark.parametrize(
    ("new", "seen"),
    [
        (
            "return np.floor(clamped * offer.scale + np.random.rand(len(total))).astype(np.int64)",
            "in two ways",
        ),
        ("return np.floor(clamped * offer.scale).astype(np.int64)", "more than half a step"),
        ("return (clamped * offer.scale).astype(np.int64)", "more than half a step"),
    ],
    ids=["at random", "down", "towards zero"],
)
def test_mutant_stochastic_rounding_per_sum(new, seen, monkeypatch):
    notices(one_sum_has_one_rounding, [Weakening(ROUND, ON_GRID, new)], monkeypatch, seen)


# --- the order of things ------------------------------------------------------------------------------------------


def nothing_but_the_ring_comes_after_the_noise(folder: Path) -> None:
    """Noise wider than the clamp leaves the site whole: some coordinates lie beyond, and all bits are there.

    A third of the coordinates lie beyond a clamp of one deviation; that none of 1,000 does has probability below
    1e-170. Multiples of 16: binomial, false alarms 1e-9. A sum far beyond the clamp is cut to it first.
    """
    share = promised(offer_of()) / math.sqrt(HONEST)
    offer = offer_of(clip_range=share / offer_of().scale)
    (answer,) = answers(folder, offer, 1)
    expect(
        bool((np.abs(answer) > offer.clip_range * offer.scale + 1).any()), "the noise is cut off at the clamp"
    )
    even = int((answer % 16 == 0).sum())
    expect(stats.binomtest(even, len(answer), 1 / 16).pvalue > ALARM, "the noise is rounded")
    large = np.full(offer.dimension(), 1e9)
    for total in (large, -large, np.full(offer.dimension(), np.inf)):
        cut = np.abs(shared_round.on_grid(total, offer)).max()
        expect(cut <= math.ceil(offer.clip_range * offer.scale), "a sum is not clamped before the noise")


@pytest.mark.parametrize(
    ("where", "seen"),
    [
        (
            Weakening(
                ROUND,
                WITH_SHARE,
                "most = int(offer.clip_range * offer.scale); "
                + WITH_SHARE.replace("steps + Int", "np.clip(steps + Int")
                + ", -most, most)",
            ),
            "cut off at the clamp",
        ),
        (
            Weakening(
                "secagg.quantise",
                "words[:dimension] = integers.astype(np.uint32)",
                "most = int(offer.clip_range * offer.scale); "
                "words[:dimension] = np.clip(integers, -most, most).astype(np.uint32)",
            ),
            "cut off at the clamp",
        ),
        (
            Weakening(ROUND, WITH_SHARE, WITH_SHARE.replace("return ", "return 16 * ((") + ") // 16)"),
            "the noise is rounded",
        ),
        (
            Weakening(
                ROUND,
                "clamped = np.clip(np.nan_to_num(total, nan=0.0), -offer.clip_range, offer.clip_range)",
                "clamped = np.nan_to_num(total, nan=0.0, posinf=1e9, neginf=-1e9)",
            ),
            "not clamped before",
        ),
    ],
    ids=["at the share", "on the way into the ring", "rounded", "not before"],
)
def test_mutant_clamping_after_noise(where, seen, monkeypatch, folder):
    notices(partial(nothing_but_the_ring_comes_after_the_noise, folder), [where], monkeypatch, seen)


def noise_is_drawn_as_integers() -> None:
    """At the largest deviation the last bit of noise is a fair coin, and every draw is the exact sampler's.

    Binomial over 100,000 coordinates, false alarms 1e-9. What a float64 generator does wrong no sample of this size
    shows, so draws are also compared with the sampler's own, under one key.
    """
    d = 100_000
    segment = (LAYOUT[0].model_copy(update={"size": d}),)
    offer = offer_of(layout=segment, scale=2.0**22, clip_range=1.0, privacy=constants(noise_multiplier=7.5))
    deviation = aggregate.share_deviation(7.5, HONEST, 1.0, offer.scale, d)
    assert 2.0**22 < deviation < aggregate.MOST_SHARE
    noise = shared_round.with_share(np.zeros(d, np.int64), offer, NoiseSource.fresh())
    odd = int((noise[np.abs(noise) > 2**22] % 2).sum())
    expect(
        stats.binomtest(odd, int((np.abs(noise) > 2**22).sum()), 0.5).pvalue > ALARM,
        "the last bit of the noise is no fair coin",
    )
    seeded = shared_round.with_share(np.zeros(100, np.int64), offer, NoiseSource(bytes(16)))
    exact = IntegerGaussian(deviation).draw(NoiseSource(bytes(16)), 100)
    expect(bool((seeded == exact).all()), "the noise is not the exact sampler's")


@pytest.mark.parametrize(
    ("drawn", "seen"),
    [
        (
            "(noise.normal(len(steps)).astype(np.float32) * np.float32(deviation))",
            "no fair coin|not the exact",
        ),
        ("2 * np.rint(noise.normal(len(steps)) * (deviation / 2))", "no fair coin"),
        ("np.rint(noise.normal(len(steps)) * deviation)", "not the exact sampler's"),
        ("np.random.default_rng().normal(0, deviation, len(steps))", "not the exact sampler's"),
    ],
    ids=["float32", "half as fine", "float64", "numpy"],
)
def test_mutant_float_sampler(drawn, seen, monkeypatch):
    defect = Weakening(ROUND, WITH_SHARE, f"return steps + {drawn}.astype(np.int64)")
    notices(noise_is_drawn_as_integers, [defect], monkeypatch, seen)


# --- what is charged ----------------------------------------------------------------------------------------------


def the_promised_noise_is_charged_whoever_survives(folder: Path, root: Path) -> None:
    """A reservation charges what is offered, not what more participants would add. Nothing is random."""
    offer, key = offer_of(), Ed25519PrivateKey.generate()
    number = len(list(root.iterdir()))
    with SiteStore.open(root / f"store{number}.db", create=True) as store:
        policy = policy_of(folder)
        body = store.chain("lab", SITE).reserve(policy, offer, Learner(policy).dataset(store), key).body
        (spent,) = store.reservations(body.dataset)
    expect(
        body.charge.noise_multiplier == SIGMA, f"charges noise {body.charge.noise_multiplier:g} for {SIGMA:g}"
    )
    expect(spent.charges[0].noise_multiplier == SIGMA, "remembers another charge than it signed")
    own = spent.own_charges[0].noise_multiplier
    expect(own == SIGMA / math.sqrt(HONEST), f"counts {own:g} as its own share")
    expect((body.noise_sites, body.colluders) == (HONEST, 1), "counts on other sites than were offered")
    expect(spent.draws == HONEST, "draws are not counted")


@pytest.mark.parametrize(
    ("where", "seen"),
    [
        (
            Weakening(
                "fedfuse_client.chain",
                "sampling_rate=asked.sampling_rate, noise_multiplier=asked.noise_multiplier, steps=asked.steps",
                "sampling_rate=asked.sampling_rate, "
                "noise_multiplier=asked.noise_share * len(offer.participants) ** 0.5, steps=asked.steps",
            ),
            "charges noise",
        ),
        (
            Weakening(
                "ledger.records",
                'update={"noise_multiplier": self.noise_share}',
                'update={"noise_multiplier": self.noise_share * self.noise_sites ** 0.5}',
            ),
            "as its own share",
        ),
        (
            Weakening(
                "ledger.records", "return self.charge.steps * self.noise_sites", "return self.charge.steps"
            ),
            "draws are not counted",
        ),
    ],
    ids=["all participants", "all shares as its own", "one draw"],
)
def test_mutant_survivors_noise_charged_instead_of_the_promised(where, seen, monkeypatch, folder, tmp_path):
    check = partial(the_promised_noise_is_charged_whoever_survives, folder, tmp_path)
    notices(check, [where], monkeypatch, seen)


# --- what an offer may ask ----------------------------------------------------------------------------------------


def an_overstated_share_is_refused(folder: Path) -> None:
    """A share that is stated larger than it is would hide what is spent if all others collude. Nothing is random."""
    policy = policy_of(folder)
    check_offer(policy, offer_of())
    for share in (SIGMA, 100.0):
        try:
            check_offer(policy, offer_of(privacy=constants(noise_share=share)))
        except PolicyError:
            continue
        raise Caught(f"a share of {share:g} is believed")


def test_mutant_share_that_is_only_compared_from_below(monkeypatch, folder):
    defect = Weakening(
        "privacy.promise",
        "if abs(asked.noise_share - share) > share * _ROUNDED:",
        "if asked.noise_share < share * (1 - _ROUNDED):",
    )
    notices(partial(an_overstated_share_is_refused, folder), [defect], monkeypatch, "is believed")


def test_every_mutant_of_the_issue_is_here():
    wanted = {
        "share_sized_for_all_sites_instead_of_h",
        "no_noise_on_absent_modalities",
        "rounding_the_sensitivity_ignores",
        "stochastic_rounding_per_sum",
        "clamping_after_noise",
        "float_sampler",
        "survivors_noise_charged_instead_of_the_promised",
    }
    here = re.findall(r"^def test_mutant_(\w+)", Path(__file__).read_text(), re.MULTILINE)
    assert wanted <= set(here)
    assert shared_noise.honest(server_plan.bounds_for(RunConfig(model=MODEL), 6, 6)) == HONEST
