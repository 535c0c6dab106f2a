"""Per-record gradients by Opacus, kept in factors where a layer allows it.

The gradient of one record with respect to the matrix of a linear layer is the outer product of two vectors. Its
norm is the product of their norms, and a weighted sum over records is one matrix product, so the products themselves
are never formed (Goodfellow 2015, "Efficient per-example gradient computations"). Every other layer goes by Opacus'
hooks.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from opacus import GradSampleModule
from torch import Tensor, nn


class PerRecord(Protocol):
    """The gradients of a batch of records with respect to one parameter."""

    def squared_norms(self) -> Tensor:
        """Return each record's squared L2 norm, ``(batch,)`` float64; not finite where the gradient is not."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return the sum of all gradients times ``weights`` ``(batch,)``, in float64; weight 0 silences even NaN."""


class Dense:
    """Gradients as they are, ``(batch, *parameter)``."""

    __slots__ = ("_norms", "rows")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._norms: Tensor | None = None

    def squared_norms(self) -> Tensor:
        """Return each record's squared L2 norm, ``(batch,)``."""
        if self._norms is None:
            self._norms = _squared_norms(self.rows.flatten(1))
        return self._norms

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return the weighted sum, of the parameter's shape."""
        wide = self.rows.flatten(1).to(torch.float64)
        # Zeros silence what is finite, as nearly all is.
        if not math.isfinite(float(self.squared_norms().sum())):
            wide = wide.index_fill_(0, (~(weights > 0)).nonzero().flatten(), 0.0)
        return (weights @ wide).view(self.rows.shape[1:])


class Factored:
    """Gradients as outer products of ``left`` ``(batch, outputs)`` and ``right`` ``(batch, inputs)``.

    Args:
        left: Gradients of the outputs.
        right: The inputs.
        room: Float64 memory of ``right``'s shape that nobody else uses while this is in use; else new memory, which
            costs as long as the widening itself.
    """

    __slots__ = ("_norms", "_wide", "left", "right")

    def __init__(self, left: Tensor, right: Tensor, room: Tensor | None = None) -> None:
        self.left = left
        self.right = right
        # Widened once, for norms and sums alike.
        wide = right.to(torch.float64) if room is None else room.copy_(right)
        self._wide = left.to(torch.float64), wide
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
        # By numpy: its OpenBLAS took four fifths of the time of torch's MKL (measured on an AMD EPYC).
        return torch.from_numpy(left.numpy().T @ right.numpy())


def _squared_norms(rows: Tensor) -> Tensor:
    # Widened as it is read: a float64 copy of all rows costs twenty times as long.
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


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
