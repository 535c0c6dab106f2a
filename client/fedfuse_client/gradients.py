"""Per-record gradients by Opacus, kept in factors where a layer allows it.

The gradient of one record with respect to the matrix of a linear layer is the outer product of two vectors. Its
norm is the product of their norms, and a weighted sum over records is one matrix product, so the products themselves
are never formed (Goodfellow 2015, "Efficient per-example gradient computations"). Every other layer goes by Opacus'
hooks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional


class PerRecord(Protocol):
    """The gradients of a batch of records with respect to one parameter."""

    def squared_norms(self) -> Tensor:
        """Return each record's squared L2 norm, ``(batch,)`` float64; not finite where the gradient is not."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return the sum of all gradients times ``weights`` ``(batch,)``, in float64; weight 0 silences even NaN."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Gradients as they are, ``(batch, *parameter)``."""

    rows: Tensor

    def squared_norms(self) -> Tensor:
        """Return each record's squared L2 norm, ``(batch,)``."""
        return _squared_norms(self.rows.flatten(1))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return the weighted sum, of the parameter's shape."""
        rows = _silenced(self.rows.flatten(1), weights)
        return (weights @ rows).view(self.rows.shape[1:])


class Factored:
    """Gradients as outer products of ``left`` ``(batch, outputs)`` and ``right`` ``(batch, inputs)``."""

    __slots__ = ("_norms", "_wide", "left", "right")

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left = left
        self.right = right
        # Widened once, for norms and sums alike.
        self._wide = left.to(torch.float64), right.to(torch.float64)
        self._norms = tuple(map(_squared_norms, self._wide))

    def squared_norms(self) -> Tensor:
        """Return each record's squared L2 norm, ``(batch,)``."""
        return self._norms[0] * self._norms[1]

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return the weighted sum, ``(outputs, inputs)``."""
        left, right = self._wide
        left = left * weights[:, None]
        # Zeros silence what is finite, as nearly all is: then the large factor need not be copied.
        if not math.isfinite(float(self._norms[0].sum() + self._norms[1].sum())):
            silent = ~(weights > 0)[:, None]
            left, right = left.masked_fill(silent, 0.0), right.masked_fill(silent, 0.0)
        # Matrix kernels take outputs by fours, and longest over what is left: ten cost more than twelve.
        outputs = left.shape[1]
        return (functional.pad(left, (0, -outputs % 4)).T @ right)[:outputs]


def _squared_norms(rows: Tensor) -> Tensor:
    # Widened as it is read: a float64 copy of all rows costs twenty times as long.
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


def _silenced(rows: Tensor, weights: Tensor) -> Tensor:
    wide = rows.to(torch.float64)
    return wide.index_fill_(0, (~(weights > 0)).nonzero().flatten(), 0.0)


class RecordGradients(GradSampleModule):  # type: ignore[misc]
    """Opacus' wrapper for losses summed over records, with linear layers kept in factors.

    After ``backward``, :meth:`take` gives the gradients of the records of the last forward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, loss_reduction="sum")

    def capture_backprops_hook(
        self,
        module: Any,
        forward_input: Any,
        forward_output: Any,
        *,
        loss_reduction: str,
        batch_first: bool,
    ) -> None:
        """Keep the factors of a linear layer used once on one vector a record; leave the rest to Opacus."""
        if not (self.hooks_enabled and _once_on_vectors(module, forward_output[0])):
            super().capture_backprops_hook(
                module, forward_input, forward_output, loss_reduction=loss_reduction, batch_first=batch_first
            )
            return
        (right,) = module.activations.pop()
        left = forward_output[0].detach()
        module.weight.grad_sample = Factored(left, right)
        if module.bias is not None:
            module.bias.grad_sample = left
        parameter: Any
        for parameter in module.parameters(recurse=False):
            parameter._forward_counter -= 1  # noqa: SLF001

    def take(self) -> list[PerRecord]:
        """Return the gradients with respect to each parameter, in order, and forget them."""
        taken: list[PerRecord] = []
        for parameter in self.parameters():
            found = parameter.grad_sample
            taken.append(found if isinstance(found, Factored) else Dense(found))
            parameter.grad_sample = None
        return taken


def _once_on_vectors(module: Any, backprops: Tensor) -> bool:
    """Return whether a layer is linear and had one use, on one vector a record, in the forward pass."""
    if type(module) is not nn.Linear or backprops.dim() != 2:
        return False
    # Opacus counts a parameter's uses down as backward goes through them, and sums over them as it goes.
    weight: Any = module.weight
    return weight._forward_counter == 1 and not hasattr(weight, "_current_grad_sample")  # noqa: SLF001
