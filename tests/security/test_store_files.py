"""What can happen to a store's file: damaged, edited, rolled back, lost, cloned, searched for erased secrets."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_client.chain import Chain
from fedfuse_client.store import SiteStore
from fedfuse_shared.config.base import Trust
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.errors import ProtocolError, StateError, VerificationError
from fedfuse_shared.ledger.records import Charge, Close, Outcome, Receipt, Refusal, Reservation
from fedfuse_shared.limits import MAX_LEDGER_LINE

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
RECORDS = [hashlib.sha256(bytes([number])).digest() for number in range(50)]
SECRETS = [hashlib.sha512(bytes([number])).digest() for number in range(3)]


def reservation(context: int, dataset: str) -> Callable[[int, str], Reservation]:
    return lambda seq, prev: Reservation(
        seq=seq,
        prev=prev,
        context=f"{context:064}",
        dataset=dataset,
        trust=Trust.SITE,
        adjacency="add-or-remove-one-record",
        charge=Charge(sampling_rate=0.25, noise_multiplier=2.0, steps=4),
        noise_share=2.0,
        noise_sites=1,
        colluders=0,
        clip=1.0,
        delta=1e-5,
    )


def receipt(context: int, steps: int = 4) -> Callable[[int, str], Receipt]:
    return lambda seq, prev: Receipt(
        seq=seq, prev=prev, context=f"{context:064}", steps=steps, vector_hash="e" * 64
    )


def chain_of(store: SiteStore) -> Chain:
    return store.chain("clinics", "lyon")


def fill(path: Path, rounds: int = 4) -> None:
    """Write some rounds, the last of which is still going on."""
    with SiteStore.open(path, create=True) as store:
        dataset = store.register_dataset(RECORDS)
        for number in range(rounds):
            chain_of(store).append(reservation(number, dataset), KEY)
            store.save_step(f"{number:064}", "keys", b"state" * 300, b"public")
            chain_of(store).append(receipt(number), KEY)
            store.save_step(f"{number:064}", "update", b"state" * 300, b"vector" * 1000)
            if number < rounds - 1:
                store.finish(f"{number:064}", "unmask", b"shares" * 50)


def content(path: Path) -> list[object]:
    """Return everything a site would read from its store."""
    with SiteStore.open(path, wait=0) as store:
        dataset = store.register_dataset(RECORDS)
        contexts = [f"{number:064}" for number in range(4)]
        return [
            chain_of(store).head(),
            chain_of(store).leaves_after(0),
            chain_of(store).find(Reservation, contexts[1]),
            store.spent(dataset),
            store.stored_contexts(),
            [store.is_finished(context) for context in contexts],
            [store.load_state(context) for context in contexts],
            [
                store.load_reply(context, phase)
                for context in contexts
                for phase in ("keys", "update", "unmask")
            ],
        ]


# --- damage ------------------------------------------------------------------------------------------------


def test_no_flipped_bit_of_the_file_changes_what_a_site_reads(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    fill(path)
    whole, expected = path.read_bytes(), content(path)
    noticed = 0
    for place in range(0, len(whole), 61):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = content(path)
        except StateError as problem:
            assert "store.db" in str(problem) or "belongs to site" in str(problem)
            noticed += 1
        else:
            assert found == expected, place
    assert noticed > 300


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"no database",
        lambda whole: whole[:5000],
        lambda whole: whole[:-4096],
        lambda whole: whole[:8192] + bytes(4096) + whole[12288:],
    ],
    ids=["empty", "foreign", "cut", "page lost", "page zeroed"],
)
def test_what_is_left_of_a_store_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "store.db"
    fill(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StateError, match=r"store .*store\.db: is (damaged|not a site store)"):
        SiteStore.open(path)


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE leaf SET raw = replace(raw, '\"noise_multiplier\":2', '\"noise_multiplier\":9') WHERE seq = 3",
        "UPDATE leaf SET raw = replace(raw, '\"steps\":4', '\"steps\":1') WHERE seq = 8",
        "DELETE FROM leaf WHERE seq = 3",
        "DELETE FROM leaf WHERE seq = 1",
        "UPDATE leaf SET seq = 9 WHERE seq = 8",
        "UPDATE leaf SET federation = 'other' WHERE seq = 8",
        'UPDATE leaf SET raw = \'{"kind":"receipt"}\' WHERE seq = 3',
        "UPDATE dataset SET pool = 7",
        "PRAGMA user_version = 3",
        "PRAGMA application_id = 1",
    ],
)
def test_an_edited_store_is_refused(tmp_path: Path, edit: str) -> None:
    path = tmp_path / "store.db"
    fill(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = OFF")
    assert connection.execute(edit).rowcount != 0
    connection.close()
    with pytest.raises(StateError):
        SiteStore.open(path)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    def both(store: SiteStore) -> None:
        with store.transaction():
            chain_of(store).append(receipt(9), KEY)
            store.save_step("9" * 64, "update", b"", bytes(10**6))

    path = tmp_path / "store.db"
    fill(path)
    before = content(path)
    with SiteStore.open(path) as store:
        store._database.rows("PRAGMA max_page_count = 40")
        with pytest.raises(StateError, match="disk is full; free space and start again"):
            both(store)
    assert content(path) == before


def test_another_program_in_the_store_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.db"
    fill(path)
    other = sqlite3.connect(path, isolation_level=None)
    with SiteStore.open(path) as store:
        store._database.rows("PRAGMA busy_timeout = 1")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateError, match="is being used by another program"):
            store.erase("9" * 64)
        other.execute("ROLLBACK")
        store.erase("9" * 64)
    other.close()


# --- rolled back, lost, cloned -----------------------------------------------------------------------------


def test_a_store_that_matches_the_ledger_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    fill(path)
    with SiteStore.open(path) as store:
        chain = chain_of(store)
        chain.check_head(None, PUBLIC)
        for leaf in chain.leaves_after(0):  # the ledger may lag behind, never lead
            chain.check_head(leaf, PUBLIC)


def test_a_restored_older_store_is_noticed(tmp_path: Path) -> None:
    path, backup = tmp_path / "store.db", tmp_path / "backup.db"
    fill(path, 2)
    shutil.copy(path, backup)
    with SiteStore.open(path) as store:
        logged = encode(chain_of(store).append(receipt(9), KEY))
    shutil.copy(backup, path)
    with SiteStore.open(path) as store:
        with pytest.raises(StateError) as caught:
            chain_of(store).check_head(logged, PUBLIC)
        assert "leaf 5 that this site signed and its store, which ends at leaf 4, does not" in str(
            caught.value
        )
        # Going on regardless would write a second leaf 5; it does not get past the check either.
        chain_of(store).append(receipt(9, steps=3), KEY)
        with pytest.raises(StateError, match="was rolled back, or a second copy of the site is running"):
            chain_of(store).check_head(logged, PUBLIC)


def test_a_lost_store_is_noticed(tmp_path: Path) -> None:
    fill(tmp_path / "store.db", 1)
    with SiteStore.open(tmp_path / "store.db") as store:
        logged = chain_of(store).leaves_after(0)
    with SiteStore.open(tmp_path / "fresh.db", create=True) as store:
        for leaf in logged:
            with pytest.raises(StateError, match="rolled back"):
                chain_of(store).check_head(leaf, PUBLIC)


def test_a_lost_write_ahead_log_is_noticed(tmp_path: Path) -> None:
    path, crashed = tmp_path / "store.db", tmp_path / "crashed.db"
    fill(path, 1)
    with SiteStore.open(path) as store:
        logged = encode(chain_of(store).append(receipt(9), KEY))
        shutil.copy(path, crashed)
        shutil.copy(tmp_path / "store.db-wal", tmp_path / "crashed.db-wal")
    with SiteStore.open(crashed) as store:
        chain_of(store).check_head(logged, PUBLIC)
    with SiteStore.open(path) as store:
        chain_of(store).append(receipt(10), KEY)
        logged = encode(chain_of(store).append(receipt(11), KEY))
        shutil.copy(path, crashed)  # and nothing beside it
    with SiteStore.open(crashed) as store, pytest.raises(StateError, match="rolled back"):
        chain_of(store).check_head(logged, PUBLIC)


def test_a_clone_of_the_site_is_noticed_by_whichever_comes_second(tmp_path: Path) -> None:
    fill(tmp_path / "one.db", 2)
    shutil.copy(tmp_path / "one.db", tmp_path / "two.db")
    logged: list[bytes] = []
    for name in ("one", "two"):
        with SiteStore.open(tmp_path / f"{name}.db") as store:
            logged.append(encode(chain_of(store).append(receipt(9, steps=len(logged)), KEY)))
    for name, other in (("one", logged[1]), ("two", logged[0])):
        with SiteStore.open(tmp_path / f"{name}.db") as store:
            chain_of(store).append(receipt(10), KEY)
            with pytest.raises(StateError, match="a second copy of the site is running; stop every copy"):
                chain_of(store).check_head(other, PUBLIC)


def test_only_this_sites_own_signature_counts_as_evidence(tmp_path: Path) -> None:
    fill(tmp_path / "store.db", 1)
    stranger = Ed25519PrivateKey.generate()
    ahead = receipt(9)(7, "1" * 64)
    close = Close(
        context="0" * 64,
        outcome=Outcome.ABORTED,
        reason="too few",
        keys_hash=None,
        dealings_hash=None,
        survivors={},
        agreements={},
        model_hash=None,
    )
    genuine = encode(seal(ahead, "lyon", KEY))
    with SiteStore.open(tmp_path / "store.db") as store:
        chain = chain_of(store)
        with pytest.raises(VerificationError):
            chain.check_head(encode(seal(ahead, "lyon", stranger)), PUBLIC)
        for shown in (
            encode(seal(ahead, "oslo", KEY)),
            encode(seal(close, "lyon", KEY)),
            genuine + b" ",
            b"",
            b"[]",
            b"{}",
            b"\xff",
            b"[" * 100_000,
            b"1" * 5000,
            genuine[:-1] + b"," * MAX_LEDGER_LINE,
        ):
            with pytest.raises(ProtocolError, match=r"^server: "):
                chain.check_head(shown, PUBLIC)
        refusal = Refusal(seq=7, prev="1" * 64, context="2" * 64, reason="no")
        for own in (
            genuine,
            encode(seal(refusal, "lyon", KEY)),
            encode(seal(reservation(1, "3" * 64)(9, "1" * 64), "lyon", KEY)),
        ):
            with pytest.raises(StateError):
                chain.check_head(own, PUBLIC)


# --- secrets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["erase", "finish"])
def test_no_file_holds_a_secret_once_its_round_is_over(tmp_path: Path, end: str) -> None:
    def held() -> list[bool]:
        files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        return [secret in files for secret in SECRETS]

    with SiteStore.open(tmp_path / "store.db", create=True) as store:
        for number, secret in enumerate(SECRETS):
            store.save_step("1" * 64, f"phase-{number}", secret * (1 + 200 * number), b"reply")
        assert held()[-1]
        if end == "erase":
            store.erase("1" * 64)
        else:
            store.finish("1" * 64, "unmask", b"shares")
        assert held() == [False, False, False]


def test_secrets_stay_in_no_file_when_erased_together_with_other_work(tmp_path: Path) -> None:
    with SiteStore.open(tmp_path / "store.db", create=True) as store:
        store.save_step("1" * 64, "keys", SECRETS[0], b"reply")
        with store.transaction():
            store.erase("1" * 64)
            chain_of(store).append(receipt(1), KEY)
        assert not any(SECRETS[0] in file.read_bytes() for file in tmp_path.iterdir())


def test_a_reader_that_delays_the_erasure_does_not_prevent_it(tmp_path: Path) -> None:
    reader = None
    with SiteStore.open(tmp_path / "store.db", create=True) as store:
        store._database.rows("PRAGMA busy_timeout = 1")
        store.save_step("1" * 64, "keys", SECRETS[0], b"reply")
        reader = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM session").fetchall()
        store.erase("1" * 64)
        assert any(SECRETS[0] in file.read_bytes() for file in tmp_path.iterdir())
        reader.close()
        chain_of(store).append(receipt(1), KEY)
        assert not any(SECRETS[0] in file.read_bytes() for file in tmp_path.iterdir())


def test_a_site_killed_just_after_erasing_leaves_no_secret_behind_once_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed, SiteStore.open(tmp_path / "store.db", create=True) as store:
        killed.setattr(store._database, "_truncate_log", lambda: None)
        store.save_step("1" * 64, "keys", SECRETS[0], b"reply")
        store.erase("1" * 64)
        for name in ("store.db", "store.db-wal"):
            shutil.copy(tmp_path / name, tmp_path / f"crashed-{name}")
    crashed = [tmp_path / "crashed-store.db", tmp_path / "crashed-store.db-wal"]
    assert any(SECRETS[0] in file.read_bytes() for file in crashed)
    with SiteStore.open(crashed[0]) as store:
        assert store.is_finished("1" * 64)
        assert not any(SECRETS[0] in file.read_bytes() for file in crashed)


def test_the_store_and_the_policy_load_none_of_the_heavy_packages() -> None:
    heavy = "{'torch', 'flwr', 'opacus', 'numpy', 'dp_accounting'}"
    check = (
        f"import sys, fedfuse_client.store, fedfuse_client.policy; sys.exit(bool({heavy} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
