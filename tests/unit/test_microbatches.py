"""A record's place in a microbatch is its own: what it adds to a sum does not depend on who else is there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse_client import training
from fedfuse_client.gradient_choice import mode_for
from fedfuse_client.microbatches import Filled, microbatches, row_of
from fedfuse_client.synthetic import microbatch
from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.models import build_model
from fedfuse_shared.privacy.noise import NoiseSource

SIZE = 8


@given(st.lists(st.integers(0, 200), unique=True), st.integers(1, 16))
def test_every_record_is_once_in_its_own_row(drawn: list[int], size: int) -> None:
    places = [row_of(f"r{index}", size) for index in range(201)]
    seen = []
    for filled in microbatches(drawn, places, size):
        assert len(filled.rows) == len(filled.counted) == size
        for row, (index, counts) in enumerate(zip(filled.rows, filled.counted, strict=True)):
            if counts:
                assert places[index] == row
                seen.append(index)
    assert sorted(seen) == sorted(drawn)


@given(st.lists(st.integers(0, 200), unique=True, min_size=1))
def test_one_more_record_moves_nobody(drawn: list[int]) -> None:
    places = [row_of(f"r{index}", SIZE) for index in range(201)]

    def rows(of: list[int]) -> dict[int, int]:
        return {
            index: row
            for filled in microbatches(of, places, SIZE)
            for row, (index, counts) in enumerate(zip(filled.rows, filled.counted, strict=True))
            if counts
        }

    fewer = rows(drawn[1:])
    assert {index: rows(drawn)[index] for index in fewer} == fewer


def test_nobody_drawn_gives_no_microbatch() -> None:
    assert list(microbatches([], [0, 1], SIZE)) == []


# --- a server that chooses the weights ---------------------------------------------------------------------------
class Records:
    """Synthetic features of records named r0, r1, ..., as ``RecordTensors`` holds them."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        made = microbatch(config, count, 5)
        text, image, audio, present = made.inputs
        self._columns = {
            "text": text,
            "image": image,
            "audio": audio,
            "present": present,
            "label": made.labels,
        }

    def places(self, size: int) -> list[int]:
        return [row_of(f"r{index}", size) for index in range(len(self._columns["label"]))]

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {name: values[torch.tensor(rows)] for name, values in self._columns.items()}


def packed_densely(drawn, places, size):
    """What was done before: one behind the other."""
    for start in range(0, len(drawn), size):
        rows = drawn[start : start + size]
        spare = size - len(rows)
        yield Filled([*rows, *[rows[0]] * spare], [True] * len(rows) + [False] * spare)


def summed(model, records: Records, drawn: list[int], size: int) -> np.ndarray:
    trained = copy.deepcopy(model).train()
    optimizer = training.PrivateOptimizer(
        torch.optim.SGD(trained.parameters(), lr=1.0),
        clip=1.0,
        multiplier=1.0,
        batch=1,
        noise=NoiseSource.fresh(),
    )
    training.accumulate(mode_for(model, size, "layers")(trained), optimizer, records, drawn, size)
    return torch.cat([parameter.summed_grad.flatten() for parameter in optimizer.params]).numpy()


def most_that_the_first_record_moves(monkeypatch, pack) -> float:
    """Largest change of the sum when record 0 goes, over weights that a hostile server may send (clip norm 1)."""
    config = ModelConfig(
        classes=tuple("0123456789"),
        encoders={
            Modality.TEXT: EncoderConfig(name="hashed-words"),
            Modality.IMAGE: EncoderConfig(name="oriented-gradients"),
        },
    )
    monkeypatch.setattr(training, "microbatches", pack)
    records, found = Records(config, 97), 0.0
    for scale in (1.0, 1e6, 1e8):
        model = build_model(config, 0)
        draws = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 3.0, generator=draws)
                # Equal for all classes, so that it means nothing but rounding, which now decides between them.
                parameter[:, ::2] = scale * torch.randn(parameter[0, ::2].shape, generator=draws)
        everybody = list(range(97))
        change = summed(model, records, everybody, 64) - summed(model, records, everybody[1:], 64)
        found = max(found, float(np.linalg.norm(change)))
    return found


def test_one_record_moves_the_sum_by_its_clip_norm_whatever_the_weights(monkeypatch) -> None:
    assert most_that_the_first_record_moves(monkeypatch, microbatches) <= 1.0


def test_mutant_packing_densely_lets_one_record_move_the_others(monkeypatch) -> None:
    assert most_that_the_first_record_moves(monkeypatch, packed_densely) > 1.0


@pytest.mark.parametrize("size", [1, 7, 64])
def test_rows_are_spread(size: int) -> None:
    counts = np.bincount([row_of(f"record-{n}", size) for n in range(100 * size)], minlength=size)
    # Binomial with mean 100: 6.5 deviations; false alarms below 1e-8 for all rows together.
    assert (abs(counts - 100) <= 65).all()
