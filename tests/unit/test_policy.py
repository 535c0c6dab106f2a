"""The site's policy file, and every single way in which an offer can lie outside it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse_client.policy import SitePolicy, check_offer, load_policy
from fedfuse_shared import limits
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.evaluation import Detail
from fedfuse_shared.config.federation import TrainingConfig
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import canonical
from fedfuse_shared.errors import ConfigError, PolicyError
from fedfuse_shared.ledger import records
from fedfuse_shared.offer import Evaluation, Offer, RoundPrivacy, Segment

SITES = ("lyon", "oslo", "porto", "turin", "ulm", "york")
PRIVACY: dict[str, Any] = {
    "trust": Trust.SITE,
    "sampling_rate": 0.25,
    "steps": 4,
    "clip": 1.5,
    "noise_multiplier": 1.0,
    "noise_share": 1.0,
    "noise_sites": 1,
    "expected_batch_size": 64,
    "delta": 1e-5,
}
OFFER: dict[str, Any] = {
    "federation": "clinics",
    "run": "run-1",
    "round": 7,
    "attempt": 1,
    "roster_hash": "a" * 64,
    "model_hash": "d" * 64,
    "model": ModelConfig(classes=("no", "yes"), encoders={Modality.TEXT: EncoderConfig(name="words")}),
    "training": TrainingConfig(),
    "layout": (Segment(name="head", size=10),),
    "participants": SITES,
    "threshold": 5,
    "colluders": 1,
    "min_survivors": 5,
    "neighbours": 0,
    "lifetime": 3600,
    "ring_bits": 32,
    "scale": 2.0**20,
    "clip_range": 4.0,
}


def offer(privacy: dict[str, Any] | None = None, **changes: Any) -> Offer:
    return Offer(**(OFFER | {"privacy": RoundPrivacy(**(PRIVACY | (privacy or {})))} | changes))


OTHER_TRAINING = TrainingConfig(learning_rate=0.125)
PLAN = offer().plan_hash

KEYS: dict[str, Any] = {
    "site": "lyon",
    "federation": "clinics",
    "roster_hash": "a" * 64,
    "data": "records",
    "modalities": ["text", "image"],
    "epsilon_cap": 8.0,
    "delta": 1e-5,
    "min_participants": 4,
    "min_survivors": 5,
    "min_threshold": 5,
    "min_colluders": 1,
    "trust": ["site"],
    "min_noise_multiplier": 1.0,
    "max_sampling_rate": 0.25,
    "max_steps_per_round": 4,
    "max_clip": 1.5,
    "plans": [],
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "policy.toml"
    path.write_text(
        tomli_w.dumps({key: value for key, value in (KEYS | changes).items() if value is not None})
    )
    return path


@pytest.fixture
def policy(tmp_path: Path) -> SitePolicy:
    return load_policy(write(tmp_path))


# --- the file ----------------------------------------------------------------------------------------------


def test_a_policy_is_read_with_its_data_folder_beside_it(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path))
    assert policy.data == tmp_path / "records"
    assert policy.modalities == (Modality.TEXT, Modality.IMAGE)
    assert policy.record_sites == ("lyon",)
    assert load_policy(write(tmp_path, dataset_sites=["a", "b"])).record_sites == ("a", "b")
    assert load_policy(write(tmp_path, data="/srv/data")).data == Path("/srv/data")
    assert load_policy(write(tmp_path, epsilon_cap=8)).epsilon_cap == 8.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_samplng_rate": 0.5}, "unknown key max_samplng_rate; did you mean max_sampling_rate?"),
        ({"max_sampling_rate": None, "max_samplng_rate": 0.5}, "did you mean max_sampling_rate?"),
        ({"zzz": 1}, "unknown key zzz; known are site, federation, roster_hash"),
        ({"delta": None}, "key delta is missing"),
        ({"delta": 1.0}, "key delta: Input should be less than 1"),
        ({"epsilon_cap": float("nan")}, "key epsilon_cap: Input should be a finite number"),
        ({"epsilon_cap": float("inf")}, "key epsilon_cap: Input should be a finite number"),
        ({"epsilon_cap": "8"}, "key epsilon_cap: Input should be a valid number"),
        ({"min_participants": 2}, "key min_participants: Input should be greater than or equal to 3"),
        ({"min_participants": 4.5}, "key min_participants:"),
        ({"site": "../lyon"}, "key site:"),
        ({"modalities": ["smell"]}, "key modalities.0:"),
        ({"modalities": []}, "key modalities:"),
        ({"trust": []}, "key trust:"),
        ({"roster_hash": "A" * 64}, "key roster_hash:"),
        ({"site": {"name": "lyon"}}, "key site:"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_policy(path)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"site = ",
        b"\xff\xfe",
        b"site = 2024-01-01",
        b"site = 'a'\nsite = 'b'",
        b"#" * (2**20 + 1),
        b"site = " + b"[" * 5000,
    ],
    ids=["syntax", "encoding", "date", "twice", "long", "deep"],
)
def test_what_is_no_policy_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "policy.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        load_policy(tmp_path / "policy.toml")


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(tmp_path / "policy.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(tmp_path)


# --- what is published -------------------------------------------------------------------------------------


def test_the_leaf_says_what_the_file_says(policy: SitePolicy) -> None:
    leaf = policy.leaf(3, "b" * 64)
    said = leaf.model_dump()
    for key in set(KEYS) & set(said):
        assert said[key] == getattr(policy, key), key
    assert (leaf.seq, leaf.prev, leaf.policy_hash) == (3, "b" * 64, policy.hash())


@pytest.mark.parametrize(
    "changes",
    [{"data": "elsewhere"}, {"modalities": ["audio"]}, {"dataset_sites": ["a"]}, {"warm": False}],
    ids=str,
)
def test_nothing_published_depends_on_what_stays_at_the_site(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = load_policy(write(tmp_path))
    after = load_policy(write(tmp_path, **changes))
    assert before != after
    assert canonical(before.leaf(1, records.FIRST_LINK)) == canonical(after.leaf(1, records.FIRST_LINK))


def test_a_policy_from_before_there_were_bundles_keeps_its_hash(policy: SitePolicy) -> None:
    published = policy.model_dump(
        mode="json", exclude={"data", "dataset_sites", "modalities", "bundles", "warm"}
    )
    assert policy.hash() == hashlib.sha256(limits.LABEL_POLICY + canonical(published)).hexdigest()
    assert policy.bundles == ()


def test_every_other_key_changes_the_hash(tmp_path: Path) -> None:
    changed = {
        "site": "oslo",
        "federation": "other",
        "roster_hash": "b" * 64,
        "epsilon_cap": 7.5,
        "delta": 1e-6,
        "min_participants": 5,
        "min_survivors": 4,
        "min_threshold": 4,
        "min_colluders": 2,
        "trust": ["site", "aggregate"],
        "min_noise_multiplier": 1.5,
        "max_sampling_rate": 0.5,
        "max_steps_per_round": 5,
        "max_clip": 2.0,
        "graphs": ["complete", "sparse"],
        "max_lifetime": 600,
        "schedule": "free",
        "min_evaluation_noise": 20.0,
        "max_epsilon_all_collude": 20.0,
        "models": ["c" * 64],
        "code": ["d" * 64],
        "plans": [PLAN],
        "bundles": ["e" * 64],
    }
    assert set(changed) == set(SitePolicy.model_fields) - {"data", "dataset_sites", "modalities", "warm"}
    hashes = {load_policy(write(tmp_path, **{key: value})).hash() for key, value in changed.items()}
    assert len(hashes | {load_policy(write(tmp_path)).hash()}) == len(changed) + 1


# --- offers ------------------------------------------------------------------------------------------------


def test_an_offer_at_every_bound_is_accepted(policy: SitePolicy) -> None:
    check_offer(policy, offer())


def test_no_plan_listed_means_any_plan(policy: SitePolicy) -> None:
    check_offer(policy, offer(training=OTHER_TRAINING))


def test_a_pinned_plan_is_compared_with_what_is_offered_not_with_what_is_said(policy: SitePolicy) -> None:
    pinned = policy.model_copy(update={"plans": (PLAN,)})
    check_offer(pinned, offer(round=8, attempt=3))
    with pytest.raises(PolicyError, match=r"follows plan .*, which policy does not list"):
        check_offer(pinned, offer(training=OTHER_TRAINING))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"federation": "other"}, "is for federation other, policy names clinics"),
        ({"roster_hash": "b" * 64}, "names roster bbbbbbbbbbbbbbbb…, policy pins aaaaaaaaaaaaaaaa…"),
        ({"participants": ("a1", *SITES[1:])}, "does not list this site as a participant"),
        ({"participants": (*SITES, "york")}, "lists a participant twice"),
        (
            {"participants": SITES[:3]},
            "has 3 participants, policy allows at least 4; lower min_participants in",
        ),
        ({"min_survivors": 4}, "opens a sum over 4 sites, policy allows at least 5; lower min_survivors in"),
        ({"min_survivors": 7}, "min_survivors 7 must lie between the threshold 5 and the participants 6"),
        (
            {"layout": (Segment(name="a", size=limits.MAX_VECTOR), Segment(name="b", size=1))},
            "268435457 coordinates",
        ),
        ({"colluders": 0}, "withstands 0 colluders, policy allows at least 1; lower min_colluders in"),
        ({"colluders": 6}, "threshold 5 is too low for 6 participants and 6 colluders"),
        ({"threshold": 4}, "opens with 4 shares, policy allows at least 5; lower min_threshold in"),
        (
            {"colluders": 4},
            "threshold 5 is too low for 6 participants and 4 colluders: 2t > n + c must hold; report it",
        ),
        ({"threshold": 6}, "min_survivors 5 must lie between the threshold 6 and"),
        ({"lifetime": 86_401}, "keeps its secrets 86401 s, policy allows at most 86400; raise max_lifetime"),
        ({"neighbours": 4}, "masks on a sparse graph, policy allows complete; add it to graphs in"),
        ({"scale": 2.0**27}, "could wrap: 6 sites times range 4.0 times scale 134217728.0 reaches 2^31"),
        ({"clip_range": 1e308, "scale": 2.0**40}, "could wrap"),
        ({"privacy": {"delta": 2e-5}}, "accounts at delta 2e-05, policy at 1e-05"),
        ({"privacy": {"delta": 0.5e-5}}, "accounts at delta 5e-06, policy at 1e-05"),
        (
            {"privacy": {"sampling_rate": 0.5}},
            "asks for sampling rate 0.5, policy allows at most 0.25; raise max_sampling_rate in policy.toml",
        ),
        (
            {"privacy": {"steps": 5}},
            "asks for 5 steps, policy allows at most 4; raise max_steps_per_round in",
        ),
        ({"privacy": {"clip": 1.6}}, "asks for clip 1.6, policy allows at most 1.5; raise max_clip in"),
        (
            {"privacy": {"noise_multiplier": 0.5, "noise_share": 0.5}},
            "asks for noise multiplier 0.5, policy allows at least 1.0; lower min_noise_multiplier in",
        ),
        ({"privacy": {"trust": Trust.AGGREGATE}}, "relies on trust = aggregate, policy allows site"),
        ({"privacy": {"noise_share": 0.5}}, "has each site add noise 0.5 but counts 1.0"),
        ({"privacy": {"noise_share": 2.0}}, "has each site add noise 2.0 but counts 1.0"),
        ({"privacy": {"noise_sites": 4}}, "counts on the noise of 4 sites"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_offer_beyond_one_bound_is_refused(policy: SitePolicy, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError) as caught:
        check_offer(policy, offer(**changes))
    assert str(caught.value).startswith("site lyon: offer of round 7 ")
    assert says in str(caught.value)
    records.Refusal(seq=1, prev="0" * 64, context="0" * 64, reason=str(caught.value))  # it fits a ledger leaf


SHARED: dict[str, Any] = {
    "trust": Trust.AGGREGATE,
    "steps": 1,
    "noise_multiplier": 4.0,
    "noise_share": 2.0,
    "noise_sites": 4,
}


def shared(privacy: dict[str, Any] | None = None, **changes: Any) -> Offer:
    """An offer of four honest survivors, of five that survive at least, who share the noise."""
    return offer(SHARED | (privacy or {}), **({"scale": 2.0**12} | changes))


@pytest.fixture
def open_minded(policy: SitePolicy) -> SitePolicy:
    return policy.model_copy(update={"trust": (Trust.SITE, Trust.AGGREGATE)})


def test_shared_noise_is_accepted_only_where_the_policy_allows_it(
    policy: SitePolicy, open_minded: SitePolicy
) -> None:
    check_offer(open_minded, shared())
    with pytest.raises(PolicyError, match="relies on trust = aggregate, policy allows site; add it to trust"):
        check_offer(policy, shared())


@pytest.mark.parametrize("sites", [1, 2, 3])
def test_shared_noise_may_count_on_fewer_sites_than_are_sure_to_be_honest(
    open_minded: SitePolicy, sites: int
) -> None:
    check_offer(open_minded, shared({"noise_sites": sites, "noise_share": 4.0 / sites**0.5}))


@pytest.mark.parametrize(
    ("privacy", "changes", "says"),
    [
        ({"noise_sites": 5, "noise_share": 4.0 / 5**0.5}, {}, "noise of 5 sites, only 4 survivors are sure"),
        ({"noise_sites": 0}, {}, "noise of 0 sites, only 4 survivors are sure"),
        ({}, {"colluders": 2}, "noise of 4 sites, only 3 survivors are sure"),
        ({"steps": 2}, {}, "shares noise over 2 local steps"),
        ({"noise_share": 1.999999}, {}, "has 4 shares of 1.999999 for noise 4.0"),
        ({"noise_share": 1000.0}, {}, "has 4 shares of 1000.0 for noise 4.0"),
        ({}, {"scale": 3.0 * 2**11}, "6144 steps per unit are no power of two"),
        ({}, {"scale": 2.0**11}, "a grid of 2048.0 steps per unit, at least 4096.0 keep rounding small"),
        ({}, {"scale": 2.0**24, "clip_range": 1e-3}, "noise of 5.03e+07 steps, at most 1.68e+07"),
        ({"clip": 1e-310}, {}, "no grid of float64 fits"),
        (
            {"noise_multiplier": 1e300, "noise_share": 5e299},
            {},
            "at most 1.68e+07 can be drawn closely enough",
        ),
        (
            {},
            {"ring_bits": 20, "clip_range": 16.0},
            "a ring of 20 bits holds sums up to 524287; 6 sites clamped",
        ),
        ({}, {"clip_range": 2.0**40}, "a ring of 32 bits holds sums up to 2147483647; 6 sites clamped"),
        ({}, {"layout": (Segment(name="head", size=2**24),)}, "reckoned with are at most 16767216"),
        (
            {"noise_multiplier": 0.5, "noise_share": 0.25},
            {},
            "asks for noise multiplier 0.5, policy allows at least",
        ),
    ],
)
def test_shared_noise_that_is_not_worth_what_is_charged_is_refused(
    open_minded: SitePolicy, privacy: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        check_offer(open_minded, shared(privacy, **changes))
    assert says in str(caught.value)


def test_shared_noise_on_counts_has_to_add_up_too(open_minded: SitePolicy) -> None:
    counting = open_minded.model_copy(update={"min_evaluation_noise": 8.0, "schedule": Schedule.FREE})
    # Four shares, and what smoothing takes.
    enough = (20.0**2 + 4) ** 0.5 / 2 * (1 + 1e-12)
    asked = {"every": 1, "detail": Detail.ACCURACY, "noise": 20.0}
    check_offer(counting, shared(evaluation=Evaluation(**asked, noise_share=enough)))
    with pytest.raises(PolicyError, match=r"has 4 shares of 10.0 for noise 20.0 on counts"):
        check_offer(counting, shared(evaluation=Evaluation(**asked, noise_share=10.0)))


def test_shared_noise_of_too_few_steps_to_be_smooth_is_refused(open_minded: SitePolicy) -> None:
    lenient = open_minded.model_copy(update={"min_noise_multiplier": 1e-6})
    with pytest.raises(PolicyError, match=r"noise of 3\.61 steps, at least 8 add up smoothly"):
        check_offer(
            lenient, shared({"noise_multiplier": 2.0**-10, "noise_share": 2.0**-11}, scale=2.0**11 * 2)
        )


def test_the_ring_is_filled_to_the_last_unit_and_no_further(policy: SitePolicy) -> None:
    fits = (2**31 - 1) // 6
    check_offer(policy, offer(clip_range=1.0, scale=float(fits)))
    with pytest.raises(PolicyError, match="could wrap"):
        check_offer(policy, offer(clip_range=1.0, scale=fits + 0.5))


def lies_within(p: SitePolicy, o: Offer) -> bool:
    """The bounds once more, as one formula."""
    n, t, c, s = len(o.participants), o.threshold, o.colluders, o.min_survivors
    a = o.privacy
    return (
        (o.federation, o.roster_hash, a.delta) == (p.federation, p.roster_hash, p.delta)
        and (not p.plans or o.plan_hash in p.plans)
        and p.site in o.participants
        and len(set(o.participants)) == n
        and p.min_participants <= n
        and p.min_survivors <= s <= n
        and p.min_colluders <= c < n
        and p.min_threshold <= t <= s
        and 2 * t > n + c
        and (a.trust, a.noise_share, a.noise_sites) == (Trust.SITE, a.noise_multiplier, 1)
        and a.sampling_rate <= p.max_sampling_rate
        and a.steps <= p.max_steps_per_round
        and a.clip <= p.max_clip
        and a.noise_multiplier >= p.min_noise_multiplier
        and n * o.clip_range * o.scale < 2.0**31
    )


privacies = st.fixed_dictionaries(
    {},
    optional={
        "trust": st.sampled_from(Trust),
        "sampling_rate": st.sampled_from([0.01, 0.25, 0.2500001, 1.0]),
        "steps": st.sampled_from([1, 4, 5]),
        "clip": st.sampled_from([0.1, 1.5, 1.5000001]),
        "noise_share": st.sampled_from([0.5, 1.0, 2.0]),
        "noise_sites": st.integers(0, 2),
        "delta": st.sampled_from([1e-5, 1.0000001e-5, 1e-6]),
    },
)
changes = st.fixed_dictionaries(
    {},
    optional={
        "federation": st.sampled_from(["clinics", "other"]),
        "roster_hash": st.sampled_from(["a" * 64, "b" * 64]),
        "training": st.sampled_from([TrainingConfig(), OTHER_TRAINING]),
        "participants": st.lists(st.sampled_from(SITES), min_size=3, max_size=8).map(tuple)
        | st.permutations(SITES).map(tuple),
        "threshold": st.integers(0, 8),
        "colluders": st.integers(0, 8),
        "min_survivors": st.integers(0, 8),
        "scale": st.sampled_from([1.0, 2.0**20, 2.0**26, 2.0**27, 2.0**40]),
        "clip_range": st.sampled_from([1.0, 4.0, 1e308]),
    },
)
noise = st.sampled_from([0.5, 1.0, 2.0])


@settings(max_examples=1000, deadline=None)
@given(privacies, changes, noise, st.sampled_from([(), (), (PLAN,)]))
def test_exactly_the_offers_within_all_bounds_pass(
    privacy: dict[str, Any], change: dict[str, Any], sigma: float, plans: tuple[str, ...]
) -> None:
    policy = SitePolicy(
        **(
            KEYS
            | {
                "data": Path("records"),
                "modalities": (Modality.TEXT,),
                "trust": (Trust.SITE,),
                "plans": plans,
            }
        )
    )
    asked = offer({"noise_multiplier": sigma, "noise_share": sigma} | privacy, **change)
    if lies_within(policy, asked):
        check_offer(policy, asked)
    else:
        with pytest.raises(PolicyError):
            check_offer(policy, asked)
