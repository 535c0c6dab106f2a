"""The site's store: its chain, what data sets have spent, and the steps of a round."""

from __future__ import annotations

import hashlib
import math
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse_client.chain import Chain
from fedfuse_client.policy import SitePolicy
from fedfuse_client.store import SiteStore
from fedfuse_shared import limits
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import TrainingConfig
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import decode, encode, verify
from fedfuse_shared.errors import BudgetError, DataError, PolicyError, StateError
from fedfuse_shared.ledger import records
from fedfuse_shared.ledger.records import Charge, Receipt, Refusal, Reservation
from fedfuse_shared.offer import Offer, RoundPrivacy, Segment
from fedfuse_shared.privacy.accountant import epsilon, epsilon_enforced

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
ONE_ROUND = Charge(sampling_rate=0.25, noise_multiplier=2.0, steps=4)
POLICY = SitePolicy(
    site="lyon",
    federation="clinics",
    roster_hash="a" * 64,
    data=Path("records"),
    modalities=(Modality.TEXT,),
    epsilon_cap=4.0,
    delta=1e-5,
    min_participants=3,
    min_survivors=3,
    min_threshold=2,
    min_colluders=0,
    trust=(Trust.SITE,),
    min_noise_multiplier=1.0,
    max_sampling_rate=0.5,
    max_steps_per_round=10,
    max_clip=1.0,
)


def offer(number: int, federation: str = "clinics", **privacy: Any) -> Offer:
    constants: dict[str, Any] = {
        "trust": Trust.SITE,
        "clip": 1.0,
        "noise_share": 2.0,
        "noise_sites": 1,
        "expected_batch_size": 64,
        "delta": 1e-5,
    }
    return Offer(
        federation=federation,
        run="run-1",
        round=number,
        attempt=1,
        roster_hash="a" * 64,
        model_hash="d" * 64,
        model=ModelConfig(classes=("no", "yes"), encoders={Modality.TEXT: EncoderConfig(name="words")}),
        training=TrainingConfig(),
        layout=(Segment(name="head", size=10),),
        participants=("lyon", "oslo", "porto"),
        threshold=3,
        colluders=0,
        min_survivors=3,
        neighbours=0,
        lifetime=3600,
        ring_bits=32,
        scale=2.0**20,
        clip_range=4.0,
        privacy=RoundPrivacy(**(constants | ONE_ROUND.model_dump() | privacy)),
    )


def digests(*names: object) -> list[bytes]:
    return [hashlib.sha256(str(name).encode()).digest() for name in names]


def receipt(context: str, steps: int = 4) -> Any:
    return lambda seq, prev: Receipt(seq=seq, prev=prev, context=context, steps=steps, vector_hash="e" * 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[SiteStore]:
    with SiteStore.open(path, create=True) as opened:
        yield opened


@pytest.fixture
def chain(store: SiteStore) -> Chain:
    return store.chain("clinics", "lyon")


# --- opening -----------------------------------------------------------------------------------------------


def test_only_the_owner_can_read_any_file_of_the_store(path: Path) -> None:
    with SiteStore.open(path, create=True) as store:
        store.save_step("1" * 64, "keys", b"secret", b"reply")
        files = list(path.parent.iterdir())
        assert {file.name for file in files} >= {"store.db", "store.db-wal", "store.db.lock"}
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_store_that_others_could_read_is_closed_to_them(path: Path) -> None:
    SiteStore.open(path, create=True).close()
    path.chmod(0o664)
    SiteStore.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_store_is_made_only_where_asked(path: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        SiteStore.open(path)
    with pytest.raises(StateError, match="cannot be made"):
        SiteStore.open(path / "no" / "folder.db", create=True)
    assert list(path.parent.iterdir()) == []


def test_making_a_store_never_replaces_one(path: Path) -> None:
    with SiteStore.open(path, create=True) as store:
        store.erase("1" * 64)
    with SiteStore.open(path, create=True) as store:
        assert store.is_finished("1" * 64)


def test_every_commit_is_forced_to_disk(store: SiteStore) -> None:
    settings = {
        name: store._database.rows(f"PRAGMA {name}")
        for name in ("synchronous", "journal_mode", "foreign_keys")
    }
    assert settings == {"synchronous": [(2,)], "journal_mode": [("wal",)], "foreign_keys": [(1,)]}


# --- the chain ---------------------------------------------------------------------------------------------


def test_leaves_are_numbered_linked_and_signed(chain: Chain) -> None:
    assert chain.head() == (0, records.FIRST_LINK)
    written = [chain.append(POLICY.leaf, KEY), *(chain.append(receipt(c * 64), KEY) for c in "123")]
    prev = records.FIRST_LINK
    for number, envelope in enumerate(written, start=1):
        verify(envelope, PUBLIC)
        assert (envelope.author, envelope.body.seq, envelope.body.prev) == ("lyon", number, prev)
        prev = records.link(envelope)
    assert chain.head() == (4, prev)
    assert chain.leaves_after(0) == [encode(envelope) for envelope in written]
    assert chain.leaves_after(3) == [encode(written[3])]
    assert chain.leaves_after(4) == []


def test_the_chain_goes_on_after_a_restart(path: Path) -> None:
    with SiteStore.open(path, create=True) as store:
        first = store.chain("clinics", "lyon").append(POLICY.leaf, KEY)
    with SiteStore.open(path) as store:
        second = store.chain("clinics", "lyon").append(receipt("1" * 64), KEY)
    assert (second.body.seq, second.body.prev) == (2, records.link(first))


def test_each_federation_has_its_own_chain(store: SiteStore, chain: Chain) -> None:
    chain.append(POLICY.leaf, KEY)
    other = store.chain("other", "lyon")
    assert other.head() == (0, records.FIRST_LINK)
    assert other.append(POLICY.leaf, KEY).body.seq == 1
    assert chain.head()[0] == 1


def test_another_sites_chain_is_refused(store: SiteStore, chain: Chain) -> None:
    chain.append(POLICY.leaf, KEY)
    with pytest.raises(StateError, match="belongs to site lyon, not oslo"):
        store.chain("clinics", "oslo")


def test_a_leaf_is_found_by_kind_and_context(chain: Chain) -> None:
    written = chain.append(receipt("1" * 64), KEY)
    assert chain.find(Receipt, "1" * 64) == written
    assert chain.find(Receipt, "2" * 64) is None
    assert chain.find(Refusal, "1" * 64) is None
    assert chain.latest(Receipt) == written
    assert chain.latest(Refusal) is None
    assert chain.append(receipt("2" * 64), KEY) == chain.latest(Receipt)


def test_a_second_receipt_for_one_context_is_refused_and_leaves_no_trace(chain: Chain) -> None:
    chain.append(receipt("1" * 64), KEY)
    before = chain.head()
    with pytest.raises(StateError, match="already has a receipt for this context"):
        chain.append(receipt("1" * 64, steps=3), KEY)
    assert chain.head() == before


def test_a_leaf_built_for_another_place_is_a_programming_error(chain: Chain) -> None:
    with pytest.raises(RuntimeError, match="another place"):
        chain.append(lambda seq, prev: POLICY.leaf(seq + 1, prev), KEY)
    assert chain.head()[0] == 0


def test_a_step_and_its_receipt_are_stored_together_or_not_at_all(store: SiteStore, chain: Chain) -> None:
    def both(fail: bool) -> None:
        with store.transaction():
            store.save_step("1" * 64, "update", b"state", b"vector")
            chain.append(receipt("1" * 64), KEY)
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both(fail=True)
    assert (chain.head()[0], store.load_reply("1" * 64, "update")) == (0, None)
    both(fail=False)
    assert (chain.head()[0], store.load_reply("1" * 64, "update")) == (1, b"vector")


def test_an_inner_failure_that_is_handled_keeps_the_rest_of_a_transaction(
    store: SiteStore, chain: Chain
) -> None:
    chain.append(receipt("1" * 64), KEY)
    with store.transaction():
        chain.append(receipt("2" * 64), KEY)
        with pytest.raises(StateError):
            chain.append(receipt("1" * 64), KEY)
        chain.append(receipt("3" * 64), KEY)
    assert [decode(raw, Receipt, who="store").body.seq for raw in chain.leaves_after(0)] == [1, 2, 3]


# --- reservations ------------------------------------------------------------------------------------------


def test_a_reservation_says_what_the_offer_says(store: SiteStore, chain: Chain) -> None:
    dataset = store.register_dataset(digests(1, 2))
    body = chain.reserve(POLICY, offer(1), dataset, KEY).body
    asked = offer(1).privacy
    assert (body.context, body.dataset, body.charge) == (offer(1).context(), dataset, ONE_ROUND)
    for name in ("trust", "adjacency", "noise_share", "noise_sites", "clip", "delta"):
        assert getattr(body, name) == getattr(asked, name)
    assert body.colluders == offer(1).colluders
    assert body.elsewhere == ()


def test_the_same_offer_is_charged_once_and_answered_identically(path: Path) -> None:
    with SiteStore.open(path, create=True) as store:
        dataset = store.register_dataset(digests(1))
        first = store.chain("clinics", "lyon").reserve(POLICY, offer(1), dataset, KEY)
    with SiteStore.open(path) as store:
        again = store.chain("clinics", "lyon").reserve(POLICY, offer(1), dataset, KEY)
        assert encode(again) == encode(first)
        assert store.spent(dataset) == [ONE_ROUND]


def test_a_new_attempt_is_charged_again(store: SiteStore, chain: Chain) -> None:
    dataset = store.register_dataset(digests(1))
    chain.reserve(POLICY, offer(1), dataset, KEY)
    chain.reserve(POLICY, offer(1).model_copy(update={"attempt": 2}), dataset, KEY)
    assert store.spent(dataset) == [ONE_ROUND, ONE_ROUND]


def test_the_cap_stops_the_round_that_would_pass_it(store: SiteStore, chain: Chain) -> None:
    dataset = store.register_dataset(digests(1))
    affordable = next(k for k in range(1, 100) if epsilon([ONE_ROUND] * (k + 1), 1e-5) > POLICY.epsilon_cap)
    assert affordable > 1
    for number in range(1, affordable + 1):
        chain.reserve(POLICY, offer(number), dataset, KEY)
    before = chain.head()
    projected = epsilon([ONE_ROUND] * (affordable + 1), 1e-5)
    says = (
        f"site lyon: round 90 would bring epsilon to {projected:.6g} of 4.0 "
        f"(delta 1e-05, {affordable + 1} reservations on this data set); raise epsilon_cap in policy.toml or stop"
    )
    for refuse in (chain.check_budget, partial(chain.reserve, key=KEY)):
        with pytest.raises(BudgetError) as caught:
            refuse(POLICY, offer(90), dataset)
        assert str(caught.value) == says
    assert chain.head() == before
    chain.reserve(POLICY, offer(affordable), dataset, KEY)  # what was reserved can still be repeated
    chain.check_budget(POLICY.model_copy(update={"epsilon_cap": projected}), offer(90), dataset)


def test_an_epsilon_that_is_no_number_is_refused(
    chain: Chain, store: SiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedfuse_shared.privacy.accountant.epsilon", lambda charges, delta: float("nan"))
    capped = POLICY.model_copy(update={"epsilon_cap": 3.5})  # a cap that nothing is remembered for
    with pytest.raises(BudgetError, match=r"would bring epsilon to nan of 3\.5"):
        chain.reserve(capped, offer(1), store.register_dataset(digests(1)), KEY)


def test_nothing_is_reserved_outside_the_policy(store: SiteStore, chain: Chain) -> None:
    with pytest.raises(PolicyError, match="asks for 11 steps"):
        chain.reserve(POLICY, offer(1, steps=11), store.register_dataset(digests(1)), KEY)
    assert chain.head()[0] == 0


def test_nothing_is_reserved_on_unknown_data(chain: Chain) -> None:
    with pytest.raises(StateError, match="is not in the store"):
        chain.reserve(POLICY, offer(1), "f" * 64, KEY)


def test_a_round_begun_with_other_data_is_not_continued(store: SiteStore, chain: Chain) -> None:
    chain.reserve(POLICY, offer(1), store.register_dataset(digests(1)), KEY)
    with pytest.raises(StateError, match="was charged to another data set"):
        chain.reserve(POLICY, offer(1), store.register_dataset(digests(2)), KEY)


def test_a_finished_context_is_not_reserved_again(store: SiteStore, chain: Chain) -> None:
    dataset = store.register_dataset(digests(1))
    chain.reserve(POLICY, offer(1), dataset, KEY)
    for number in (1, 2):
        store.erase(offer(number).context())
        with pytest.raises(StateError, match=f"round {number} attempt 1 is finished here"):
            chain.reserve(POLICY, offer(number), dataset, KEY)


def test_a_reservation_is_never_part_of_a_larger_transaction(store: SiteStore, chain: Chain) -> None:
    dataset = store.register_dataset(digests(1))
    with pytest.raises(RuntimeError), store.transaction():
        chain.reserve(POLICY, offer(1), dataset, KEY)
    assert chain.head()[0] == 0


def test_a_policy_is_never_applied_to_another_chain(store: SiteStore) -> None:
    dataset = store.register_dataset(digests(1))
    with pytest.raises(RuntimeError):
        store.chain("other", "lyon").reserve(POLICY, offer(1), dataset, KEY)


def test_spending_in_another_federation_counts_and_is_said(store: SiteStore, chain: Chain) -> None:
    dataset = store.register_dataset(digests(1))
    elsewhere = store.chain("other", "lyon")
    abroad = POLICY.model_copy(update={"federation": "other"})
    for number in (1, 2):
        elsewhere.reserve(abroad, offer(number, "other"), dataset, KEY)
    assert chain.reserve(POLICY, offer(1), dataset, KEY).body.elsewhere == (
        Charge(sampling_rate=0.25, noise_multiplier=2.0, steps=8),
    )
    assert len(store.spent(dataset)) == 3
    enough = epsilon(store.spent(dataset), 1e-5)
    with pytest.raises(BudgetError):
        chain.reserve(POLICY.model_copy(update={"epsilon_cap": enough}), offer(2), dataset, KEY)


SHARED = {
    "trust": Trust.AGGREGATE,
    "steps": 1,
    "noise_multiplier": 3.0,
    "noise_share": 3.0 / math.sqrt(2),
    "noise_sites": 2,
}
OPEN = POLICY.model_copy(update={"trust": (Trust.SITE, Trust.AGGREGATE), "epsilon_cap": 10.0})


def shared(number: int, federation: str = "clinics", **privacy: Any) -> Offer:
    """An offer of three sites, two of which share the noise."""
    plain = offer(number, federation, **(SHARED | privacy))
    return plain.model_copy(update={"scale": 2.0**14, "clip_range": 1000.0})


def test_shared_noise_spent_elsewhere_is_said_with_its_shares_and_draws(
    store: SiteStore, chain: Chain
) -> None:
    dataset = store.register_dataset(digests(1))
    abroad = OPEN.model_copy(update={"federation": "other"})
    for number in (1, 2):
        store.chain("other", "lyon").reserve(abroad, shared(number, "other"), dataset, KEY)
    body = chain.reserve(OPEN, shared(1), dataset, KEY).body
    spent = Charge(sampling_rate=0.25, noise_multiplier=3.0, steps=2)
    assert body.elsewhere == (spent,)
    assert body.elsewhere_alone == (spent.model_copy(update={"noise_multiplier": 3.0 / math.sqrt(2)}),)
    assert body.elsewhere_draws == 4
    whole = offer(2, **{**SHARED, "trust": Trust.SITE, "noise_share": 3.0, "noise_sites": 1})
    again = chain.reserve(OPEN, whole, dataset, KEY).body
    assert again.elsewhere_alone == body.elsewhere_alone
    assert again.draws == 0


def test_the_cap_on_all_others_colluding_stops_the_round_that_would_pass_it(
    store: SiteStore, chain: Chain
) -> None:
    dataset = store.register_dataset(digests(1))
    own = Charge(sampling_rate=0.25, noise_multiplier=3.0 / math.sqrt(2), steps=2)
    enough = epsilon_enforced([own], 1e-5, Schedule.FIXED, 4)
    for cap, fits in ((enough, True), (enough * (1 - 1e-9), False)):
        capped = OPEN.model_copy(update={"max_epsilon_all_collude": cap})
        chain.reserve(capped, shared(1), dataset, KEY)
        if fits:
            chain.check_budget(capped, shared(2), dataset)
        else:
            with pytest.raises(
                BudgetError, match=r"if all others help the server; raise max_epsilon_all_collude"
            ):
                chain.check_budget(capped, shared(2), dataset)


def test_a_fixed_schedule_fixes_the_share_of_noise_where_it_is_capped(store: SiteStore, chain: Chain) -> None:
    """The same multiplier from fewer sites is another mechanism if all others collude."""
    dataset = store.register_dataset(digests(1))
    capped = OPEN.model_copy(update={"max_epsilon_all_collude": 10.0})
    chain.reserve(capped, shared(1), dataset, KEY)
    other = shared(2, noise_sites=1, noise_share=3.0)
    with pytest.raises(
        BudgetError, match=r"a share of noise of 3; this data set was charged for other shares"
    ):
        chain.reserve(capped, other, dataset, KEY)
    chain.reserve(OPEN, other, dataset, KEY)


# --- data sets ---------------------------------------------------------------------------------------------


def test_the_same_records_are_the_same_data_set_in_any_order_and_after_a_restart(path: Path) -> None:
    with SiteStore.open(path, create=True) as store:
        first = store.register_dataset(digests(1, 2, 3))
    with SiteStore.open(path) as store:
        assert store.register_dataset(digests(3, 1, 2, 2)) == first


def test_the_identifier_is_random_and_says_nothing_of_the_records(tmp_path: Path) -> None:
    names = set()
    for number in range(2):
        with SiteStore.open(tmp_path / f"{number}.db", create=True) as store:
            names.add(store.register_dataset(digests(1, 2, 3)))
    assert len(names) == 2
    assert {len(bytes.fromhex(name)) for name in names} == {32}


def test_records_that_come_or_go_do_not_change_the_identifier(store: SiteStore) -> None:
    whole = store.register_dataset(digests(1, 2, 3))
    assert store.register_dataset(digests(1, 2)) == whole
    assert store.register_dataset(digests(1, 2, 3, 4)) == whole
    assert store.register_dataset(digests(4, 5)) == whole  # by way of record 4


def test_one_record_seen_before_brings_all_it_spent(store: SiteStore, chain: Chain) -> None:
    chain.reserve(POLICY, offer(1), store.register_dataset(digests(1, 2)), KEY)
    renamed = store.register_dataset(digests(2, *range(10, 20)))
    assert store.spent(renamed) == [ONE_ROUND]
    assert store.spent(store.register_dataset(digests(30, 31))) == []


def test_data_sets_that_meet_share_every_charge_and_the_ledger_shows_it(
    store: SiteStore, chain: Chain
) -> None:
    first, second = store.register_dataset(digests(1)), store.register_dataset(digests(2))
    assert first != second
    chain.reserve(POLICY, offer(1), first, KEY)
    chain.reserve(POLICY, offer(2, steps=5), second, KEY)
    assert store.register_dataset(digests(1, 2)) == first
    assert sorted(charge.steps for charge in store.spent(first)) == [4, 5]
    assert store.spent(first) == store.spent(second)
    # An auditor adds up what one identifier spent in this ledger; what its pool spent beside that is "elsewhere".
    for number, dataset, beside in ((3, first, 5), (4, second, 4 + 4)):
        (other,) = chain.reserve(POLICY, offer(number), dataset, KEY).body.elsewhere
        assert other.steps == beside


@pytest.mark.parametrize(("given_digests", "problem"), [([], DataError), ([b"short"], ValueError)])
def test_what_is_no_data_set_is_refused_and_leaves_no_trace(
    store: SiteStore, given_digests: list[bytes], problem: type[Exception]
) -> None:
    with pytest.raises(problem):
        store.register_dataset(given_digests)
    assert store._database.rows("SELECT * FROM dataset") == []
    store.register_dataset(digests(1))


datasets = st.lists(st.sets(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(datasets)
def test_charges_follow_the_records_however_data_sets_overlap(
    tmp_path_factory: Any, registered: list[set[int]]
) -> None:
    with SiteStore.open(tmp_path_factory.mktemp("store") / "store.db", create=True) as store:
        chain = store.chain("clinics", "lyon")
        names = []
        for number, members in enumerate(registered, start=1):
            names.append(store.register_dataset(digests(*members)))
            # Each data set spends an amount of its own, so that a sum tells which of them were counted.
            charge = Charge(sampling_rate=0.1, noise_multiplier=2.0, steps=2**number)
            body = Reservation(
                seq=1,
                prev=records.FIRST_LINK,
                context=f"{number:064}",
                dataset=names[-1],
                trust=Trust.SITE,
                adjacency="add-or-remove-one-record",
                charge=charge,
                noise_share=2.0,
                noise_sites=1,
                colluders=0,
                clip=1.0,
                delta=1e-5,
            )
            chain.append(partial(placed, body), KEY)
        for number, name in enumerate(names):
            kin = connected(registered, number)
            assert sum(charge.steps for charge in store.spent(name)) == sum(2 ** (other + 1) for other in kin)


def placed(body: Reservation, seq: int, prev: str) -> Reservation:
    return body.model_copy(update={"seq": seq, "prev": prev})


def connected(registered: list[set[int]], start: int) -> set[int]:
    """Return which data sets are reached from one by shared records, by the obvious search."""
    kin, reached = {start}, set(registered[start])
    while more := {k for k, members in enumerate(registered) if k not in kin and members & reached}:
        kin |= more
        reached = set().union(*(registered[k] for k in kin))
    return kin


# --- the steps of a round ----------------------------------------------------------------------------------


def test_a_restarted_process_finds_what_it_sent_and_where_it_was(path: Path) -> None:
    with SiteStore.open(path, create=True) as store:
        assert store.load_state("1" * 64) is None
        store.save_step("1" * 64, "keys", b"one", b"\x00public\xff")
        store.save_step("1" * 64, "shares", b"", b"sealed" * 10**6)
    with SiteStore.open(path) as store:
        assert store.load_state("1" * 64) == ("shares", b"")
        assert store.load_reply("1" * 64, "keys") == b"\x00public\xff"
        assert store.load_reply("1" * 64, "shares") == b"sealed" * 10**6
        assert store.load_reply("1" * 64, "update") is None
        assert not store.is_finished("1" * 64)
        assert store.stored_contexts() == ["1" * 64]


def test_a_phase_is_answered_once(store: SiteStore) -> None:
    store.save_step("1" * 64, "update", b"state", b"vector")
    with pytest.raises(StateError, match="phase update of context 1111111111111111… was answered before"):
        store.save_step("1" * 64, "update", b"other", b"other vector")
    assert store.load_state("1" * 64) == ("update", b"state")
    assert store.load_reply("1" * 64, "update") == b"vector"


def test_a_finished_round_keeps_its_last_reply_and_nothing_else(store: SiteStore) -> None:
    store.save_step("1" * 64, "keys", b"secret", b"public")
    store.finish("1" * 64, "unmask", b"shares")
    assert store.load_state("1" * 64) is None
    assert store.load_reply("1" * 64, "keys") is None
    assert store.load_reply("1" * 64, "unmask") == b"shares"
    assert store.is_finished("1" * 64)
    assert store.stored_contexts() == ["1" * 64]
    store.erase("1" * 64)
    assert store.load_reply("1" * 64, "unmask") is None
    assert store.stored_contexts() == []


@pytest.mark.parametrize("begun", [True, False])
def test_an_erased_context_is_never_begun_again(path: Path, begun: bool) -> None:
    with SiteStore.open(path, create=True) as store:
        if begun:
            store.save_step("1" * 64, "keys", b"secret", b"public")
        store.erase("1" * 64)
        store.erase("1" * 64)
    with SiteStore.open(path) as store:
        assert store.is_finished("1" * 64)
        with pytest.raises(StateError, match="is finished here"):
            store.save_step("1" * 64, "keys", b"secret", b"public")
        with pytest.raises(StateError, match="is finished here"):
            store.finish("1" * 64, "unmask", b"shares")
        assert store.load_state("1" * 64) is None
        assert store.stored_contexts() == []
    assert not begun or b"secret" not in path.read_bytes()


def test_erasing_one_context_leaves_the_others(store: SiteStore) -> None:
    for context in "123":
        store.save_step(context * 64, "keys", context.encode(), b"public")
    store.erase("2" * 64)
    assert store.stored_contexts() == ["1" * 64, "3" * 64]
    assert store.load_state("3" * 64) == ("keys", b"3")


def test_a_deadline_erases_state_and_replies_and_nothing_before_it_does(path: Path) -> None:
    with SiteStore.open(path, create=True) as store:
        store.save_step("1" * 64, "keys", b"secret", b"reply", expires=1000.0)
        store.save_step("1" * 64, "shares", b"more secret", b"another")
        assert store.erase_expired(999.0) == []
        assert store.load_state("1" * 64) == ("shares", b"more secret")
    with SiteStore.open(path) as store:
        assert store.erase_expired(1000.0) == ["1" * 64]
        assert store.erase_expired(1000.0) == []
        assert store.load_state("1" * 64) is None
        assert store.load_reply("1" * 64, "keys") is None
        with pytest.raises(StateError, match="is finished here"):
            store.save_step("1" * 64, "update", b"", b"", expires=2000.0)
    assert b"secret" not in path.read_bytes()


def test_the_last_reply_of_a_finished_round_goes_at_its_deadline_too(store: SiteStore) -> None:
    store.save_step("1" * 64, "keys", b"secret", b"reply", expires=1000.0)
    store.finish("1" * 64, "unmask", b"shares")
    assert store.load_reply("1" * 64, "unmask") == b"shares"
    store.erase_expired(1000.0)
    assert store.load_reply("1" * 64, "unmask") is None


def test_a_clock_set_back_by_days_does_not_keep_secrets(store: SiteStore) -> None:
    store.save_step("1" * 64, "keys", b"secret", b"reply", expires=1e9)
    assert store.erase_expired(1e9 - limits.MAX_ROUND_SECONDS) == []
    assert store.erase_expired(1e9 - limits.MAX_ROUND_SECONDS - 1) == ["1" * 64]


def test_a_store_of_the_version_before_is_brought_up_to_date(path: Path) -> None:
    with SiteStore.open(path, create=True) as store:
        store.save_step("1" * 64, "keys", b"secret", b"reply")
    with closing(sqlite3.connect(path)) as old:
        old.execute("ALTER TABLE session DROP COLUMN expires")
        old.execute("PRAGMA user_version = 1")
        old.commit()
    with SiteStore.open(path) as store:
        assert store.is_finished("1" * 64)
        store.save_step("2" * 64, "keys", b"", b"", expires=5.0)
        assert store.erase_expired(6.0) == ["2" * 64]
