"""Whether a gradient mode is right for one model: against plain autograd, and in what the clip norm relies on.

Per-sample autograd, one record at a time, is the definition (Abadi et al. 2016, Algorithm 1); float32 arithmetic in
another order may differ from it by ``TOLERANCE``. What the guarantee rests on has no such room: the norm must be that
of what is summed, sums must be float64 and additive (``EXACT``), and neither batch-mates nor a record that is not
finite may change another's part by one bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from fedfuse_client.gradient_modes import MODES, GradientMode, Microbatch, losses
from fedfuse_client.independence import exchanged
from fedfuse_client.synthetic import shaken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedfuse_client.gradients import PerRecord

TOLERANCE: Final = 1e-4
"""Largest distance of a norm or a weighted sum from plain autograd's, relative to the norm."""
EXACT: Final = 2.0**-30
"""Largest relative error where the sensitivity of a sum is at stake; float32 arithmetic is 2**-24."""


class Disproof(Exception):  # noqa: N818 - an outcome, not a malfunction
    """A mode is not what it must be for this model; the message says in which respect."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What plain autograd says of one microbatch at one model's weights."""

    model: nn.Module
    """In train mode; its weights are the ones every mode is asked at."""
    batch: Microbatch
    other: Microbatch
    """Different records of the same shapes, the last of them not finite where features are numbers."""
    norms: Tensor
    """Each record's gradient norm, ``(batch,)`` float64."""
    weights: Tensor
    """``(2, batch)``: random ones over the norm, so that no record hides behind another, some of them zero."""
    sums: Tensor
    """The sums they give, ``(2, d)`` float64."""
    first: Tensor
    """The gradient of record 0, ``(d,)`` float64."""
    mate: Tensor
    """The gradient of record 1 of the other microbatch, ``(d,)`` float64."""


def reference(model: nn.Module, batch: Microbatch, other: Microbatch) -> Reference:
    """Return the gradients of a microbatch by plain autograd, one record at a time, at random weights.

    Args:
        model: Left as it is.
        batch: Synthetic records, at least three.
        other: As many others, of the same shapes.
    """
    probe = shaken(model)
    count = len(batch.labels)
    draws = torch.rand(2, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws[1, 1::3] = 0.0
    weights, norms = torch.zeros_like(draws), torch.zeros_like(draws[0])
    first = _alone(probe, batch, 0)
    sums = torch.zeros(2, len(first), dtype=torch.float64)
    for row in range(count):
        gradient = _alone(probe, batch, row)
        norms[row] = gradient.norm()
        weights[:, row] = draws[:, row] / norms[row].clamp(min=1e-12)
        sums.addcmul_(weights[:, row : row + 1], gradient[None])
    return Reference(probe, batch, spoilt(other), norms, weights, sums, first, _alone(probe, other, 1))


def _alone(model: nn.Module, batch: Microbatch, row: int) -> Tensor:
    """Return the gradient of one record's loss in a batch of its own, ``(d,)`` float64."""
    logits = model(*(each[row : row + 1] for each in batch.inputs))
    found = torch.autograd.grad(
        losses(logits, batch.labels[row : row + 1]).sum(),
        list(model.parameters()),
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([each.flatten() for each in found]).to(torch.float64)


def prove(name: str, known: Reference) -> GradientMode:
    """Return a mode, wrapped around a copy of the reference's model, that agrees with plain autograd on it.

    Raises:
        Disproof: it does not, or cannot be applied to the model at all.
    """
    try:
        mode = MODES[name](copy.deepcopy(known.model))
        _compare(mode, known)
    except Disproof:
        raise
    except Exception as problem:  # a mode may fail in any way on layers it does not know
        text = str(problem).splitlines() or [""]
        raise Disproof(f"cannot be applied ({type(problem).__name__}: {text[0][:120]})") from problem
    return mode


def _compare(mode: GradientMode, known: Reference) -> None:
    count = len(known.norms)
    taken = mode.gradients(known.batch)
    norms = _norms(taken)
    _close("norms", (norms - known.norms).abs(), TOLERANCE * known.norms)
    for weights, expected in zip(known.weights, known.sums, strict=True):
        found = _sum(taken, weights)
        _close("weighted sum", (found - expected).norm(), TOLERANCE * expected.norm())
    one, two = torch.eye(count, dtype=torch.float64)[:2]
    first = _sum(taken, one)
    _close("gradient of one record", (first - known.first).norm(), TOLERANCE * known.norms[0])
    _close("norm of what is summed", (first.norm() - norms[0]).abs(), EXACT * norms[0])
    # With and without one record, sums may differ by that record's part and nothing else.
    apart = _sum(taken, known.weights[0]) - _sum(taken, known.weights[0] * (1 - one))
    apart -= known.weights[0, 0] * first
    _close("sum's precision", apart.norm(), EXACT * (known.weights[0] * norms).sum())
    # Last, because a mode may keep one microbatch's results only until the next.
    again = mode.gradients(exchanged(known.batch, known.other, one > 0))
    if _norms(again)[0] != norms[0] or not torch.equal(_sum(again, one), first):
        raise Disproof("the gradient of a record changes with its batch-mates")
    mate = (_sum(again, two) - known.mate).norm()
    _close("gradient in the next microbatch", mate, TOLERANCE * known.mate.norm())


def _norms(taken: Sequence[PerRecord]) -> Tensor:
    return torch.stack([each.squared_norms() for each in taken]).sum(dim=0).sqrt()


def _sum(taken: Sequence[PerRecord], weights: Tensor) -> Tensor:
    found = [each.weighted_sum(weights) for each in taken]
    if any(each.dtype != torch.float64 for each in found):
        raise Disproof("sums are not float64")
    return torch.cat([each.flatten() for each in found])


def _close(what: str, distance: Tensor, bound: Tensor) -> None:
    if not (distance <= bound).all():  # NaN fails as well
        worst = (distance / bound.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
        raise Disproof(f"{what} differs: {worst:.3g} times the tolerance")


def spoilt(other: Microbatch) -> Microbatch:
    """Return a microbatch whose last record has features that are not finite."""

    def spoil(values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values
        spoilt = values.clone()
        spoilt[-1] = torch.nan
        return spoilt

    return Microbatch(tuple(map(spoil, other.inputs)), other.labels)
