"""Processes that use one store: killed with SIGKILL before every write, killed anywhere, and run at the same time.

This file is also the program those processes run. It forks for every trial, so that a hundred of them cost seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_client.policy import SitePolicy
from fedfuse_client.store import SiteStore
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import TrainingConfig
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.envelope import Envelope, decode, encode, verify
from fedfuse_shared.errors import BudgetError, StateError
from fedfuse_shared.ledger.records import FIRST_LINK, Charge, Receipt, Reservation, link
from fedfuse_shared.offer import Offer, RoundPrivacy, Segment
from fedfuse_shared.privacy.accountant import epsilon

pytestmark = pytest.mark.slow

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw()
ONE_ROUND = Charge(sampling_rate=0.25, noise_multiplier=2.0, steps=4)
RECORDS = [hashlib.sha256(bytes([number])).digest() for number in range(40)]
SECRET = b"a secret of the round"
POLICY = SitePolicy(
    site="lyon",
    federation="clinics",
    roster_hash="a" * 64,
    data=Path("records"),
    modalities=(Modality.TEXT,),
    epsilon_cap=100.0,
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
Say = Callable[[str, int, bytes], None]


def offer(number: int) -> Offer:
    return Offer(
        federation="clinics",
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
        privacy=RoundPrivacy(
            trust=Trust.SITE,
            clip=1.0,
            noise_share=2.0,
            noise_sites=1,
            expected_batch_size=64,
            delta=1e-5,
            **ONE_ROUND.model_dump(),
        ),
    )


# --- the program -------------------------------------------------------------------------------------------


def serve(path: Path, number: int, say: Say) -> None:
    """Answer one round, or what is left of it, opening the store anew for every message; say what was sent."""
    context = offer(number).context()
    with SiteStore.open(path, create=True) as store:
        if not store.is_finished(context):
            dataset = store.register_dataset(RECORDS)
            reservation = store.chain("clinics", "lyon").reserve(POLICY, offer(number), dataset, KEY)
            say("reserved", number, encode(reservation))
    with SiteStore.open(path) as store:
        if not store.is_finished(context):
            say("sent", number, store.load_reply(context, "update") or train(store, context))
    with SiteStore.open(path) as store:
        if not store.is_finished(context):
            store.finish(context, "unmask", os.urandom(100))
        say("revealed", number, store.load_reply(context, "unmask") or b"")


def train(store: SiteStore, context: str) -> bytes:
    """Store a vector that no second run would produce again, with its receipt."""
    vector = os.urandom(20_000)
    vector_hash = hashlib.sha256(vector).hexdigest()
    with store.transaction():
        store.chain("clinics", "lyon").append(
            lambda seq, prev: Receipt(seq=seq, prev=prev, context=context, steps=4, vector_hash=vector_hash),
            KEY,
        )
        store.save_step(context, "update", SECRET * 1000, vector)
    return vector


def announcing(folder: Path, *extra: int) -> Say:
    """Return what writes a line for everything that left the site; a killed process has written it, or not."""
    log = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(what: str, number: int, sent: bytes) -> None:
        line = f"{what} {number} {hashlib.sha256(sent).hexdigest()}\n".encode()
        for descriptor in (log, *extra):
            os.write(descriptor, line)

    return say


def forked(work: Callable[[], None]) -> int:
    """Run something in a process of its own and return its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - nothing above a fork may see it
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def kill_before_every_write(root: Path, rounds: int) -> None:
    """Kill one process before its first writing statement, the next before its second, until one survives."""
    connect = sqlite3.connect
    for point in itertools.count():
        folder = root / f"{point:03}"
        folder.mkdir()
        passed = itertools.count()

        def count(statement: str, passed: Iterator[int] = passed, point: int = point) -> None:
            reads = statement.startswith(("SELECT", "PRAGMA")) and "checkpoint" not in statement
            if not reads and next(passed) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        def traced(*args: Any, count: Callable[[str], None] = count, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*args, **options)
            connection.set_trace_callback(count)
            return connection

        sqlite3.connect = traced  # type: ignore[assignment]
        child = forked(lambda folder=folder: serve_rounds(folder, rounds))  # type: ignore[misc]
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


def kill_after_every_line(root: Path, rounds: int) -> None:
    """Kill one process as soon as its first line was read, the next after its second; each somewhere beyond."""
    for point in range(1, 3 * rounds):
        for turn in "ab":
            folder = root / f"{point:03}{turn}"
            folder.mkdir()
            read, write = os.pipe()
            child = forked(lambda folder=folder, write=write: serve_rounds(folder, rounds, write))  # type: ignore[misc]
            os.close(write)
            with os.fdopen(read) as lines:
                for _ in range(point):
                    lines.readline()
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def serve_rounds(folder: Path, rounds: int, *extra: int) -> None:
    say = announcing(folder, *extra)
    for number in range(1, rounds + 1):
        serve(folder / "store.db", number, say)


def spend(path: Path, first: int, step: int, cap: float) -> None:
    """Reserve round after round until the budget is spent, beside others doing the same."""
    sys.stdin.readline()
    for number in itertools.count(first, step):
        with SiteStore.open(path) as store:
            dataset = store.register_dataset(RECORDS)
            policy = POLICY.model_copy(update={"epsilon_cap": cap})
            try:
                store.chain("clinics", "lyon").reserve(policy, offer(number), dataset, KEY)
            except BudgetError:
                return
        tell(str(number))


def tell(line: str) -> None:
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def hold(path: Path) -> None:
    tell("starts")
    with SiteStore.open(path):
        tell("open")
        sys.stdin.readline()


# --- the tests ---------------------------------------------------------------------------------------------


def program(*arguments: object, wait: bool = True) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if wait:
        assert process.communicate()[0] == ""
        assert process.returncode == 0
    return process


def said(folder: Path) -> dict[tuple[str, int], set[str]]:
    """Return the hashes of what was sent, by what it was and its round."""
    heard = defaultdict(set)
    if (folder / "said").exists():
        for line in (folder / "said").read_text().splitlines():
            what, number, digest = line.split()
            heard[what, int(number)].add(digest)
    return heard


def check_chain(store: SiteStore) -> tuple[dict[str, str], dict[str, str]]:
    """Return the hashes of reservations and the vector hashes of receipts by context, every link checked."""
    reservations: dict[str, str] = {}
    receipts: dict[str, str] = {}
    last, prev = 0, FIRST_LINK
    for raw in store.chain("clinics", "lyon").leaves_after(0):
        leaf: Envelope[Reservation] | Envelope[Receipt]
        if b'"kind":"reservation"' in raw:
            leaf = decode(raw, Reservation, who="store")
            assert leaf.body.context not in reservations
            reservations[leaf.body.context] = hashlib.sha256(raw).hexdigest()
        else:
            leaf = decode(raw, Receipt, who="store")
            assert leaf.body.context in reservations
            assert leaf.body.context not in receipts
            receipts[leaf.body.context] = leaf.body.vector_hash
        verify(leaf, PUBLIC)
        assert (leaf.body.seq, leaf.body.prev) == (last + 1, prev)
        last, prev = leaf.body.seq, link(leaf)
    return reservations, receipts


def check_after_kill(folder: Path, rounds: int) -> None:
    """Whatever had left the site is still known to it; and the rounds can be finished, charged once each."""
    path = folder / "store.db"
    before = said(folder)
    if path.exists():
        with SiteStore.open(path) as store:
            reservations, receipts = check_chain(store)
            dataset = store.register_dataset(RECORDS)
            assert len(store.spent(dataset)) == len(reservations)
            for (what, number), digests in before.items():
                logged = {"reserved": reservations, "sent": receipts}.get(what)
                assert logged is None or {logged[offer(number).context()]} == digests
                assert what != "revealed" or store.is_finished(offer(number).context())
    else:
        assert not before
    serve_rounds(folder, rounds)
    after = said(folder)
    assert {
        what for what in after if len(after[what]) > 1
    } == set()  # what was sent again was sent identically
    assert {number for what, number in after if what == "revealed"} == set(range(1, rounds + 1))
    with SiteStore.open(path) as store:
        reservations, receipts = check_chain(store)
        expected = {offer(number).context() for number in range(1, rounds + 1)}
        assert set(reservations) == set(receipts) == expected
        assert store.spent(store.register_dataset(RECORDS)) == [ONE_ROUND] * rounds
        for file in folder.glob("store.db*"):
            assert SECRET not in file.read_bytes()
    assert {file.name for file in folder.iterdir() if not file.name.startswith(".fedfuse-store-")} == {
        "said",
        "store.db",
        "store.db.lock",
    }


def test_a_site_killed_before_any_write_of_a_round_forgets_nothing_it_said_or_spent(tmp_path: Path) -> None:
    program("before-write", tmp_path, 1)
    trials = sorted(tmp_path.iterdir())
    assert len(trials) > 40
    assert not said(trials[0])
    assert ("revealed", 1) in said(trials[-1])  # the last process was left to finish
    for folder in trials:
        check_after_kill(folder, 1)


def test_a_site_killed_anywhere_forgets_nothing_it_said_or_spent(tmp_path: Path) -> None:
    program("after-line", tmp_path, 4)
    trials = sorted(tmp_path.iterdir())
    assert len(trials) == 22
    for folder in trials:
        check_after_kill(folder, 4)


def test_two_processes_never_spend_more_than_the_cap_together(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    SiteStore.open(path, create=True).close()
    affordable = 6
    cap = epsilon([ONE_ROUND] * affordable, POLICY.delta)
    assert epsilon([ONE_ROUND] * (affordable + 1), POLICY.delta) > cap
    pair = [program("spend", path, first, 2, cap, wait=False) for first in (1, 2)]
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    reserved = [process.communicate()[0].split() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert len(reserved[0]) + len(reserved[1]) == affordable
    with SiteStore.open(path) as store:
        assert len(check_chain(store)[0]) == affordable
        assert store.spent(store.register_dataset(RECORDS)) == [ONE_ROUND] * affordable


def test_a_second_process_is_refused_until_the_first_is_gone_even_if_killed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    SiteStore.open(path, create=True).close()
    (tmp_path / "alias.db").symlink_to(path)
    with program("hold", path, wait=False) as first:
        assert first.stdout is not None
        assert [first.stdout.readline() for _ in range(2)] == ["starts\n", "open\n"]
        for name in ("store.db", "alias.db"):
            with pytest.raises(
                StateError, match="is in use by another process; one site runs once: stop the other"
            ):
                SiteStore.open(tmp_path / name, wait=0)
        first.kill()
    SiteStore.open(path, wait=0).close()


def test_a_second_process_waits_for_the_first_to_finish_its_message(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with SiteStore.open(path, create=True):
        second = program("hold", path, wait=False)
        assert second.stdout is not None
        assert second.stdout.readline() == "starts\n"
        with pytest.raises(StateError, match="is in use"):
            SiteStore.open(path, wait=0)
    assert second.communicate("\n")[0] == "open\n"
    assert second.returncode == 0


def main(mode: str, place: str, *numbers: str) -> None:
    match mode:
        case "before-write" | "after-line":
            with tempfile.TemporaryDirectory() as folder:
                serve_rounds(Path(folder), int(numbers[0]))  # what is accounted here, every fork inherits
            kill = kill_before_every_write if mode == "before-write" else kill_after_every_line
            kill(Path(place), int(numbers[0]))
        case "spend":
            spend(Path(place), int(numbers[0]), int(numbers[1]), float(numbers[2]))
        case "hold":
            hold(Path(place))


if __name__ == "__main__":
    main(*sys.argv[1:])
