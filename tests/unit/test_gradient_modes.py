"""Every way to per-record gradients: proven on the shipped models, refused where it is wrong, chosen by speed."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedfuse_client import gradient_choice
from fedfuse_client.data.cells import Record
from fedfuse_client.data.tensors import RecordTensors
from fedfuse_client.gradient_choice import FASTEST, choice_for, choose
from fedfuse_client.gradient_modes import MODES, GhostClipping, Hooks, LayerRules, Microbatch, losses
from fedfuse_client.gradient_proof import Disproof, prove, reference
from fedfuse_client.gradients import Dense
from fedfuse_client.synthetic import microbatch, shaken
from fedfuse_client.training import train_round
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import TrainingConfig
from fedfuse_shared.config.model import AudioInput, EncoderConfig, Fusion, ImageInput, ModelConfig, TextInput
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.models import MODALITIES, REGISTRY, build_model
from fedfuse_shared.offer import RoundPrivacy
from fedfuse_shared.privacy.noise import NoiseSource

pytestmark = pytest.mark.slow

SHIPPED = [(m, name) for m in MODALITIES for name in REGISTRY[m]]
COUNT = 16


def config(encoders, fusion=Fusion.CONCAT):
    return ModelConfig(
        classes=("a", "b", "c"),
        encoders={m: EncoderConfig(name=name) for m, name in encoders},
        fusion=fusion,
        image=ImageInput(size=16),
        audio=AudioInput(mels=20, frames=16),
        text=TextInput(words=8),
    )


HEADS = config([pair for pair in SHIPPED if "conv" not in pair[1]])
TRAINED = config([pair for pair in SHIPPED if "conv" in pair[1]])


def known(model, count=COUNT, settings=HEADS):
    return reference(model, microbatch(settings, count, 2), microbatch(settings, count, 3))


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(gradient_choice, "_chosen", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models are fastest with one
    yield
    torch.set_num_threads(threads)


# --- every mode on every shipped model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fusion", Fusion)
@pytest.mark.parametrize("settings", [HEADS, TRAINED], ids=["heads", "trained"])
def test_every_mode_is_proven_for_the_shipped_models(settings, fusion, mode):
    settings = settings.model_copy(update={"fusion": fusion})
    prove(mode, known(build_model(settings, 0), settings=settings))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("encoder", SHIPPED, ids=[name for _, name in SHIPPED])
def test_every_mode_is_proven_for_each_encoder_alone(encoder, mode):
    settings = config([encoder])
    prove(mode, known(build_model(settings, 0), settings=settings))


def test_the_reference_is_autograd_of_each_record_alone():
    model = build_model(TRAINED, 0)
    made = known(model, 6, TRAINED)
    rows = []
    for row in range(6):
        made.model.zero_grad()
        logits = made.model(*(each[row : row + 1] for each in made.batch.inputs))
        functional.cross_entropy(logits, made.batch.labels[row : row + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]).double())
    rows = torch.stack(rows)
    assert torch.allclose(made.norms, rows.norm(dim=1), rtol=1e-12)
    assert torch.allclose(made.sums, made.weights @ rows, rtol=1e-9, atol=1e-12)
    assert torch.equal(made.first, rows[0])
    assert (made.weights[1] == 0).any()
    assert (made.weights[0] > 0).all()


def test_synthetic_records_go_through_every_subset_and_leave_torchs_generator_alone():
    state = torch.random.get_rng_state()
    batch = microbatch(TRAINED, 16, 0)
    shaken(build_model(TRAINED, 0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len({tuple(row.tolist()) for row in batch.inputs[3]}) == 8
    for column in range(3):
        absent = ~batch.inputs[3][:, column]
        assert not batch.inputs[column][absent].any()
        assert batch.inputs[column][~absent].flatten(1).any(dim=1).all()
    assert not torch.equal(batch.inputs[1], microbatch(TRAINED, 16, 1).inputs[1])


def test_a_shaken_model_has_a_gradient_everywhere():
    batch = microbatch(TRAINED, COUNT, 0)
    for model, expected in ((build_model(TRAINED, 0), False), (shaken(build_model(TRAINED, 0)), True)):
        losses(model(*batch.inputs), batch.labels).sum().backward()
        assert all(p.grad.any() for p in model.parameters()) is expected


# --- modes that are wrong are refused


class Halved(Hooks):
    """As if the loss were averaged over two records."""

    def gradients(self, batch):
        return [Dense(each.rows / 2) for each in super().gradients(batch)]


class Swapped(LayerRules):
    """Clips by the norm of one record what another adds."""

    def gradients(self, batch):
        taken = super().gradients(batch)
        last = taken[-1]
        return [*taken[:-1], Dense(last.right.flip(0)[:, :1] * last.left.flip(0))]


class Forgetful(Hooks):
    """Leaves out one parameter of one record."""

    def gradients(self, batch):
        taken = super().gradients(batch)
        taken[0].rows[6] = 0  # which has all that the parameter sees
        return taken


class Understated(Dense):
    """Says that a norm is a little smaller than it is, by less than any test of accuracy would notice."""

    def squared_norms(self):
        return super().squared_norms() * (1 - 2**-20)


class Understating(Hooks):
    def gradients(self, batch):
        return [Understated(each.rows) for each in super().gradients(batch)]


class Leaking(Dense):
    """Multiplies by weight 0 what is not finite."""

    def weighted_sum(self, weights):
        return (weights @ self.rows.flatten(1).double()).view(self.rows.shape[1:])


class Leaky(Hooks):
    def gradients(self, batch):
        return [Leaking(each.rows) for each in super().gradients(batch)]


class Narrow(Dense):
    """Sums in float32 and widens the sum."""

    def weighted_sum(self, weights):
        rows = torch.where(weights[:, None] > 0, self.rows.flatten(1), 0.0)
        return (weights.float() @ rows).view(self.rows.shape[1:]).double()


class Narrowed(Hooks):
    def gradients(self, batch):
        return [Narrow(each.rows) for each in super().gradients(batch)]


class Mixed(Hooks):
    """Centres gradients over the batch by an amount that no tolerance notices."""

    def gradients(self, batch):
        return [Dense(each.rows + 1e-6 * each.rows.nanmean(dim=0)) for each in super().gradients(batch)]


class Stale(Hooks):
    """Answers with what it found the first time."""

    found = None

    def gradients(self, batch):
        self.found = self.found or super().gradients(batch)
        return self.found


class SinglePrecisionGhost(GhostClipping):
    """Ghost clipping as it is usually done."""

    precision = torch.float32


class Widened:
    def __init__(self, each):
        self.squared_norms = lambda: each.squared_norms().double()
        self.weighted_sum = lambda weights: each.weighted_sum(weights).double()


class WidenedGhost(SinglePrecisionGhost):
    """The same with its results in float64, which is too late."""

    def gradients(self, batch):
        return [Widened(each) for each in super().gradients(batch)]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (Halved, "norms differs"),
        (Swapped, "differs"),
        (Forgetful, "norms differs"),
        (Understating, "norm of what is summed differs"),
        (Leaky, "changes with its batch-mates"),
        (Narrowed, "sum's precision differs"),
        (Mixed, "changes with its batch-mates"),
        (SinglePrecisionGhost, "sums are not float64"),
        (WidenedGhost, "norm of what is summed differs"),
        (Stale, "gradient in the next microbatch differs"),
    ],
)
def test_a_mode_that_is_wrong_in_one_respect_is_refused(monkeypatch, mode, reason):
    monkeypatch.setattr("fedfuse_client.gradient_proof.MODES", {"wrong": mode})
    with pytest.raises(Disproof, match=reason):
        prove("wrong", known(build_model(HEADS, 0)))


class Toy(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.middle = middle
        self.last = nn.Linear(6, 3)

    def forward(self, values):
        return self.last(self.middle(self.first(values)))


def toy_batches(count=8):
    generator = torch.Generator().manual_seed(0)
    return [
        Microbatch(
            (torch.randn(count, 5, generator=generator),), torch.randint(0, 3, (count,), generator=generator)
        )
        for _ in range(2)
    ]


def test_an_output_changed_in_place_is_noticed_and_another_mode_is_used():
    """Layers' outputs are then not what autograd is asked about: a silent mistake that only the proof finds."""
    model = Toy(nn.Tanh())
    model.middle.forward = lambda values: values.mul_(2.0)
    made = reference(model, *toy_batches())
    with pytest.raises(Disproof, match="differs"):
        prove("layers", made)
    assert choose(model, *toy_batches()).name != "layers"


class Scale(nn.Module):
    """A layer no library has a rule for, with a parameter outside every known layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, values):
        return values * self.scale


def test_a_layer_without_a_rule_is_refused_by_some_modes_and_proven_for_others():
    made = reference(Toy(Scale()), *toy_batches())
    with pytest.raises(
        Disproof, match=r"cannot be applied \(NotImplementedError: no rule for the layer Scale\)"
    ):
        prove("layers", made)
    prove("functorch", made)
    assert choose(Toy(Scale()), *toy_batches()).name in MODES


def test_a_layer_used_twice_is_summed():
    layer = nn.Linear(6, 6)
    made = reference(Toy(nn.Sequential(layer, nn.Tanh(), layer)), *toy_batches())
    for name in ("layers", "factored", "hooks", "functorch"):
        prove(name, made)


def test_without_any_mode_the_error_says_why_of_each():
    with pytest.raises(ConfigError) as refused:
        choose(Toy(nn.Dropout(0.5)), *toy_batches())  # random masks: no record has one gradient
    for name in MODES:
        assert f"{name}: " in str(refused.value)
    assert "no gradient mode gives this model's per-record gradients" in str(refused.value)


# --- choice


def test_the_choice_is_made_once_for_a_model_and_a_microbatch_and_logged(monkeypatch, caplog):
    made = []
    monkeypatch.setattr(
        gradient_choice, "choose", lambda *args, real=choose: made.append(args) or real(*args)
    )
    with caplog.at_level(logging.INFO, "fedfuse_client"):
        first = choice_for(build_model(HEADS, 0), 8)
        assert choice_for(build_model(HEADS, 1), 8) is first
        assert len(made) == 1
        choice_for(build_model(HEADS, 0), 4)
        choice_for(build_model(TRAINED, 0), 8)
    assert len(made) == 3
    assert "gradients by mode" in caplog.text
    assert "microbatches of 4" in caplog.text


def test_a_named_mode_must_be_proven_too():
    assert choice_for(build_model(HEADS, 0), 8, "ghost").mode is GhostClipping
    with pytest.raises(ConfigError, match="layers: cannot be applied"):
        choose(Toy(Scale()), *toy_batches(), "layers")


def test_an_unknown_mode_is_refused_with_the_ones_there_are():
    with pytest.raises(ConfigError, match="there is no gradient mode 'quick'; choose one of fastest, layers"):
        choice_for(build_model(HEADS, 0), 8, "quick")


def test_the_fastest_that_passes_is_chosen_not_the_fastest(monkeypatch):
    class Quick(LayerRules):
        def gradients(self, batch):
            return [Dense(torch.zeros(len(batch.labels), *p.shape)) for p in self._layers._model.parameters()]

    modes = {"ghost": MODES["ghost"], "layers": LayerRules, "quick": Quick}
    for place in ("gradient_choice", "gradient_proof", "row_proof"):
        monkeypatch.setattr(f"fedfuse_client.{place}.MODES", modes)
    monkeypatch.setattr(gradient_choice, "_by_speed", lambda *_: ["quick", "layers", "ghost"])
    found = choose(build_model(HEADS, 0), microbatch(HEADS, 8, 2), microbatch(HEADS, 8, 3))
    assert found.name == "layers"


def test_modes_are_ordered_by_the_time_they_take(monkeypatch):
    took = {"layers": 0.3, "factored": 0.1, "hooks": 9.0, "expanded": 0.2, "functorch": 0.15, "ghost": 8.0}
    kinds = {kind: name for name, kind in MODES.items()}
    monkeypatch.setattr(gradient_choice, "_timed", lambda mode, batch: took[kinds[type(mode)]])
    order = gradient_choice._by_speed(build_model(HEADS, 0), microbatch(HEADS, 8, 2))
    assert order == ["factored", "functorch", "expanded", "layers", "ghost", "hooks"]


# --- training


def train(model, gradients):
    records = [Record(i + 2, f"r{i}", "x", "train", i % 3, f"one {i}", None, None) for i in range(20)]
    privacy = RoundPrivacy(
        trust=Trust.SITE,
        sampling_rate=0.5,
        steps=2,
        clip=1.0,
        noise_multiplier=1.0,
        noise_share=1.0,
        noise_sites=1,
        expected_batch_size=8,
        delta=1e-5,
    )
    return train_round(
        model,
        RecordTensors(Path("/nonexistent"), records, model.config),
        privacy=privacy,
        training=TrainingConfig(learning_rate=1.0),
        noise=NoiseSource(bytes(16)),
        microbatch=8,
        gradients=gradients,
    )


@pytest.mark.parametrize("settings", [HEADS, TRAINED], ids=["heads", "trained"])
def test_which_mode_is_used_changes_an_update_by_rounding_alone(settings):
    model = shaken(build_model(settings, 0)).eval()
    updates = {name: train(copy.deepcopy(model), name) for name in MODES}
    scale = np.linalg.norm(updates["hooks"])
    for update in updates.values():
        assert np.linalg.norm(update - updates["hooks"]) < 1e-5 * scale
    assert np.array_equal(updates["layers"], train(copy.deepcopy(model), "layers"))


def test_a_round_with_a_model_that_mixes_records_is_refused_also_after_a_good_one_of_the_same_settings():
    model = build_model(config([(Modality.IMAGE, "image-conv")]), 0)
    choice_for(model, 8)
    model.encoders["image"].layers[1] = nn.BatchNorm2d(16)
    with pytest.raises(
        ConfigError, match=r"submodule encoders\.image\.layers\.1 \(BatchNorm2d\) mixes records"
    ):
        train(model, FASTEST)
