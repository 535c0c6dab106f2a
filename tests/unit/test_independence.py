"""Layers that mix records, or remember them, are refused by what they do; layers that do neither are not."""

import pytest
import torch
from torch import nn

from fedfuse_client.gradient_modes import Microbatch
from fedfuse_client.independence import check_independence, exchanged, splits
from fedfuse_shared.errors import ConfigError

pytestmark = pytest.mark.slow

COUNT, WIDTH, LENGTH = 8, 6, 5


class Scaled(nn.Module):
    """Takes something of the batch away from every record."""

    def __init__(self, of_batch):
        super().__init__()
        self.of_batch = of_batch

    def forward(self, values):
        return values - self.of_batch(values)


class Attention(nn.Module):
    """Self-attention over (batch, length, width)."""

    def __init__(self, *, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, values):
        return self.attention(values, values, values, need_weights=False)[0]


class Turned(Attention):
    """The same with the batch on the axis that attention without ``batch_first`` expects."""

    def forward(self, values):
        return super().forward(values.transpose(0, 1)).transpose(0, 1)


class Remembers(nn.Module):
    """Adds the mean of the previous batch, which no buffer shows."""

    last = 0.0

    def forward(self, values):
        before, self.last = self.last, values.detach().mean()
        return values + before


class Counts(nn.Module):
    """Keeps a running mean that changes no output in train mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, values):
        self.seen.mul_(0.9).add_(values.detach().mean(dim=0), alpha=0.1)
        return values


class MixesBackward(torch.autograd.Function):
    """The identity, whose gradient is centred over the batch."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(dim=0)


class Centred(nn.Module):
    def forward(self, values):
        return MixesBackward.apply(values)


class Net(nn.Module):
    """A model with the layer under test inside it, at ``body.middle``."""

    def __init__(self, layer, shape):
        super().__init__()
        self.body = nn.ModuleDict({"before": nn.Linear(shape[-1], shape[-1]), "middle": layer})
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, values):
        hidden = self.body["middle"](self.body["before"](values).tanh())
        return self.head(hidden.flatten(2).mean(dim=1) if hidden.dim() > 2 else hidden)


def check(model, shape=(WIDTH,), count=COUNT):
    generator = torch.Generator().manual_seed(4)
    batch, other = (
        Microbatch(
            (torch.randn(count, *shape, generator=generator),),
            torch.randint(0, 3, (count,), generator=generator),
        )
        for _ in range(2)
    )
    check_independence(model, batch, other)


MIXING = {
    "batch normalisation": (nn.BatchNorm1d(WIDTH), (WIDTH,)),
    "batch normalisation without statistics": (nn.BatchNorm1d(WIDTH, track_running_stats=False), (WIDTH,)),
    "the batch mean": (Scaled(lambda values: values.mean(dim=0)), (WIDTH,)),
    "the first record": (Scaled(lambda values: values[:1]), (WIDTH,)),
    "the neighbour": (Scaled(lambda values: values.roll(1, 0)), (WIDTH,)),
    "one pair of rows": (
        Scaled(lambda values: torch.cat([values[:6] * 0, values[2:3], values[7:] * 0])),
        (WIDTH,),
    ),
    "a faint mean": (Scaled(lambda values: 1e-5 * values.mean(dim=0)), (WIDTH,)),
    "the largest of the batch": (Scaled(lambda values: values.max(dim=0).values), (WIDTH,)),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_layer_that_mixes_records_is_refused_and_named(name):
    layer, shape = MIXING[name]
    with pytest.raises(ConfigError, match=r"submodule body\.middle \(\w+\) mixes records of a batch"):
        check(Net(layer, shape), shape)


def test_attention_along_the_batch_is_refused_and_named_and_along_the_sequence_is_not():
    torch.manual_seed(0)
    shape = (LENGTH, WIDTH)
    with pytest.raises(ConfigError, match=r"submodule body\.middle\.attention \(MultiheadAttention\) mixes"):
        check(Net(Attention(batch_first=False), shape), shape)
    check(Net(Attention(batch_first=True), shape), shape)
    check(Net(Turned(batch_first=False), shape), shape)


def test_the_innermost_submodule_is_named_and_not_what_comes_after_it():
    net = Net(nn.Sequential(nn.Tanh(), nn.Sequential(nn.Tanh(), nn.BatchNorm1d(WIDTH)), nn.Tanh()), (WIDTH,))
    with pytest.raises(ConfigError, match=r"submodule body\.middle\.1\.1 \(BatchNorm1d\) mixes"):
        check(net)


def test_a_model_that_mixes_outside_its_submodules_is_named_itself():
    class Mixing(Net):
        def forward(self, values):
            logits = super().forward(values)
            return logits - logits.mean(dim=0)

    with pytest.raises(ConfigError, match=r"submodule \(the model itself\) \(Mixing\) mixes"):
        check(Mixing(nn.Tanh(), (WIDTH,)))


def test_a_layer_that_mixes_gradients_alone_is_refused_and_named():
    with pytest.raises(ConfigError, match=r"submodule body\.middle \(Centred\) mixes records"):
        check(Net(Centred(), (WIDTH,)))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.InstanceNorm1d(LENGTH, track_running_stats=True), r"InstanceNorm1d\) carries .* in running_mean"),
        (Counts(), r"Counts\) carries .* in seen"),
    ],
)
def test_running_statistics_are_refused(layer, named):
    shape = (WIDTH,) if isinstance(layer, Counts) else (LENGTH, WIDTH)
    with pytest.raises(ConfigError, match=rf"submodule body\.middle \({named}"):
        check(Net(layer, shape), shape)


def test_memory_that_is_no_buffer_is_refused_and_named():
    with pytest.raises(ConfigError, match=r"submodule body\.middle \(Remembers\) carries information"):
        check(Net(Remembers(), (WIDTH,)))


class Tokens(nn.Module):
    """Folds batch and length into one axis for a while, and has a width equal to the batch."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(WIDTH, COUNT)
        self.back = nn.Linear(COUNT, WIDTH)

    def forward(self, values):
        return self.back(self.wide(values.flatten(0, 1)).relu()).view(values.shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.GroupNorm(2, WIDTH), (WIDTH,)),
        (nn.LayerNorm(WIDTH), (WIDTH,)),
        (nn.Dropout(0.5), (WIDTH,)),
        (nn.InstanceNorm1d(LENGTH), (LENGTH, WIDTH)),
        (nn.Conv1d(LENGTH, LENGTH, 3, padding=1), (LENGTH, WIDTH)),
        (Tokens(), (LENGTH, WIDTH)),
    ],
)
@pytest.mark.parametrize("count", [2, 7, COUNT])
def test_layers_that_treat_each_record_alone_pass(layer, shape, count):
    check(Net(layer, shape), shape, count)


def test_the_model_and_torchs_generator_are_left_as_they_were():
    model = Net(nn.Dropout(0.5), (WIDTH,)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    check(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("count", [2, 3, 8, 13])
def test_for_any_two_rows_one_split_keeps_just_the_first(count):
    found = torch.zeros(count, count, dtype=torch.bool)
    for kept in splits(count):
        found |= kept[:, None] & ~kept[None, :]
    assert torch.equal(found, ~torch.eye(count, dtype=torch.bool))


def test_an_exchange_keeps_the_rows_it_names_and_replaces_all_others():
    mine, theirs = (Microbatch((torch.full((4, 2, 3), x),), torch.full((4,), int(x))) for x in (1.0, 2.0))
    mixed = exchanged(mine, theirs, torch.tensor([True, False, False, True]))
    assert mixed.inputs[0][:, 0, 0].tolist() == [1.0, 2.0, 2.0, 1.0]
    assert mixed.labels.tolist() == [1, 2, 2, 1]
