"""Models: every encoder and fusion of the registry, under every pattern of missing modalities."""

import itertools
import json
import pickle

import numpy as np
import pytest
import torch

from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.model import AudioInput, EncoderConfig, Fusion, ImageInput, ModelConfig, TextInput
from fedfuse_shared.errors import ConfigError, DataError
from fedfuse_shared.models import (
    MODALITIES,
    REGISTRY,
    build_encoder,
    build_model,
    flatten,
    layout,
    load_flat,
    load_model,
    model_hash,
    save_model,
)

FIXED = {
    Modality.TEXT: "hashed-words",
    Modality.IMAGE: "oriented-gradients",
    Modality.AUDIO: "spectral-shape",
}
TRAINED = {Modality.TEXT: "text-conv", Modality.IMAGE: "image-conv", Modality.AUDIO: "audio-conv"}
WIDTHS = {"hashed-words": 64, "text-conv": 8, "image-conv": 8, "audio-conv": 8}
EVERY_MODEL = [(names, fusion) for names in (FIXED, TRAINED) for fusion in Fusion]


def config(names=FIXED, fusion=Fusion.CONCAT):
    return ModelConfig(
        classes=("a", "b", "c"),
        encoders={m: EncoderConfig(name=name, width=WIDTHS.get(name)) for m, name in names.items()},
        fusion=fusion,
        image=ImageInput(size=16),
        audio=AudioInput(mels=20, frames=16),
        text=TextInput(words=8),
    )


def random_model(names=FIXED, fusion=Fusion.CONCAT):
    """Return a model none of whose weights is zero."""
    model = build_model(config(names, fusion), 0)
    weights = flatten(model)
    load_flat(model, weights + np.random.default_rng(5).normal(0, 0.3, weights.size).astype(np.float32))
    return model


def random_inputs(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for m in MODALITIES:
        if m not in model.config.encoders:
            inputs.append(torch.zeros(count, 0))
            continue
        encoder = build_encoder(model.config, m)
        if encoder.dtype == torch.int64:
            inputs.append(torch.randint(0, 257, (count, *encoder.shape), generator=generator))
        else:
            inputs.append(torch.randn(count, *encoder.shape, generator=generator))
    return inputs


def test_the_registry_has_a_fixed_and_a_trained_encoder_for_every_modality():
    assert {m: set(names) for m, names in REGISTRY.items()} == {m: {FIXED[m], TRAINED[m]} for m in MODALITIES}


@pytest.mark.parametrize(("names", "fusion"), EVERY_MODEL)
def test_absent_modalities_have_no_say_in_any_subset(names, fusion):
    model = random_model(names, fusion)
    ours, others = random_inputs(model, 4, seed=1), random_inputs(model, 4, seed=2)
    seen = []
    for subset in itertools.product([False, True], repeat=3):
        present = torch.tensor([subset] * 4)
        mixed = [a if there else b for a, b, there in zip(ours, others, subset, strict=True)]
        logits = model(*ours, present)
        assert logits.shape == (4, 3)
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, model(*mixed, present))
        seen.append(logits.flatten())
    for a, b in itertools.combinations(seen, 2):  # and every modality has a say when it is present
        assert not torch.allclose(a, b)


@pytest.mark.parametrize(("names", "fusion"), EVERY_MODEL)
def test_a_record_with_nothing_gets_the_prior(names, fusion):
    model = random_model(names, fusion)
    logits = model(*random_inputs(model, 2), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.allclose(logits, model.prior.weight[:, 0].expand(2, 3))


@pytest.mark.parametrize(("names", "fusion"), EVERY_MODEL)
def test_no_layer_mixes_records_of_a_batch(names, fusion):
    model = random_model(names, fusion)
    inputs = random_inputs(model, 5)
    present = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    together = model(*inputs, present)
    for row in range(5):
        alone = model(*(x[row : row + 1] for x in inputs), present[row : row + 1])
        assert torch.allclose(together[row], alone[0], rtol=0, atol=1e-5)
    real = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    model(*inputs, torch.ones(5, 3, dtype=torch.bool))[2].sum().backward()
    for x in real:
        assert (x.grad[[0, 1, 3, 4]] == 0).all()
        assert (x.grad[2] != 0).any()


@pytest.mark.parametrize("missing", MODALITIES)
@pytest.mark.parametrize(("names", "fusion"), EVERY_MODEL)
def test_the_segments_of_an_absent_modality_have_gradient_zero(names, fusion, missing):
    model = random_model(names, fusion)
    present = torch.tensor([[m is not missing for m in MODALITIES]] * 3)
    model(*random_inputs(model, 3), present).square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    start = 0
    for segment in layout(model):
        part = gradient[start : start + segment.size]
        assert bool((part == 0).all()) == (segment.modality is missing)
        start += segment.size
    assert start == gradient.numel()


def test_a_model_may_have_any_modalities():
    for names in (
        {Modality.AUDIO: "audio-conv"},
        {Modality.IMAGE: "oriented-gradients", Modality.TEXT: "text-conv"},
    ):
        model = build_model(config(names), 0)
        assert {s.modality for s in layout(model)} == {*names, None}
        assert model(*random_inputs(model, 2), torch.ones(2, 3, dtype=torch.bool)).shape == (2, 3)


@pytest.mark.parametrize("names", [FIXED, TRAINED])
def test_initial_weights_depend_on_the_seed_alone(names):
    torch.manual_seed(1)
    first = flatten(build_model(config(names), 7))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert np.array_equal(first, flatten(build_model(config(names), 7)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(first, flatten(build_model(config(names), 8))) == (names is FIXED)


def test_the_layout_of_the_default_encoders_is_one_segment_each_and_the_head():
    model = build_model(config(), 0)
    assert [(s.name, s.size, s.modality) for s in layout(model)] == [
        ("fusion/text", 3 * 64, Modality.TEXT),
        ("fusion/image", 3 * 160, Modality.IMAGE),
        ("fusion/audio", 3 * 256, Modality.AUDIO),
        ("head", 3, None),
    ]


@pytest.mark.parametrize(("names", "fusion"), EVERY_MODEL)
def test_flat_weights_are_in_the_order_of_the_layout(names, fusion):
    model = build_model(config(names, fusion), 0)
    vector = np.arange(sum(s.size for s in layout(model)), dtype=np.float32)
    load_flat(model, vector)
    assert np.array_equal(flatten(model), vector)
    assert model.prior.weight.flatten().tolist() == vector[-3:].tolist()  # the head comes last
    vector[:] = -1
    assert flatten(model)[5] == 5  # a copy, not a view


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(3, np.float32),
        np.zeros(1443),
        np.full(1443, np.nan, np.float32),
        np.zeros((1443, 1), np.float32),
    ],
)
def test_a_vector_that_is_not_the_models_is_refused_and_changes_nothing(vector):
    model = random_model()
    before = flatten(model)
    assert before.size == 1443
    with pytest.raises(ConfigError, match="weights"):
        load_flat(model, vector)
    assert np.array_equal(flatten(model), before)


def test_the_hash_covers_weights_and_layout_and_is_pinned():
    model = build_model(config(), 0)
    vector, segments = np.arange(1443, dtype=np.float32), layout(model)
    known = model_hash(vector, segments)
    assert known == "58c25ebbd2899467800fe422c5db5729d9b5f8154b7aaf38fd10e90bff4980f3"
    assert model_hash(vector.astype(">f4"), segments) == known  # whatever the machine's byte order
    assert model_hash(vector + np.float32(1e-3), segments) != known
    assert model_hash(vector, segments[::-1]) != known


def test_a_saved_model_comes_back(tmp_path):
    model = random_model(TRAINED, Fusion.LATE)
    path = tmp_path / "model.safetensors"
    save_model(path, model.config, flatten(model), round_number=12)
    loaded, card = load_model(path)
    assert np.array_equal(flatten(loaded), flatten(model))
    assert (loaded.config, card.round, card.model_hash) == (
        model.config, 12, model_hash(flatten(model), layout(model))
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_are_not_the_cards_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, config(), np.ones(1443, np.float32), round_number=1)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="other weights than its card states"):
        load_model(path)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a model file was unpickled",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        pickle.dumps(_Trap()),
        (2**63).to_bytes(8, "little") + b"{}",
        b"\x02" + bytes(7) + b"{}",
    ],
)
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_model(path)


def test_a_missing_model_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.safetensors"):
        load_model(tmp_path / "gone.safetensors")


def test_a_card_with_unknown_fields_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, config(), np.ones(1443, np.float32), round_number=1)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"]["fedfuse"] = header["__metadata__"]["fedfuse"].replace('"round"', '"rund"')
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + size :])
    with pytest.raises(DataError, match="is not a fedfuse model"):
        load_model(path)


def test_an_unknown_encoder_is_answered_with_the_known_ones():
    bad = config({Modality.IMAGE: "hashed-words"})
    with pytest.raises(ConfigError, match="choose one of oriented-gradients, image-conv"):
        build_model(bad, 0)


def test_a_fixed_front_end_refuses_a_width_it_does_not_have():
    bad = ModelConfig(
        classes=("a", "b"), encoders={Modality.IMAGE: EncoderConfig(name="oriented-gradients", width=5)}
    )
    with pytest.raises(ConfigError, match="gives 490 features, not 5; leave width out"):
        build_model(bad, 0)
