"""A site is killed with SIGKILL at its durable writes, hundreds of times, and never forgets what it spent or sent.

This file is also the program that does it: a torch-free process plays a server and two peers (``lone_site``) and
forks a process for every message to the site, as Flower may. That process runs the real ``Site.answer`` over the
real store, chain, policy and key, and dies before one of its writing statements, or just before or after its answer
left. The message is then sent again, until it is answered. Only training is stood in for: noise from the real
source, without records, so that no torch is needed.

After every kill a copy of the store is opened as a restarted site would open it (``check``).
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.federation import Federation
from support.lone_site import NAME, Around, write_home
from support.weakened import Weakening, weaken

from fedfuse_client import round as site_round
from fedfuse_client.learner import Learner
from fedfuse_client.round import Site
from fedfuse_client.store import SiteStore
from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.envelope import decode, verify
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.ledger.log import kind_of
from fedfuse_shared.ledger.records import FIRST_LINK, LEAF_TYPES, Receipt, Reservation, link
from fedfuse_shared.messages import Step
from fedfuse_shared.offer import Offer, Segment
from fedfuse_shared.parcel import Parcel
from fedfuse_shared.privacy.accountant import epsilon
from fedfuse_shared.privacy.noise import NoiseSource
from fedfuse_shared.secagg.quantise import quantise

pytestmark = pytest.mark.slow

SEED = 20261124
FULL_ROUNDS = 3
NEVER = 2**31
INFO = """\
name = "animals"
task = "classification"
classes = ["cat", "dog"]
modalities = ["text"]
record = "A line about one animal."
"""


class WithoutRecords(Learner):
    """Says in a file that it trains, then sends noise alone: an empty draw, without loading torch."""

    log: Path

    def check_weights(self, offer, raw):
        return np.frombuffer(raw, "<f4")

    def update(self, offer, weights):
        with self.log.open("a") as file:
            file.write(offer.context() + "\n")
        asked = offer.privacy
        noised = NoiseSource.fresh().private_sum(
            np.zeros(offer.dimension()), clip=asked.clip, multiplier=asked.noise_share
        )
        update = (noised / asked.expected_batch_size).astype(np.float32)
        return quantise(update, frozenset({Modality.TEXT}), offer)


def offer_of(federation: Federation, number: int) -> Offer:
    model = ModelConfig(classes=("cat", "dog"), encoders={Modality.TEXT: EncoderConfig(name="hashed-words")})
    return federation.offer(round=number, model=model, layout=(Segment(name="head", size=10),))


# --- the program: a run with kills -------------------------------------------------------------------------------


@dataclass
class Run:
    """One site of one federation, its messages, and what has left it.

    Attributes:
        root: Folder of everything.
        dies: Given how often a message was sent before, at which point the process that answers it dies.
        cap: What the policy lets the data set spend.
    """

    root: Path
    dies: Callable[[int], int]
    cap: float
    around: Around = field(default_factory=Around)
    sent: dict[tuple[str, str], set[bytes]] = field(default_factory=dict)
    """Every answer that left the site, by context and step."""
    leaves: dict[int, set[bytes]] = field(default_factory=dict)
    """Every leaf that left the site, by its place in the chain."""
    asked: str = ""
    """The attempt that the last message belonged to."""
    kills: int = 0
    points: int = 0
    """Points at which it could have died, of the processes that answered."""

    def __post_init__(self) -> None:
        data = self.root / "data"
        data.mkdir(parents=True)
        (data / "dataset.toml").write_text(INFO)
        rows = [f"r{n},{NAME},train,{'cat' if n % 2 else 'dog'},animal number {n},,\n" for n in range(6)]
        (data / "manifest.csv").write_text("id,site,split,label,text,image,audio\n" + "".join(rows))
        self.home = write_home(self.root / "site", self.around.federation, data, epsilon_cap=self.cap)
        self.trained = self.root / "trained"
        self.shared = mmap.mmap(-1, 8)

    def play(self, rounds: int) -> None:
        for _ in self.around.greet(self.ask):
            pass
        for number in range(1, rounds + 1):
            offer = offer_of(self.around.federation, number)
            self.around.play(offer, self.ask, bytes(4 * offer.dimension()))

    def ask(self, step: Step, parcel: Parcel) -> Parcel:
        self.asked = parcel.context
        for attempt in itertools.count():
            answer, killed = self.forked(step, parcel, self.dies(attempt))
            self.kills += killed
            if answer is not None:
                self.heard(step, parcel.context, answer)
            if killed:
                self.check()
            elif answer is None:
                raise RuntimeError("a site's process ended without an answer")
            else:
                self.points += self.passed
                return answer
        raise AssertionError

    @property
    def passed(self) -> int:
        return int.from_bytes(self.shared[:8], "little")

    def forked(self, step: Step, parcel: Parcel, point: int) -> tuple[Parcel | None, bool]:
        """Return what a process of its own answers, if its answer left, and whether it was killed."""
        self.shared[:8] = bytes(8)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(read)
                self.serve(step, parcel, point, write)
                status = 0
            except BaseException:  # noqa: BLE001 - nothing above a fork may see it
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            raw = pipe.read()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status:
            raise RuntimeError("a site's process failed")
        return loads(raw) if raw else None, killed

    def serve(self, step: Step, parcel: Parcel, point: int, write: int) -> None:
        """Answer one message in this process, and die at a point of it."""

        def pass_point() -> None:
            if self.passed == point:
                os.kill(os.getpid(), signal.SIGKILL)
            self.shared[:8] = (self.passed + 1).to_bytes(8, "little")

        def traced(statement: str) -> None:
            if not statement.startswith(("SELECT", "PRAGMA")) or "checkpoint" in statement:
                pass_point()

        connect = sqlite3.connect

        def connected(*args: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*args, **options)
            connection.set_trace_callback(traced)
            return connection

        sqlite3.connect = connected  # type: ignore[assignment]
        WithoutRecords.log = self.trained
        site = Site(self.home)
        answer = dumps(site.answer(step, parcel))
        pass_point()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(answer)
        pass_point()
        site.close()

    def heard(self, step: Step, context: str, answer: Parcel) -> None:
        if answer.problem:
            raise ProtocolError(answer.problem, who=NAME)
        if context:
            self.sent.setdefault((context, step.value), set()).add(answer.body + b"|" + answer.vector)
        for raw in answer.leaves:
            body = decode(raw, LEAF_TYPES[kind_of(raw)], who=NAME).body
            self.leaves.setdefault(body.seq, set()).add(raw)

    # --- what must hold at any time ---------------------------------------------------------------------------
    def check(self) -> list[str]:
        """Open a copy of the store as after a restart, and return the contexts charged.

        Whatever was trained or sent is charged; every chain, leaf and answer that left is still there, byte for
        byte; nothing was said in two ways.
        """
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            for file in self.home.root.glob("store.db*"):
                shutil.copy(file, folder)
            with SiteStore.open(Path(folder) / "store.db") as store:
                return self.check_store(store)

    def check_store(self, store: SiteStore) -> list[str]:
        chain = store.chain(self.around.federation.roster.federation, NAME)
        public = self.around.federation.keys[NAME].public_key().public_bytes_raw()
        written = chain.leaves_after(0)
        charged, receipts, prev = [], [], FIRST_LINK
        for seq, raw in enumerate(written, start=1):
            leaf = decode(raw, LEAF_TYPES[kind_of(raw)], who="store")
            verify(leaf, public)
            assert (leaf.body.seq, leaf.body.prev) == (seq, prev)
            prev = link(leaf)
            charged += [leaf.body.context] if isinstance(leaf.body, Reservation) else []
            receipts += [leaf.body.context] if isinstance(leaf.body, Receipt) else []
        trained = set(self.trained.read_text().split()) if self.trained.exists() else set()
        updates = {context for context, step in self.sent if step == Step.UPDATE.value}
        assert updates <= set(receipts) <= trained <= set(charged)
        assert len(set(charged)) == len(charged)
        spent = [charge for pool in store.pools() for charge in store.spent(pool[0])]
        assert len(spent) == len(charged)
        for seq, said in self.leaves.items():
            assert said == {written[seq - 1]}
        for (context, step), said in self.sent.items():
            (only,) = said  # one vector, one of everything
            stored = store.load_reply(context, step)
            assert stored is None or stored[8:] == only.replace(b"|", b"", 1)
            # A reveal can be asked for again until the next attempt is begun, all else until the reveal.
            over = step != Step.UNMASK.value or context != self.asked
            assert stored is not None or (over and store.is_finished(context))
        return charged


def dumps(parcel: Parcel) -> bytes:
    parts = [parcel.context, parcel.body.hex(), [leaf.hex() for leaf in parcel.leaves], parcel.known]
    return json.dumps([*parts, parcel.vector.hex(), parcel.problem]).encode()


def loads(raw: bytes) -> Parcel:
    context, body, leaves, known, vector, problem = json.loads(raw)
    return Parcel(
        context, bytes.fromhex(body), tuple(map(bytes.fromhex, leaves)), known, bytes.fromhex(vector), problem
    )


class Once:
    """Dies at one point of the whole run."""

    def __init__(self, point: int) -> None:
        self.left = point

    def __call__(self, run: Run) -> Callable[[int], int]:
        def dies(attempt: int) -> int:
            # `passed` is that of the process before, which answered; one that was killed ends the matter.
            self.left = NEVER if attempt else self.left - run.passed
            return self.left

        return dies


def first_to_last(run: Run) -> Callable[[int], int]:
    """Die at the first point of a message, then at its second, and so on until it is answered."""
    del run
    return lambda attempt: attempt


def at_random(seed: int, mean: int) -> Callable[[Run], Callable[[int], int]]:
    """Die after a number of points that is drawn anew for every process."""
    numbers = random.Random(seed)
    return lambda run: lambda attempt: int(numbers.expovariate(1 / mean))


def affordable(rounds: int) -> float:
    """Return a cap that lets exactly so many rounds be charged."""
    charge = charge_of(offer_of(Federation((NAME, "oslo", "porto")), 1))
    cap = epsilon([charge] * rounds, 1e-5)
    assert epsilon([charge] * (rounds + 1), 1e-5) > cap
    return cap


def charge_of(offer: Offer) -> Any:
    from fedfuse_client.chain import _charge

    return _charge(offer)


def trial(root: Path, schedule: Callable[[Run], Callable[[int], int]], rounds: int, cap: float) -> Run:
    """Play a run under a schedule of deaths, then ask for a round more than the budget has."""
    run = Run(root, lambda _: NEVER, cap)
    run.dies = schedule(run)
    run.play(rounds)
    run.dies = lambda _: NEVER
    expected = [offer_of(run.around.federation, number).context() for number in range(1, rounds + 1)]
    assert run.check() == expected  # each charged once, none forgotten, none twice
    beyond = offer_of(run.around.federation, rounds + 1)
    try:
        run.ask(Step.KEYS, run.around.parcel(beyond, run.around.signed(beyond)))
    except ProtocolError as problem:
        assert "would bring epsilon to" in str(problem)
    else:
        raise AssertionError("a site spent more than its cap")
    return run


REFUND = Weakening(
    "fedfuse_client.datasets",
    '"WHERE dataset.pool = ? AND leaf.kind = ? ORDER BY',
    "\"WHERE dataset.pool = ? AND leaf.kind = ? AND EXISTS (SELECT 1 FROM leaf AS done WHERE done.kind = 'receipt' "
    "AND done.context = leaf.context) ORDER BY",
)
_RESERVE = "self._chain.reserve(self._policy, offer, self._learner.dataset(self._store), self._me.key)"
_TRAIN = "words = self._learner.update(offer, weights)"
RESERVED_LATE = [
    Weakening("fedfuse_client.round", _RESERVE, "pass"),
    Weakening("fedfuse_client.round", _TRAIN, f"{_TRAIN}\n        {_RESERVE}"),
]
MUTANTS: dict[str, list[Weakening]] = {  # played by test_privacy_mutants.py
    "refund": [REFUND],
    "reserved late": RESERVED_LATE,
}


def main(mode: str, place: str) -> None:
    site_round.Learner = WithoutRecords  # type: ignore[misc]
    root = Path(place)
    # Accounted here once; every fork inherits it.
    caps = {rounds: affordable(rounds) for rounds in ((1, 2, FULL_ROUNDS) if mode == "full" else (1,))}
    clean = trial(root / "clean", lambda _: lambda _: NEVER, 1, caps[1])
    assert not clean.kills
    schedules: list[tuple[Callable[[Run], Callable[[int], int]], int]]
    if mode == "sample":
        schedules = [(Once(clean.points * place // 15), 1) for place in range(15)]
    elif mode in MUTANTS:
        weaken(pytest.MonkeyPatch(), MUTANTS[mode])
        schedules = [(first_to_last, 1)]
    else:
        schedules = [(Once(point), 1) for point in range(clean.points)]
        schedules += [(first_to_last, FULL_ROUNDS)]
        schedules += [(at_random(SEED + number, 12), 2) for number in range(10)]
    runs = [
        trial(root / str(number), schedule, rounds, caps[rounds])
        for number, (schedule, rounds) in enumerate(schedules)
    ]
    loaded = sorted({"torch", "opacus"} & set(sys.modules))
    found = {"points": clean.points, "kills": [run.kills for run in runs], "loaded": loaded}
    os.write(sys.stdout.fileno(), json.dumps(found).encode())


# --- the tests ---------------------------------------------------------------------------------------------------


def program(mode: str, place: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, mode, str(place)], stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0
    found: dict[str, Any] = json.loads(done.stdout)
    assert not found["loaded"], "the site's processes are meant to need no torch"
    return found


@pytest.mark.slow
def test_a_site_killed_at_a_sample_of_its_writes_undercounts_no_budget(tmp_path: Path) -> None:
    found = program("sample", tmp_path)
    assert found["kills"] == [1] * 15
    assert found["points"] > 40  # of one round; fewer would mean that writes are missed


@pytest.mark.slow
@pytest.mark.long
def test_a_site_killed_hundreds_of_times_undercounts_no_budget(tmp_path: Path) -> None:
    found = program("full", tmp_path)
    singly, repeatedly = found["kills"][: found["points"]], found["kills"][found["points"] :]
    assert singly == [1] * found["points"]  # at every point of a round, once
    assert (
        repeatedly[0] > FULL_ROUNDS * found["points"] / 2
    )  # at every point of every message, one after another
    assert sum(repeatedly[1:]) > 10
    assert sum(found["kills"]) >= 200
    print(f"{sum(found['kills'])} kills")  # noqa: T201 - for docs/privacy.md


if __name__ == "__main__":
    main(*sys.argv[1:])
