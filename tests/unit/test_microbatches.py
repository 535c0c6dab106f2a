"""A record's place in a microbatch is its own: what it adds to a sum does not depend on who else is there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse_client import gradient_choice, training
from fedfuse_client.gradient_choice import Choice, choice_for
from fedfuse_client.microbatches import densely, microbatches, row_of
from fedfuse_client.synthetic import microbatch
from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.model import EncoderConfig, Fusion, ModelConfig
from fedfuse_shared.models import build_model, classifier
from fedfuse_shared.privacy.noise import NoiseSource

pytestmark = pytest.mark.slow

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


@given(
    st.lists(st.integers(0, 5000), unique=True), st.sampled_from([(64,), (64, 32, 16), (352, 336, 64, 16)])
)
def test_densely_packed_every_record_is_once_in_one_of_the_shapes(drawn: list[int], shapes) -> None:
    seen, spare = [], 0
    for filled in densely(drawn, shapes):
        assert len(filled.rows) == len(filled.counted)
        assert len(filled.rows) in shapes
        assert set(filled.rows) <= set(drawn)
        seen += [index for index, counts in zip(filled.rows, filled.counted, strict=True) if counts]
        spare += filled.counted.count(False)
    assert seen == drawn
    assert spare < max(shapes[-1], max(shapes) / 4 + 1)


# --- a server that chooses the weights ---------------------------------------------------------------------------
TEXT, IMAGE, AUDIO = Modality.TEXT, Modality.IMAGE, Modality.AUDIO
FIXED = {TEXT: "hashed-words", IMAGE: "oriented-gradients", AUDIO: "spectral-shape"}
TRAINED = {TEXT: "text-conv", IMAGE: "image-conv", AUDIO: "audio-conv"}
SHIPPED = {
    "heads": (FIXED, Fusion.CONCAT),
    "late": (FIXED, Fusion.LATE),
    **{name: ({m: name}, Fusion.CONCAT) for m, name in TRAINED.items()},
    "trained": (TRAINED, Fusion.CONCAT),
    "trained-late": (TRAINED, Fusion.LATE),
}
COUNT, EXPECTED = 97, 90  # the first record more or less is another shape as well


def settings(encoders: dict[Modality, str], fusion: Fusion = Fusion.CONCAT) -> ModelConfig:
    named = {m: EncoderConfig(name=name) for m, name in encoders.items()}
    return ModelConfig(classes=tuple("0123456789"), encoders=named, fusion=fusion)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(gradient_choice, "_chosen", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def summed(model, records: Records, drawn: list[int], choice: Choice) -> np.ndarray:
    trained = copy.deepcopy(model).train()
    optimizer = training.PrivateOptimizer(
        torch.optim.SGD(trained.parameters(), lr=1.0),
        clip=1.0,
        multiplier=1.0,
        batch=1,
        noise=NoiseSource.fresh(),
    )
    training.accumulate(choice.mode(trained), optimizer, records, drawn, 64, choice.shapes)
    return torch.cat([parameter.summed_grad.flatten() for parameter in optimizer.params]).numpy()


def at_hostile_weights(config: ModelConfig, scale: float):
    model = build_model(config, 0)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 3.0 if parameter.dim() > 1 else 1.0, generator=draws)
            if parameter.dim() > 1 and parameter[0].numel() > 1:
                # Equal for all outputs, so that it means nothing but rounding, which now decides between them.
                columns = parameter.view(len(parameter), -1)[:, ::2]
                columns.copy_(scale * torch.randn(columns[0].shape, generator=draws))
    return model


def most_that_the_first_record_moves(config: ModelConfig, choice: Choice) -> float:
    """Largest change of the sum when record 0 goes, over weights that a hostile server may send (clip norm 1)."""
    records, found = Records(config, COUNT), 0.0
    for scale in (1.0, 1e6, 1e8):
        model = at_hostile_weights(config, scale)
        everybody = list(range(COUNT))
        change = summed(model, records, everybody, choice) - summed(model, records, everybody[1:], choice)
        found = max(found, float(np.linalg.norm(change)))
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_one_record_moves_the_sum_by_its_clip_norm_whatever_the_weights(name) -> None:
    """With the mode and the packing that a site chooses, which is dense for every shipped model."""
    config = settings(*SHIPPED[name])
    choice = choice_for(build_model(config, 0), 64, expected=EXPECTED)
    assert 64 in choice.shapes
    assert 0 < most_that_the_first_record_moves(config, choice) <= 1.0


@pytest.mark.parametrize("fusion", Fusion)
def test_so_it_does_where_every_record_has_its_own_row(fusion) -> None:
    config = settings(FIXED, fusion)
    assert 0 < most_that_the_first_record_moves(config, Choice("layers", ())) <= 1.0


def test_with_several_threads_nothing_is_proven_of_rows() -> None:
    torch.set_num_threads(2)
    assert choice_for(build_model(settings(FIXED), 0), 16, "layers").shapes == ()


def test_a_mode_whose_numbers_are_not_known_is_not_packed_densely() -> None:
    assert choice_for(build_model(settings({AUDIO: "spectral-shape"}), 0), 16, "ghost").shapes == ()


def test_a_mode_that_rows_do_not_matter_to_comes_before_a_faster_one(monkeypatch) -> None:
    monkeypatch.setattr(gradient_choice, "_by_speed", lambda *_: ["ghost", "layers"])
    config = settings({AUDIO: "spectral-shape"})
    assert choice_for(build_model(config, 0), 16).name == "layers"
    monkeypatch.setattr(gradient_choice, "_chosen", {})
    monkeypatch.setattr(gradient_choice, "shapes_alike", lambda *_: ())
    assert choice_for(build_model(config, 0), 16) == Choice("ghost", ())


# --- models that rows matter to ------------------------------------------------------------------------------------
ALIGNED = classifier.aligned


def as_kernels_do(values: torch.Tensor) -> torch.Tensor:
    """Round odd rows otherwise than even ones, by one unit in the last place."""
    step = 2.0**-23 * (torch.arange(len(values)) % 2)
    return ALIGNED(values * (1 + step)[:, None])


@pytest.mark.parametrize("fusion", Fusion)
@pytest.mark.parametrize("heads", [as_kernels_do, lambda values: values], ids=["odd rows", "not aligned"])
def test_mutant_packing_densely_what_rows_matter_to(monkeypatch, heads, fusion) -> None:
    """One record then moves the others; the proof says so, and with what it chooses instead none does."""
    monkeypatch.setattr(classifier, "aligned", heads)
    config = settings({TEXT: "hashed-words", IMAGE: "oriented-gradients"}, fusion)
    forced = most_that_the_first_record_moves(config, Choice("layers", (64,)))
    choice = choice_for(build_model(config, 0), 64, "layers", EXPECTED)
    assert (forced > 1.0) is (choice.shapes == ())
    assert choice.shapes == () or heads is not as_kernels_do  # kernels of another machine may not mind
    assert most_that_the_first_record_moves(config, choice) <= 1.0


@pytest.mark.parametrize("odd", [1, 15, 63])
def test_a_single_row_that_is_rounded_otherwise_is_found(monkeypatch, odd) -> None:
    monkeypatch.setattr(
        classifier,
        "aligned",
        lambda values: ALIGNED(values * (1 + 2.0**-23 * (torch.arange(len(values)) == odd))[:, None]),
    )
    for fusion in Fusion:
        assert choice_for(build_model(settings(FIXED, fusion), 0), 64, "layers").shapes == ()


def test_a_shape_that_is_rounded_otherwise_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(
        classifier, "aligned", lambda values: ALIGNED(values * (1 + 2.0**-23 * (len(values) in {32, 96})))
    )
    found = choice_for(build_model(settings(FIXED), 0), 64, "layers", EXPECTED)
    assert found.shapes == (112, 80, 64, 16)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_rows_are_spread(size: int) -> None:
    counts = np.bincount([row_of(f"record-{n}", size) for n in range(100 * size)], minlength=size)
    # Binomial with mean 100: 6.5 deviations; false alarms below 1e-8 for all rows together.
    assert (abs(counts - 100) <= 65).all()
