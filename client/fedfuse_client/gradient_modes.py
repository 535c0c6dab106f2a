"""Ways to the gradients of single records: each wraps a model and answers one microbatch at a time.

None of them is trusted: :mod:`fedfuse_client.gradient_proof` compares each with plain autograd on the very model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleExpandedWeights, GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedfuse_client.gradients import Dense, PerRecord, RecordGradients
from fedfuse_client.layer_gradients import LayerGradients


class Microbatch(NamedTuple):
    """Records as a model sees them, the batch first everywhere."""

    inputs: tuple[Tensor, ...]
    """The arguments of the model's ``forward``."""
    labels: Tensor
    """Classes, ``(batch,)`` int64."""


class GradientMode(Protocol):
    """One way to per-record gradients of the summed cross entropy."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a model in train mode; its weights may change between microbatches."""

    def gradients(self, batch: Microbatch) -> Sequence[PerRecord]:
        """Return the gradients with respect to each parameter, in the order of ``model.parameters()``."""


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each record's loss, ``(batch, classes)`` and ``(batch,)`` ``-> (batch,)``."""
    return functional.cross_entropy(logits, labels, reduction="none")


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        # Features need no gradient, and torch remarks on it at every backward pass.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _backward(loss: Tensor) -> None:
    with _quietly():
        loss.backward()  # type: ignore[no-untyped-call]


class FactoredHooks:
    """Opacus' hooks, with linear layers kept in factors (:class:`RecordGradients`)."""

    def __init__(self, model: nn.Module) -> None:
        self._wrapped = RecordGradients(model)

    def gradients(self, batch: Microbatch) -> Sequence[PerRecord]:
        """Return the gradients with respect to each parameter."""
        _backward(losses(self._wrapped(*batch.inputs), batch.labels).sum())
        return self._wrapped.take()


class LayerRules:
    """Opacus' rule for each kind of layer, without a whole backward pass (:class:`LayerGradients`)."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = LayerGradients(model)

    def gradients(self, batch: Microbatch) -> Sequence[PerRecord]:
        """Return the gradients with respect to each parameter."""
        return self._layers.take(losses(self._layers.forward(batch.inputs), batch.labels).sum())


class _Opacus:
    """A wrapper of Opacus' that leaves whole gradients in ``grad_sample``."""

    wrapper: type[Any]

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wrapped = self.wrapper(model, loss_reduction="sum")

    def gradients(self, batch: Microbatch) -> Sequence[PerRecord]:
        """Return the gradients with respect to each parameter."""
        _backward(losses(self._wrapped(*batch.inputs), batch.labels).sum())
        taken: list[PerRecord] = []
        parameter: Any
        for parameter in self._model.parameters():
            taken.append(Dense(parameter.grad_sample))
            parameter.grad_sample = parameter.grad = None
        return taken


class Hooks(_Opacus):
    """Opacus' default: hooks that build every gradient from a layer's input and the gradient of its output."""

    wrapper = GradSampleModule


class ExpandedWeights(_Opacus):
    """PyTorch's expanded weights: each parameter expanded along the batch, with a rule for each function."""

    wrapper = GradSampleModuleExpandedWeights


class Functional:
    """The gradient of one record's loss, vectorised over records by torch.func."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor], inputs: tuple[Tensor, ...], label: Tensor) -> Tensor:
            logits = functional_call(model, parameters, tuple(each[None] for each in inputs))
            return functional.cross_entropy(logits, label[None])

        self._each = vmap(grad(loss), in_dims=(None, 0, 0))

    def gradients(self, batch: Microbatch) -> Sequence[PerRecord]:
        """Return the gradients with respect to each parameter."""
        found = self._each({n: p.detach() for n, p in self._parameters.items()}, batch.inputs, batch.labels)
        return [Dense(found[name]) for name in self._parameters]


class GhostClipping:
    """Norms without gradients (Li et al. 2022, section 4) by Opacus, and the weighted sum by a second pass.

    The norm is not taken from the very numbers that are summed, and the sum is the backward pass's own. In float32
    either would break the promise that one record moves the sum by no more than the clip norm, so both passes run in
    float64, on a copy.
    """

    precision = torch.float64

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._double = copy.deepcopy(model).to(self.precision)
        self._wrapped = GradSampleModuleFastGradientClipping(self._double, loss_reduction="sum")

    def gradients(self, batch: Microbatch) -> Sequence[PerRecord]:
        """Return the gradients with respect to each parameter, which are never formed."""
        with torch.no_grad():
            for wide, narrow in zip(self._double.parameters(), self._model.parameters(), strict=True):
                wide.copy_(narrow)
        inputs = tuple(each.to(self.precision) if each.is_floating_point() else each for each in batch.inputs)
        self._wrapped.enable_hooks()
        _backward(losses(self._wrapped(*inputs), batch.labels).sum())
        second = _SecondPass(self._wrapped, Microbatch(inputs, batch.labels))
        taken: list[PerRecord] = []
        parameter: Any
        for index, parameter in enumerate(self._double.parameters()):
            taken.append(_Ghost(parameter._norm_sample, second, index))  # noqa: SLF001 - Opacus' result
            parameter._norm_sample = parameter.grad = None  # noqa: SLF001
        return taken


class _SecondPass:
    """The weighted sums with respect to all parameters, from one more pass for each choice of weights."""

    def __init__(self, wrapped: Any, batch: Microbatch) -> None:
        self._wrapped = wrapped
        self._batch = batch
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def sums(self, weights: Tensor) -> tuple[Tensor, ...]:
        if self._last is None or self._last[0] is not weights:
            self._last = weights, self._pass(weights)
        return self._last[1]

    def _pass(self, weights: Tensor) -> tuple[Tensor, ...]:
        # Weight 0 does not silence NaN in a backward pass: such a record's inputs must go.
        inputs = tuple(
            each.masked_fill(~(weights > 0).view(-1, *[1] * (each.dim() - 1)), 0)
            for each in self._batch.inputs
        )
        self._wrapped.disable_hooks()
        loss = losses(self._wrapped(*inputs), self._batch.labels).to(weights.dtype) @ weights
        with _quietly():
            found: tuple[Tensor, ...] = torch.autograd.grad(loss, list(self._wrapped.parameters()))
        return found


@dataclass(frozen=True, slots=True)
class _Ghost:
    """One parameter's share of what ghost clipping knows."""

    norms: Tensor
    second: _SecondPass
    index: int

    def squared_norms(self) -> Tensor:
        return self.norms.square()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.second.sums(weights)[self.index]


MODES: Final[Mapping[str, type[GradientMode]]] = MappingProxyType(
    {
        "layers": LayerRules,
        "factored": FactoredHooks,
        "hooks": Hooks,
        "expanded": ExpandedWeights,
        "functorch": Functional,
        "ghost": GhostClipping,
    }
)
"""Every mode by name, in the order they are tried."""
