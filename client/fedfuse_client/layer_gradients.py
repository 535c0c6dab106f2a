"""Per-record gradients from each layer's input and the gradient of its output, and nothing more.

Hooks on a backward pass get the same numbers, but the pass then also computes the summed gradient of every parameter,
which is thrown away. Asking autograd for the gradients of the layers' outputs alone leaves that out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from fedfuse_client.gradients import Dense, Factored, PerRecord


@dataclass(frozen=True, slots=True)
class _Use:
    """One call of a layer that has parameters of its own."""

    layer: nn.Module
    given: Tensor
    output: Tensor


class LayerGradients:
    """Watches the layers of a model in its forward pass, and applies Opacus' rule for each kind of layer.

    A linear layer used once on one vector a record is kept in factors. What this does not understand, such as an
    output that is changed in place afterwards, it gets wrong or refuses: prove it for a model before use.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._uses: list[_Use] = []
        self._rooms: dict[nn.Module, Tensor] = {}
        """Where a linear layer's inputs are widened, kept from one microbatch to the next."""
        for layer in model.modules():
            if any(True for _ in layer.parameters(recurse=False)):
                layer.register_forward_hook(self._watch)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the logits of a microbatch, ``(batch, classes)``."""
        self._uses.clear()
        logits: Tensor = self._model(*inputs)
        return logits

    def take(self, loss: Tensor) -> list[PerRecord]:
        """Return the gradients of a summed loss with respect to each parameter, in order, and forget the pass.

        They are good until the next call, which uses their memory again.

        Raises:
            NotImplementedError: a layer of a kind there is no rule for, or a parameter outside the layers.
        """
        uses, self._uses = self._uses, []
        lefts = torch.autograd.grad(loss, [use.output for use in uses])
        calls: dict[int, int] = {}
        for use in uses:
            for parameter in use.layer.parameters(recurse=False):
                calls[id(parameter)] = calls.get(id(parameter), 0) + 1
        found: dict[int, PerRecord] = {}
        for use, left in zip(uses, lefts, strict=True):
            once = all(calls[id(parameter)] == 1 for parameter in use.layer.parameters(recurse=False))
            for key, each in self._by_rule(use, left, factored=once).items():
                known = found.get(id(key))
                if isinstance(known, Dense) and isinstance(each, Dense):
                    found[id(key)] = Dense(known.rows + each.rows)
                else:
                    found[id(key)] = each
        missing = [name for name, parameter in self._parameters.items() if id(parameter) not in found]
        if missing:
            raise NotImplementedError(f"no layer was seen to use {missing[0]}")
        return [found[id(parameter)] for parameter in self._parameters.values()]

    def _by_rule(self, use: _Use, left: Tensor, *, factored: bool) -> dict[Tensor, PerRecord]:
        layer = use.layer
        if factored and type(layer) is nn.Linear and left.dim() == 2:
            made: dict[Tensor, PerRecord] = {layer.weight: Factored(left, use.given, self._room(use))}
            if layer.bias is not None:
                made[layer.bias] = Dense(left)
            return made
        rule = GradSampleModule.GRAD_SAMPLERS.get(type(layer))
        if rule is None:
            raise NotImplementedError(f"no rule for the layer {type(layer).__name__}")
        return {parameter: Dense(rows) for parameter, rows in rule(layer, [use.given], left).items()}

    def _room(self, use: _Use) -> Tensor:
        rows, columns = use.given.shape
        room = self._rooms.get(use.layer)
        if room is None or len(room) < rows or room.shape[1] != columns:
            room = self._rooms[use.layer] = torch.empty(rows, columns, dtype=torch.float64)
        return room[:rows]

    def _watch(self, layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self._uses.append(_Use(layer, given[0].detach(), output))
