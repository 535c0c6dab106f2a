"""The privacy engine with one defect put in, again and again: a check that holds of the real code notices each.

Every test runs one check twice: on the code as it is, and on a copy with one defect (``support.weakened``). The
checks look at behaviour alone: at updates, at which records are drawn, at what is on disk when. Each raises
``Caught`` with what it saw. Statistical checks are exact tests of the null hypothesis that the code does what is
promised; each says its false-alarm rate, 1e-9 per decision, in all below 1e-7 a run of this file.
"""

from __future__ import annotations

import csv
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support.data_folder import INFO as FOLDER_INFO
from support.data_folder import Row, write_folder, write_manifest
from support.federation import Federation
from support.lone_site import NAME, PEERS, Around, write_home
from support.weakened import Weakening, weaken

from fedfuse_client.data.cells import Record
from fedfuse_client.data.tensors import RecordTensors
from fedfuse_client.learner import Learner
from fedfuse_client.round import Site
from fedfuse_client.training import PrivateOptimizer, train_round
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import TrainingConfig
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.ledger.log import kind_of
from fedfuse_shared.ledger.records import Charge, Reservation
from fedfuse_shared.messages import Step
from fedfuse_shared.models import build_model, flatten, load_flat, model_hash, outline
from fedfuse_shared.offer import Offer, RoundPrivacy
from fedfuse_shared.privacy.noise import NoiseSource

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ALARM = 1e-9
"""False-alarm rate of every statistical decision below."""
CLASSES = ("cat", "dog", "eel")
MODEL = ModelConfig(classes=CLASSES, encoders={Modality.TEXT: EncoderConfig(name="hashed-words", width=32)})
TRAINING = "fedfuse_client.training"
NOISE = "fedfuse_shared.privacy.noise"


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a hundred weights are slowed down by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Caught(Exception):
    """A check saw something that the real code never does."""


def expect(holds: bool, seen: str) -> None:
    if not holds:
        raise Caught(seen)


def notices(
    check: Callable[[], None], defects: list[Weakening], monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    """Assert that a check holds of the real code, and of the code with a defect says what it saw."""
    check()
    with monkeypatch.context() as patch:
        weaken(patch, defects)
        with pytest.raises(Caught, match=seen):
            check()


# --- training on records in memory --------------------------------------------------------------------------------


def texts(count: int) -> list[Record]:
    """Return records of text alone, in three classes, no two of the same words."""
    words = [f"w{bit}" for bit in range(9)]
    lines = [" ".join(w for bit, w in enumerate(words) if (row + 1) >> bit & 1) for row in range(count)]
    return [
        Record(row + 2, f"r{row}", NAME, "train", row % 3, line, None, None) for row, line in enumerate(lines)
    ]


def constants(**changes: object) -> RoundPrivacy:
    values = {
        "trust": Trust.SITE,
        "sampling_rate": 0.25,
        "steps": 1,
        "clip": 0.7,
        "noise_multiplier": 1.3,
        "noise_share": 1.3,
        "noise_sites": 1,
        "expected_batch_size": 16,
        "delta": 1e-5,
    }
    return RoundPrivacy(**{**values, **changes})


def train(records: list[Record], noise: NoiseSource, privacy: RoundPrivacy, favoured: float = 0.0):
    """Return the update of one round from a model that gives the first class so much more than the others."""
    model = build_model(MODEL, 0)
    weights = flatten(model)
    weights[-3] = favoured  # the prior comes last
    load_flat(model, weights)
    return train_round(
        model,
        RecordTensors(Path("/nonexistent"), records, MODEL),
        privacy=privacy,
        training=TrainingConfig(learning_rate=1.0),
        noise=noise,
        microbatch=8,
    )


class Watching(NoiseSource):
    """Draws what a test says and keeps the sums that noise is added to."""

    def __init__(self, drawn: list[int] | None = None) -> None:
        super().__init__(bytes(16))
        self.drawn = drawn
        self.sums: list[np.ndarray] = []

    def poisson_mask(self, n, q):
        return np.ones(n, dtype=np.bool_) if self.drawn is None else np.isin(np.arange(n), self.drawn)

    def private_sum(self, total, *, clip, multiplier):
        self.sums.append(total.astype(np.float64).flatten())
        return super().private_sum(total, clip=clip, multiplier=multiplier)


def within(values: np.ndarray, deviation: float) -> bool:
    """Return whether independent normal values of mean 0 may have a deviation: exact chi-square interval."""
    ratio = float(np.sum(np.square(values / deviation, dtype=np.float64)))
    return bool(stats.chi2.ppf(ALARM / 2, values.size) < ratio < stats.chi2.isf(ALARM / 2, values.size))


def noise_is_as_promised() -> None:
    """The update's noise has deviation ``noise_share * clip`` over the divisor: on no records, and beside records.

    Beside records two rounds that draw all of them are compared; their sums are equal, so the difference is noise.
    False alarms: 1e-9 for each of two exact chi-square intervals.
    """
    privacy = constants()
    deviation = privacy.clip * privacy.noise_share / privacy.expected_batch_size
    empty = [train([], NoiseSource.fresh(), privacy) for _ in range(20)]
    expect(within(np.concatenate(empty), deviation), "noise of another deviation without records")
    everybody, records = constants(sampling_rate=1.0), texts(5)
    pairs = [[train(records, NoiseSource.fresh(), everybody) for _ in "ab"] for _ in range(20)]
    beside = np.concatenate([one.astype(np.float64) - other for one, other in pairs])
    expect(within(beside, deviation * 2**0.5), "noise of another deviation beside records")


def sums(records: list[Record], privacy: RoundPrivacy, favoured: float) -> np.ndarray:
    noise = Watching()
    train(records, noise, privacy, favoured)
    return np.concatenate(noise.sums)


def one_record_moves_the_sum_by_at_most_the_clip() -> None:
    """Over sites that have one record more: the sum before noise moves by no more than C in L2 norm.

    Gradients are some hundred times C. From a model that favours the first class, records of the first have small
    gradients and those of the others large ones that point the other way: the worst case of a sum that is clipped
    as a whole. Nothing here is random.
    """
    privacy = constants(clip=1e-3)
    several = texts(6)
    same = [Record(9, f"s{label}", NAME, "train", label, "w0 w1", None, None) for label in range(3)]
    moved = [
        float(np.linalg.norm(sums([*before, more], privacy, favoured) - sums(before, privacy, favoured)))
        for favoured in (0.0, 3.0)
        for before in ([], same[:1], several)
        for more in same
    ]
    expect(max(moved) <= privacy.clip, f"one record moves the sum by {max(moved) / privacy.clip:.2f} C")
    assert max(moved) > 0.999 * privacy.clip  # the gradients are meant to be clipped


def the_divisor_is_public() -> None:
    """The same records drawn give the same update, bit for bit, whatever else the site has."""
    updates = [train(texts(count), Watching([1, 4, 7, 30]), constants()) for count in (31, 40, 200)]
    expect(
        all(np.array_equal(updates[0], other) for other in updates[1:]),
        "the update depends on how many records there are",
    )


_NOISE = "noise = self.normal(total.size).reshape(total.shape) * (multiplier * clip)"
_WEIGHTS = "weights = torch.where((norms < torch.inf) & counted, bound / norms.clamp(min=bound), 0.0)"
_DRAW = "drawn = np.flatnonzero(noise.poisson_mask(len(data), privacy.sampling_rate)).tolist()"
_STEPS = "for _ in range(privacy.steps):"


@pytest.mark.parametrize(
    "where",
    [
        Weakening(NOISE, _NOISE, f"{_NOISE} * 0"),
        Weakening(
            TRAINING, "clip=self.max_grad_norm, multiplier=self.noise_multiplier", "clip=1e-9, multiplier=1.0"
        ),
    ],
    ids=["source", "optimiser"],
)
def test_mutant_no_noise(where, monkeypatch):
    notices(noise_is_as_promised, [where], monkeypatch, "another deviation")


@pytest.mark.parametrize(
    "where",
    [
        Weakening(NOISE, _NOISE, f"{_NOISE} / 2"),
        Weakening(TRAINING, "multiplier=privacy.noise_share,", "multiplier=privacy.noise_share / 2,"),
    ],
    ids=["source", "optimiser"],
)
def test_mutant_noise_halved(where, monkeypatch):
    notices(noise_is_as_promised, [where], monkeypatch, "another deviation")


def test_mutant_noise_only_without_records(monkeypatch):
    defect = Weakening(NOISE, _NOISE, f"{_NOISE} * (not total.any())")
    notices(noise_is_as_promised, [defect], monkeypatch, "another deviation beside records")


def test_mutant_no_clip(monkeypatch):
    defect = Weakening(TRAINING, _WEIGHTS, "weights = counted.to(torch.float64)")
    notices(one_record_moves_the_sum_by_at_most_the_clip, [defect], monkeypatch, "moves the sum")


def test_mutant_clip_per_batch(monkeypatch):
    whole = (
        "weights = counted.to(torch.float64); "
        "whole = sum((each.weighted_sum(weights).square().sum() for each in gradients), torch.tensor(0.0)).sqrt(); "
        "weights *= bound / whole.clamp(min=bound)"
    )
    defect = Weakening(TRAINING, _WEIGHTS, whole)
    notices(one_record_moves_the_sum_by_at_most_the_clip, [defect], monkeypatch, r"by 1\.[5-9]. C")


@pytest.mark.parametrize(
    "divisor",
    ["max(1, round(len(data) * privacy.sampling_rate))", "len(data)"],
    ids=["expected from the count", "the count"],
)
def test_mutant_batch_size_from_the_record_count(divisor, monkeypatch):
    defect = Weakening(TRAINING, "batch=privacy.expected_batch_size", f"batch={divisor}")
    notices(the_divisor_is_public, [defect], monkeypatch, "depends on how many records")


# --- training through the learner: what is charged, and what is drawn ---------------------------------------------


def animals(folder: Path, count: int) -> Path:
    """Write a folder of text rows of the site."""
    folder.mkdir(parents=True)
    info = FOLDER_INFO.replace('["cat", "dog"]', '["cat", "dog", "eel"]')
    (folder / "dataset.toml").write_text(info.replace('["text", "image", "audio"]', '["text"]'))
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "site", "split", "label", "text", "image", "audio"])
        table.writerows([r.id, NAME, "train", CLASSES[r.label], r.text, "", ""] for r in texts(count))
    return folder


def offer_of(number: int = 1, **changes: object) -> tuple[Offer, np.ndarray]:
    """Return an offer of a round and the weights it starts from."""
    weights, layout = flatten(build_model(MODEL, 0)), outline(MODEL)[0]
    offer = Federation((NAME, *PEERS)).offer(
        round=number,
        model=MODEL,
        layout=layout,
        model_hash=model_hash(weights, layout),
        privacy=constants(clip=1.0, noise_multiplier=2.0, noise_share=2.0, **changes),
    )
    return offer, weights


RECORDS, RATE, STEPS, ROUNDS = 300, 0.06, 10, 8


def drawn_and_charged(root: Path) -> tuple[np.ndarray, Charge]:
    """Reserve and train several rounds; return who was drawn, ``(rounds * steps, records)``, and one charge."""
    offer, weights = offer_of(sampling_rate=RATE, steps=STEPS)
    around = Around()
    home = write_home(root / "site", around.federation, animals(root / "data", RECORDS))
    drawn: list[np.ndarray] = []
    policy, usable = home.load_policy(), RecordTensors.usable

    def watched(self, indices):
        drawn.append(np.isin(np.arange(len(self)), list(indices)))
        return usable(self, indices)

    with pytest.MonkeyPatch.context() as patch, home.open_store() as store:
        patch.setattr(RecordTensors, "usable", watched)
        learner = Learner(policy)
        dataset = learner.dataset(store)
        chain = store.chain(policy.federation, policy.site)
        charge = chain.reserve(policy, offer, dataset, around.federation.keys[NAME]).body.charge
        for _ in range(ROUNDS):
            learner.update(offer, weights)
    return np.array(drawn), charge


def records_are_drawn_as_charged(root: Path) -> None:
    """Steps, and how often records enter one, are what the reservation states.

    Each record enters each step with probability q independently: exact two-sided binomial test, false alarms 1e-9.
    """
    drawn, charge = drawn_and_charged(root)
    expect(len(drawn) == ROUNDS * charge.steps, "other steps than charged")
    found = stats.binomtest(int(drawn.sum()), drawn.size, charge.sampling_rate)
    expect(
        found.pvalue > ALARM,
        f"records enter {found.statistic / charge.sampling_rate:.2f} times as often as charged",
    )


def draws_are_poisson(root: Path) -> None:
    """Batches have sizes of their own, and records enter steps independently.

    Two tests, false alarms 1e-9 each, both exact. Sizes of two Poisson batches are equal with the probability that
    two binomial counts are, so equal sizes among disjoint pairs of steps are binomial. A record is in both steps of a
    disjoint pair with probability q squared, so those are binomial too.
    """
    drawn, _ = drawn_and_charged(root)
    one, other = drawn[0::2], drawn[1::2]
    equal = int((one.sum(axis=1) == other.sum(axis=1)).sum())
    chance = float(np.square(stats.binom.pmf(np.arange(RECORDS + 1), RECORDS, RATE)).sum())
    expect(
        stats.binom.sf(equal - 1, len(one), chance) > ALARM,
        f"{equal} of {len(one)} pairs of batches are of one size",
    )
    both = int((one & other).sum())
    found = stats.binomtest(both, one.size, RATE**2)
    expect(found.pvalue > ALARM, f"{both} records in two steps running, {one.size * RATE**2:.0f} are usual")


def in_new_folders(check: Callable[[Path], None], root: Path) -> Callable[[], None]:
    """Return a check that has a folder of its own each time."""
    numbers = iter(range(100))
    return lambda: check(root / f"play{next(numbers)}")


@pytest.mark.parametrize(
    "where",
    [
        Weakening(
            TRAINING, _DRAW, _DRAW.replace("privacy.sampling_rate", "min(1.0, 10 * privacy.sampling_rate)")
        ),
        Weakening(
            "fedfuse_client.chain",
            "sampling_rate=asked.sampling_rate",
            "sampling_rate=asked.sampling_rate / 10",
        ),
    ],
    ids=["drawn", "charged"],
)
def test_mutant_q_ten_times_higher_than_reported(where, monkeypatch, tmp_path):
    check = in_new_folders(records_are_drawn_as_charged, tmp_path)
    notices(check, [where], monkeypatch, r"enter (9|10)\.\d+ times as often")


_SIZE = "round(len(data) * privacy.sampling_rate)"


def test_mutant_shuffling_instead_of_poisson(monkeypatch, tmp_path):
    fixed = Weakening(TRAINING, _DRAW, f"drawn = noise._generator.permutation(len(data))[:{_SIZE}].tolist()")
    check = in_new_folders(draws_are_poisson, tmp_path)
    notices(check, [fixed], monkeypatch, "pairs of batches are of one size")
    # It is at the rate that was charged: nothing but the distribution tells.
    with monkeypatch.context() as patch:
        weaken(patch, [fixed])
        records_are_drawn_as_charged(tmp_path / "rate")


def test_mutant_shuffling_in_epochs_with_uneven_batches(monkeypatch, tmp_path):
    epochs = [
        Weakening(TRAINING, _STEPS, f"order = noise._generator.permutation(len(data))\n    {_STEPS}"),
        Weakening(
            TRAINING,
            _DRAW,
            "size = int(noise._generator.binomial(len(data), privacy.sampling_rate)); "
            "drawn, order = order[:size].tolist(), np.roll(order, -size)",
        ),
    ]
    check = in_new_folders(draws_are_poisson, tmp_path)
    notices(check, epochs, monkeypatch, "0 records in two steps running")


# --- the budget ---------------------------------------------------------------------------------------------------


def killed(mode: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a site whose processes are killed at all of their writes, with a defect of ``test_kills_of_a_site.py``."""
    program = Path(__file__).with_name("test_kills_of_a_site.py")
    return subprocess.run([sys.executable, program, mode, place], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "seen"),
    [("refund", "assert len(spent) == len(charged)"), ("reserved late", "<= trained <= set(charged)")],
    ids=["refund", "reserved late"],
)
def test_mutant_refund_after_a_crash_or_a_late_reservation_under_sigkill(defect, seen, tmp_path):
    """The same program without a defect is ``test_a_site_killed_…``; it passes."""
    done = killed(defect, tmp_path)
    assert done.returncode == 1
    assert seen in done.stderr


def the_reservation_is_on_disk_before_a_record_is_read(root: Path) -> None:
    """When training reads its first record another connection finds the reservation committed. Nothing is random."""
    around = Around()
    home = write_home(root / "site", around.federation, animals(root / "data", 30))
    offer, weights = offer_of(sampling_rate=0.5, steps=2)
    seen: list[int] = []
    load = RecordTensors._load

    def watched(self, index):
        with closing(sqlite3.connect(f"{home.store.absolute().as_uri()}?mode=ro", uri=True)) as other:
            committed = other.execute(
                "SELECT count(*) FROM leaf WHERE kind = ? AND context = ?",
                (Reservation.kind, offer.context()),
            )
            seen.extend(committed.fetchone())
        return load(self, index)

    site = Site(home)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RecordTensors, "_load", watched)
            list(around.greet(site.answer))
            around.play(offer, site.answer, weights.tobytes())
    finally:
        site.close()
    assert seen
    expect(all(seen), "a record was read before its reservation was on disk")


def test_mutant_reservation_after_training(monkeypatch, tmp_path):
    reserve = "self._chain.reserve(self._policy, offer, self._learner.dataset(self._store), self._me.key)"
    update = "words = self._learner.update(offer, weights)"
    defects = [
        Weakening("fedfuse_client.round", reserve, "pass"),
        Weakening("fedfuse_client.round", update, f"{update}\n        {reserve}"),
    ]
    check = in_new_folders(the_reservation_is_on_disk_before_a_record_is_read, tmp_path)
    notices(check, defects, monkeypatch, "before its reservation")


def test_mutant_reservation_that_is_not_committed(monkeypatch, tmp_path):
    defect = Weakening(
        "fedfuse_client.round",
        "        words = self._learner.update(offer, weights)\n        vector, vector_hash = session.mask(words)\n"
        "        with self._store.transaction():\n",
        "        with self._store.transaction():\n            words = self._learner.update(offer, weights)\n"
        "            vector, vector_hash = session.mask(words)\n",
    )
    inside = [
        Weakening(
            "fedfuse_client.round",
            "        self._chain.reserve(self._policy",
            "        reserve = (self._policy",
        ),
        defect,
        Weakening(
            "fedfuse_client.round",
            "            words = self._learner.update(offer, weights)\n",
            "            self._chain.reserve(*reserve); words = self._learner.update(offer, weights)\n",
        ),
        Weakening("fedfuse_client.chain", "if self._database.in_transaction:", "if False:"),
    ]
    check = in_new_folders(the_reservation_is_on_disk_before_a_record_is_read, tmp_path)
    notices(check, inside, monkeypatch, "before its reservation")


def rows(count: int) -> list[Row]:
    return [
        {
            "id": f"r{index}",
            "site": NAME,
            "split": "train",
            "label": "dog" if index % 3 else "cat",
            "text": f"animal number {index}",
            "image": f"images/{index}.png",
            "audio": f"audio/{index}.wav",
        }
        for index in range(count)
    ]


def renamed(folder: Path, records: list[Row]) -> list[Row]:
    """Give files, ids and labels other names, and put the rows in another order."""
    for row in records:
        image = folder / row["image"]
        row["image"] = image.rename(image.with_name(f"again-{image.name}")).relative_to(folder).as_posix()
        row["id"], row["label"] = f"new-{row['id']}", "cat"
    return records[::-1]


def half_new(folder: Path, records: list[Row]) -> list[Row]:
    del folder
    return [*records[:1], *({**row, "text": f"never seen {row['id']}"} for row in records[1:])]


SAME: dict[str, Callable[[Path, list[Row]], list[Row]]] = {
    "copied": lambda _, records: records,
    "renamed": renamed,
    "a subset": lambda _, records: records[2:3],
    "an overlap": half_new,
}


def the_same_records_keep_their_budget(root: Path) -> None:
    """A folder with a copy, other names, some or a single one of the records is charged what they spent before."""
    around = Around()
    for number, (what, change) in enumerate(SAME.items()):
        first = write_folder(root / f"{number}a", rows(6))
        second = write_folder(root / f"{number}b", rows(6))
        write_manifest(second, change(second, rows(6)))
        home = write_home(root / f"site{number}", around.federation, first)
        policy = home.load_policy()
        with home.open_store() as store:
            dataset = Learner(policy).dataset(store)
            chain = store.chain(policy.federation, policy.site)
            charged = chain.reserve(policy, offer_of()[0], dataset, around.federation.keys[NAME]).body.charge
            again = Learner(policy.model_copy(update={"data": second})).dataset(store)
            expect(store.spent(again) == [charged], f"a fresh budget for records that are {what}")


@pytest.mark.parametrize(
    "where",
    [
        Weakening(
            "fedfuse_client.datasets",
            "number = pools[0][0] if pools else _add(database)",
            "number = _add(database); pools = []",
        ),
        Weakening(
            "fedfuse_client.data.manifest",
            "digest = hashlib.sha256(limits.LABEL_RECORD)",
            "digest = hashlib.sha256(limits.LABEL_RECORD + str(dataset.folder).encode())",
        ),
        Weakening(
            "fedfuse_client.data.manifest",
            "digest = hashlib.sha256(limits.LABEL_RECORD)",
            "digest = hashlib.sha256(limits.LABEL_RECORD + record.id.encode())",
        ),
        Weakening(
            "fedfuse_client.datasets",
            "number = pools[0][0] if pools else _add(database)",
            "known = database.row('SELECT count(*) FROM incoming JOIN record USING (digest)'); "
            "pools = pools if known == database.row('SELECT count(*) FROM record') else []; "
            "number = pools[0][0] if pools else _add(database)",
        ),
    ],
    ids=["always new", "by its folder", "by row ids", "only if all of it is there"],
)
def test_mutant_second_dataset_id_for_the_same_data(where, monkeypatch, tmp_path):
    check = in_new_folders(the_same_records_keep_their_budget, tmp_path)
    notices(check, [where], monkeypatch, "a fresh budget for records")


def a_restored_backup_takes_part_in_nothing(root: Path) -> None:
    """A site charged twice, put back to a backup with one charge, answers no message of a new or a running attempt.

    Both kinds of copy are tried: ``SiteStore.backup`` and a plain copy of the file. Nothing is random.
    """
    for kind in ("backup", "copy"):
        around = Around()
        home = write_home(root / kind / "site", around.federation, animals(root / kind / "data", 30))
        kept = root / kind / "kept.db"

        def ask(step, parcel, home=home):
            site = Site(home)
            try:
                return site.answer(step, parcel)
            finally:
                site.close()

        list(around.greet(ask))
        for number in (1, 2):
            offer, weights = offer_of(number, steps=1)
            around.play(offer, ask, weights.tobytes())
            if number == 1 and kind == "copy":
                shutil.copyfile(home.store, kept)
            elif number == 1:
                with home.open_store() as store:
                    store.backup(kept)
        home.store.unlink()
        shutil.copyfile(kept, home.store)
        offer, _ = offer_of(3)
        answer = ask(Step.KEYS, around.parcel(offer, around.signed(offer)))
        logged = sum(kind_of(leaf) == Reservation.kind for leaf in around.leaves)
        with home.open_store() as store:
            known = len(store.spent(store.pools()[0][0]))
        assert (known, logged) == (1, 2)
        expect(
            bool(answer.problem) and not answer.body,
            f"answers with {known} of {logged} charges in its store ({kind})",
        )


@pytest.mark.parametrize(
    "where",
    [
        Weakening("fedfuse_client.chain", "if leaf is None:", "if True:"),
        Weakening(
            "fedfuse_client.chain",
            "if ours is None or ours[0].encode() != leaf:",
            "if ours and ours[0].encode() != leaf:",
        ),
        Weakening(
            "fedfuse_client.round",
            "self._chain.check_head(parcel.leaves[-1], self._me.key.public_key().public_bytes_raw())",
            "pass",
        ),
    ],
    ids=["looks at nothing", "compares only what it has", "is not asked"],
)
def test_mutant_restored_backup(where, monkeypatch, tmp_path):
    check = in_new_folders(a_restored_backup_takes_part_in_nothing, tmp_path)
    notices(check, [where], monkeypatch, "1 of 2 charges")


# --- precision ----------------------------------------------------------------------------------------------------


def noise_is_as_fine_as_the_grid() -> None:
    """The last eight bits of a noised sum, in steps of the grid, are zero once in 256, as of any value around.

    The noise is 2^32 steps of the grid wide, so the chance is 1/256 to many digits: exact binomial test, false alarms
    1e-9.
    """
    for total in (np.zeros(100_000), np.linspace(-3, 3, 100_000)):
        noised = NoiseSource.fresh().private_sum(total, clip=1.0, multiplier=1.0)
        steps = np.rint(noised * 2.0**32).astype(np.int64)
        for last in (0, 85, 255):
            found = stats.binomtest(int((steps % 256 == last).sum()), steps.size, 1 / 256)
            expect(found.pvalue > ALARM, f"{found.statistic:.2%} of all sums end on the same bits")


def nothing_below_its_precision_is_noised() -> None:
    """Sums below float64 and weights below float32 are refused before noise is drawn. Nothing is random."""
    for precision in (np.float16, np.float32):
        try:
            NoiseSource.fresh().private_sum(np.zeros(3, precision), clip=1.0, multiplier=1.0)
        except ConfigError:
            continue
        raise Caught(f"noise was added in {np.dtype(precision)}")
    for half in (torch.float16, torch.bfloat16):
        layer = torch.nn.Linear(2, 2).to(half)
        try:
            PrivateOptimizer(
                torch.optim.SGD(layer.parameters(), lr=1.0),
                clip=1.0,
                multiplier=1.0,
                batch=1,
                noise=NoiseSource.fresh(),
            )
        except ConfigError:
            continue
        raise Caught(f"weights were trained in {half}")


@pytest.mark.parametrize(
    "precision",
    [".astype(np.float16).astype(np.float64)", ".astype(np.float32).astype(np.float64)"],
    ids=["float16", "float32"],
)
def test_mutant_float16_noise(precision, monkeypatch):
    defect = Weakening(
        NOISE,
        _NOISE,
        f"noise = self.normal(total.size).reshape(total.shape){precision} * (multiplier * clip)",
    )
    notices(noise_is_as_fine_as_the_grid, [defect], monkeypatch, "end on the same bits")


def test_mutant_bfloat16_noise(monkeypatch):
    cut = "(self.normal(total.size).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)"
    defect = Weakening(
        NOISE, _NOISE, f"noise = {cut}.astype(np.float64).reshape(total.shape) * (multiplier * clip)"
    )
    notices(noise_is_as_fine_as_the_grid, [defect], monkeypatch, "end on the same bits")


@pytest.mark.parametrize(
    "where",
    [
        Weakening(NOISE, "if total.dtype != np.float64:", "if False:"),
        Weakening(TRAINING, "if parameter.dtype != torch.float32:", "if False:"),
    ],
    ids=["sums", "weights"],
)
def test_mutant_float16_let_through(where, monkeypatch):
    notices(nothing_below_its_precision_is_noised, [where], monkeypatch, "float16")


# --- the list -----------------------------------------------------------------------------------------------------


def test_every_mutant_of_the_design_is_here():
    wanted = {
        "no_noise",
        "noise_halved",
        "no_clip",
        "clip_per_batch",
        "q_ten_times_higher_than_reported",
        "shuffling_instead_of_poisson",
        "batch_size_from_the_record_count",
        "refund_after_a_crash",
        "reservation_after_training",
        "second_dataset_id_for_the_same_data",
        "restored_backup",
        "float16_noise",
    }
    here = re.findall(r"^def test_mutant_(\w+)", Path(__file__).read_text(), re.MULTILINE)
    assert {want for want in wanted if not any(name.startswith(want) for name in here)} == set()
