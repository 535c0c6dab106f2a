"""DP-SGD at a site: gradients, clipping, noise, sampling, and what the update must not depend on."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional

from fedfuse_client.data.cells import Record
from fedfuse_client.data.tensors import RecordTensors
from fedfuse_client.gradients import Factored, RecordGradients
from fedfuse_client.training import PrivateOptimizer, train_round
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import TrainingConfig
from fedfuse_shared.config.model import AudioInput, EncoderConfig, Fusion, ImageInput, ModelConfig, TextInput
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.models import MODALITIES, build_encoder, build_model, flatten, load_flat
from fedfuse_shared.offer import RoundPrivacy
from fedfuse_shared.privacy.noise import CLIP_MARGIN, NoiseSource

pytestmark = pytest.mark.slow

FIXED = ("hashed-words", "oriented-gradients", "spectral-shape")
TRAINED = ("text-conv", "image-conv", "audio-conv")
WIDTHS = {"hashed-words": 64, "text-conv": 8, "image-conv": 8, "audio-conv": 8}
EVERY_MODEL = [(names, fusion) for names in (FIXED, TRAINED) for fusion in Fusion]
TRAINING = TrainingConfig(learning_rate=1.0)
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def config(names=FIXED, fusion=Fusion.CONCAT):
    return ModelConfig(
        classes=("a", "b", "c"),
        encoders={
            m: EncoderConfig(name=name, width=WIDTHS.get(name))
            for m, name in zip(MODALITIES, names, strict=True)
        },
        fusion=fusion,
        image=ImageInput(size=16),
        audio=AudioInput(mels=20, frames=16),
        text=TextInput(words=8),
    )


def random_model(names=FIXED, fusion=Fusion.CONCAT):
    model = build_model(config(names, fusion), 0)
    weights = flatten(model)
    load_flat(model, weights + np.random.default_rng(5).normal(0, 0.3, weights.size).astype(np.float32))
    return model


def random_batch(model, count):
    generator = torch.Generator().manual_seed(3)
    batch = []
    for m in MODALITIES:
        encoder = build_encoder(model.config, m)
        if encoder.dtype == torch.int64:
            batch.append(torch.randint(0, 257, (count, *encoder.shape), generator=generator))
        else:
            batch.append(torch.randn(count, *encoder.shape, generator=generator))
    present = torch.rand(count, 3, generator=generator) < 0.6
    present[0], present[1] = True, False
    return (*batch, present), torch.randint(0, 3, (count,), generator=generator)


def texts(count, start=0):
    """Return records of text alone, no two the same."""
    made = []
    for row in range(start, start + count):
        text = " ".join(word for bit, word in enumerate(WORDS) if (row + 1) >> bit & 1)
        made.append(Record(row + 2, f"r{row}", "here", "train", row % 3, text, None, None))
    return made


def privacy(**changes):
    settings = {
        "trust": Trust.SITE,
        "sampling_rate": 0.5,
        "steps": 1,
        "clip": 1.0,
        "noise_multiplier": 1.0,
        "noise_share": 1.0,
        "noise_sites": 1,
        "expected_batch_size": 16,
        "delta": 1e-5,
    }
    return RoundPrivacy(**{**settings, **changes})


class ChosenDraw(NoiseSource):
    """Repeatable noise, and a draw the test chooses; the records drawn use up no randomness."""

    def __init__(self, drawn, key=bytes(16)):
        super().__init__(key)
        self.drawn = drawn

    def poisson_mask(self, n, q):
        return np.isin(np.arange(n), self.drawn)


def train(records, noise, model=None, microbatch=8, **changes):
    model = model or random_model()
    data = RecordTensors(Path("/nonexistent"), records, model.config)
    return train_round(
        model, data, privacy=privacy(**changes), training=TRAINING, noise=noise, microbatch=microbatch
    )


def gradients_by_autograd(model, inputs, labels):
    rows = []
    for row in range(len(labels)):
        model.zero_grad()
        logits = model(*(x[row : row + 1] for x in inputs))
        functional.cross_entropy(logits, labels[row : row + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]).to(torch.float64))
    return torch.stack(rows)


# --- per-record gradients


@pytest.mark.parametrize(("names", "fusion"), EVERY_MODEL)
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_per_record_gradients_are_those_of_plain_autograd(names, fusion):
    model = random_model(names, fusion).train()
    inputs, labels = random_batch(model, 6)
    expected = gradients_by_autograd(model, inputs, labels)
    wrapped = RecordGradients(model)
    for _ in range(2):  # the second time shows that nothing was left behind
        functional.cross_entropy(wrapped(*inputs), labels, reduction="sum").backward()
        taken = wrapped.take()
        norms = sum(each.squared_norms() for each in taken).sqrt()
        assert torch.allclose(norms, expected.norm(dim=1), rtol=1e-4)
        for row in range(6):
            weights = functional.one_hot(torch.tensor(row), 6).to(torch.float64)
            found = torch.cat([each.weighted_sum(weights).flatten() for each in taken])
            assert torch.allclose(found, expected[row], rtol=1e-3, atol=1e-5)
    assert any(isinstance(each, Factored) for each in taken)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_linear_layer_used_twice_or_on_sequences_is_left_to_opacus():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.sequence = nn.Linear(4, 2)

        def forward(self, values):
            return self.sequence(self.layer(self.layer(values))[:, None].expand(-1, 3, -1)).sum(dim=1)

    torch.manual_seed(0)
    model, values = Twice(), torch.randn(5, 4)
    reference = GradSampleModule(Twice(), loss_reduction="sum")
    reference._module.load_state_dict(model.state_dict())
    reference(values).square().sum().backward()
    wrapped = RecordGradients(model)
    wrapped(values).square().sum().backward()
    for ours, parameter in zip(wrapped.take(), reference.parameters(), strict=True):
        assert torch.allclose(
            ours.weighted_sum(torch.ones(5, dtype=torch.float64)).float(),
            parameter.grad_sample.sum(dim=0),
            rtol=1e-4,
        )


# --- clipping


def summed(model, inputs, labels, clip, counted=None):
    """Return the clipped sum (float64) of a batch."""
    wrapped = RecordGradients(model.train())
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        clip=clip,
        multiplier=1.0,
        batch=1,
        noise=NoiseSource.fresh(),
    )
    functional.cross_entropy(wrapped(*inputs), labels, reduction="sum").backward()
    counted = torch.ones(len(labels), dtype=torch.bool) if counted is None else counted
    optimizer.clip_and_accumulate(wrapped.take(), counted)
    return torch.cat([p.summed_grad.flatten() for p in optimizer.params])


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("names", [FIXED, TRAINED])
def test_each_record_moves_the_sum_by_its_clipped_gradient_and_never_by_more_than_the_clip_norm(names, clip):
    model = random_model(names)
    inputs, labels = random_batch(model, 6)
    expected = gradients_by_autograd(random_model(names), inputs, labels)
    for row in range(6):
        only = torch.arange(6) == row
        moved = summed(random_model(names), inputs, labels, clip, counted=only)
        assert moved.norm() <= clip * (1 - CLIP_MARGIN) * (1 + 1e-12)
        assert moved.norm().item() == pytest.approx(min(clip, expected[row].norm().item()), rel=1e-3)
        assert torch.allclose(moved / moved.norm(), expected[row] / expected[row].norm(), atol=1e-4)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("names", [FIXED, TRAINED])
def test_a_gradient_that_is_not_finite_counts_as_zero(names, bad):
    model = random_model(names)
    inputs, labels = random_batch(model, 6)
    inputs[3][2] = True
    inputs[1][2] = bad
    others = torch.arange(6) != 2
    with_it = summed(random_model(names), inputs, labels, 1.0)
    assert torch.isfinite(with_it).all()
    inputs[1][2] = 0.0
    assert torch.equal(with_it, summed(random_model(names), inputs, labels, 1.0, counted=others))


# --- noise


@pytest.mark.parametrize("records", [[], texts(20)])
def test_an_empty_draw_is_a_step_of_noise_alone(records):
    model = build_model(config((*FIXED[:1], *FIXED[1:])), 0)
    moved = [
        train(records, ChosenDraw([], key=bytes([i]) * 16), model=model, clip=0.7, noise_share=1.3)
        for i in range(30)
    ]
    values = np.concatenate(moved)
    deviation = 0.7 * 1.3 / 16  # learning rate 1 over the divisor; 43,000 values
    # 7 standard deviations of each statistic: a false alarm once in 10^11 keys, and the keys are fixed.
    assert abs(values.mean()) < 7 * deviation / math.sqrt(values.size)
    assert abs(values.var() / deviation**2 - 1) < 7 * math.sqrt(2 / values.size)


def test_noise_has_the_share_not_the_total_multiplier():
    quiet = train([], ChosenDraw([]), noise_multiplier=4.0, noise_share=0.5)
    loud = train([], ChosenDraw([]), noise_multiplier=4.0, noise_share=1.0)
    assert np.allclose(2 * quiet, loud, rtol=1e-3, atol=1e-6)


def test_every_step_adds_fresh_noise():
    once = [train([], NoiseSource.fresh(), model=build_model(config(), 0)) for _ in range(10)]
    thrice = [train([], NoiseSource.fresh(), model=build_model(config(), 0), steps=3) for _ in range(10)]
    # Independent noise adds up in variance; noise used again would give 9. 7 deviations: 10^-11.
    ratio = np.var(thrice) / np.var(once)
    assert ratio == pytest.approx(3, abs=7 * 3 * math.sqrt(4 / np.size(once)))


def test_neither_sampling_nor_noise_follows_a_seed_of_torch():
    updates = []
    for _ in range(2):
        torch.manual_seed(0)
        updates.append(train(texts(20), NoiseSource.fresh()))
    assert not np.any(updates[0] == updates[1])
    torch.manual_seed(1)
    first = train(texts(20), NoiseSource(bytes(16)))
    torch.manual_seed(2)
    assert np.array_equal(first, train(texts(20), NoiseSource(bytes(16))))


# --- what the update must not depend on


def test_the_update_does_not_depend_on_how_many_records_the_site_has():
    drawn = [1, 4, 7, 30]
    assert np.array_equal(train(texts(31), ChosenDraw(drawn)), train(texts(200), ChosenDraw(drawn)))


def test_the_divisor_is_the_public_constant():
    drawn, model = list(range(12)), random_model()
    small = train(texts(40), ChosenDraw(drawn), model=model, expected_batch_size=10)
    large = train(texts(40), ChosenDraw(drawn), model=model, expected_batch_size=40)
    assert np.allclose(small, 4 * large, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("names", [FIXED, TRAINED])
def test_microbatching_never_changes_the_update(names):
    drawn = list(range(3, 14))
    updates = [
        train(texts(40), ChosenDraw(drawn), model=random_model(names), microbatch=size, steps=2)
        for size in (1, 4, 11, 16)
    ]
    for other in updates[1:]:
        assert np.allclose(updates[0], other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("clip", [0.1, 1.0, 50.0])
def test_one_more_record_moves_the_update_by_at_most_the_clip_norm_over_the_divisor(clip):
    for extra in (0, 11, 39):
        without = [row for row in range(5, 36) if row != extra]
        moved = [
            train(texts(40), ChosenDraw(sorted({*without, *more})), clip=clip, noise_share=1e-3)
            for more in ([], [extra])
        ]
        assert 0 < np.linalg.norm(moved[1] - moved[0]) <= clip / 16 * (1 + 1e-5) + 1e-6


def test_a_record_whose_file_cannot_be_read_counts_as_zero_and_is_logged_at_the_site(caplog):
    bad = Record(99, "bad", "here", "train", 0, "alpha", Path("gone.png"), None)
    with caplog.at_level(logging.WARNING):
        with_it = train([*texts(10), bad], ChosenDraw([2, 3, 10]))
    assert "row 99" in caplog.text
    assert np.array_equal(with_it, train(texts(10), ChosenDraw([2, 3])))


def test_the_model_that_is_given_is_left_as_it_was():
    model = random_model()
    before = flatten(model)
    first = train(texts(20), ChosenDraw([1, 2]), model=model)
    assert np.array_equal(flatten(model), before)
    assert np.array_equal(first, train(texts(20), ChosenDraw([1, 2]), model=model))
    assert first.dtype == np.float32
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


# --- settings


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_only_float32_weights_are_trained_privately(precision):
    layer = nn.Linear(2, 2).to(precision)
    with pytest.raises(ConfigError, match="needs float32 weights"):
        PrivateOptimizer(
            torch.optim.SGD(layer.parameters(), lr=1.0),
            clip=1.0,
            multiplier=1.0,
            batch=1,
            noise=NoiseSource.fresh(),
        )


@pytest.mark.parametrize(("share", "expected"), [(0.5, 4.0), (2.0, 4.0), (4.0, 2.0), (20.0, 0.4)])
def test_the_step_shrinks_once_noise_is_more_than_steady(share, expected):
    training = TrainingConfig(learning_rate=4.0, steady_noise=2.0)
    assert training.step_size(share) == pytest.approx(expected)


@pytest.mark.parametrize(("names", "rate"), [(FIXED, 4.0), (TRAINED, 4.0)])
def test_training_with_little_noise_learns_words(names, rate):
    text_only = config(names).model_copy(
        update={"encoders": {Modality.TEXT: EncoderConfig(name=names[0], width=64)}}
    )
    model = build_model(text_only, 0)
    rows = [
        Record(i + 2, f"r{i}", "here", "train", i % 3, f"{WORDS[i % 3]} {WORDS[3 + i % 5]}", None, None)
        for i in range(60)
    ]
    data = RecordTensors(Path("/nonexistent"), rows, text_only)
    update = train_round(
        model,
        data,
        privacy=privacy(steps=60, noise_share=0.01, expected_batch_size=30),
        training=TrainingConfig(learning_rate=rate),
        noise=NoiseSource.fresh(),
        microbatch=32,
    )
    load_flat(model, flatten(model) + update)
    batch = data.batch(range(60))
    logits = model(batch["text"], batch["image"], batch["audio"], batch["present"])
    assert (logits.argmax(dim=1) == batch["label"]).float().mean() > 0.95
