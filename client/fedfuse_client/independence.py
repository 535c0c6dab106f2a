"""A test that a model treats every record as if it were alone, in train mode; by what it does, not by names.

DP-SGD bounds what one record adds to a sum. If one record can change another's gradient (batch normalisation,
attention along the wrong axis, a batch mean), or a later one's through a running statistic, that bound is void.
Everything is compared bit by bit: clipping leaves no room for a difference (see ``CLIP_MARGIN``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse_client.gradient_modes import Microbatch, losses
from fedfuse_client.synthetic import shaken
from fedfuse_shared.errors import ConfigError

_ADVICE = "use layers that treat each record alone and keep no state, such as GroupNorm or LayerNorm"


def check_independence(model: nn.Module, batch: Microbatch, other: Microbatch) -> None:
    """Check that neither batch-mates nor earlier passes change a record's logits or gradient, to the last bit.

    For every ordered pair of rows there is a comparison in which the one is kept and the other replaced.

    Args:
        model: Left as it is; a copy at other weights is tested.
        batch: Synthetic records, at least two.
        other: As many others, of the same shapes.

    Raises:
        ConfigError: a submodule mixes records or carries something over; the message names the innermost one.
    """
    probe = shaken(model)
    before = _buffers(probe)
    plain = _logits(probe, batch)
    _check_memory(probe, batch, other, plain)
    for kept in splits(len(batch.labels)):
        mixed = exchanged(batch, other, kept)
        if not torch.equal(_logits(probe, mixed)[kept], plain[kept]):
            raise _mixes(_first(_calls(probe, batch), _calls(probe, mixed), _Kept(kept)))
    # After mixing: batch normalisation does both, and mixing is the worse.
    _check_buffers(probe, before)
    for kept in list(splits(len(batch.labels)))[:2]:
        mixed = exchanged(batch, other, kept)
        if any(map(_differ, _gradients(probe, batch, kept), _gradients(probe, mixed, kept))):
            raise _mixes(_first_backward(probe, batch, kept))


def splits(count: int) -> Iterator[Tensor]:
    """Yield the rows to keep, each ``(count,)`` bool, so that for any two rows one split keeps just the first."""
    rows = torch.arange(count)
    for bit in range((count - 1).bit_length()):
        yield rows >> bit & 1 == 1
        yield rows >> bit & 1 == 0


def exchanged(batch: Microbatch, other: Microbatch, kept: Tensor) -> Microbatch:
    """Return a microbatch with the rows not kept replaced by another's."""

    def rows(mine: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(kept.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

    return Microbatch(tuple(map(rows, batch.inputs, other.inputs)), rows(batch.labels, other.labels))


def _logits(model: nn.Module, batch: Microbatch) -> Tensor:
    # Random masks are no mixing: they are drawn alike each time.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        logits: Tensor = model(*batch.inputs)
    return logits


def _gradients(model: nn.Module, batch: Microbatch, kept: Tensor) -> list[Tensor | None]:
    """Return the gradient of the kept records' summed loss with respect to each parameter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = losses(model(*batch.inputs), batch.labels)[kept].sum()
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def _differ(mine: Tensor | None, theirs: Tensor | None) -> bool:
    return (mine is None) != (theirs is None) or (
        mine is not None and theirs is not None and not torch.equal(mine, theirs)
    )


# --- what is carried over -------------------------------------------------------------------------------------------
def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in chain(model.named_buffers(), model.named_parameters())}


def _check_memory(model: nn.Module, batch: Microbatch, other: Microbatch, plain: Tensor) -> None:
    """Check that logits are the same whatever the pass before was, if any."""
    _logits(model, other)
    if torch.equal(_logits(model, batch), plain):
        return
    _logits(model, batch)
    before = _calls(model, batch)
    _logits(model, other)
    everything = _Kept(torch.ones(len(plain), dtype=torch.bool))
    raise _remembers(model, _first(before, _calls(model, batch), everything).name)


def _check_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, value in _buffers(model).items():
        if not torch.equal(value, before[name]):
            raise _remembers(model, name.rpartition(".")[0], f" in {name.rpartition('.')[2]}")


def _remembers(model: nn.Module, name: str, where: str = "") -> ConfigError:
    kind = type(model.get_submodule(name)).__name__
    return ConfigError(
        f"submodule {name or '(the model itself)'} ({kind}) carries information from one pass to the next{where}, so "
        "records of one batch change the gradients of another's",
        advice=_ADVICE,
    )


# --- which submodule ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a submodule: copies of every tensor that went in and came out."""

    name: str
    kind: str
    given: list[Tensor]
    answer: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Kept:
    """The records that two passes have in common."""

    rows: Tensor

    def same(self, first: Tensor, second: Tensor) -> bool:
        """Return whether the kept records' part of two tensors is equal, on whichever axis the batch lies."""
        return first.shape == second.shape and any(
            torch.equal(mine, theirs)
            for mine, theirs in zip(_parts(first, self.rows), _parts(second, self.rows), strict=True)
        )

    def silent(self, values: Tensor) -> bool:
        """Return whether the records that are not kept have zeros alone."""
        return any(not part.any() for part in _parts(values, ~self.rows))


def _parts(values: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """Yield what may be some records' part: along each axis, which may hold the batch's and another's in one."""
    count = len(rows)
    axes = [axis for axis, size in enumerate(values.shape) if size and size % count == 0]
    if rows.all() or not axes:
        yield values  # all records, or no axis for them: a constant of the pass, which must not change at all
        return
    for axis in axes:
        before, size, after = values.shape[:axis], values.shape[axis], values.shape[axis + 1 :]
        yield values.reshape(*before, count, size // count, *after).movedim(axis, 0)[rows]
        yield values.reshape(*before, size // count, count, *after).movedim(axis + 1, 0)[rows]


def _first(before: list[_Call], after: list[_Call], kept: _Kept) -> _Call:
    """Return the call that first turned equal parts into different ones; children end before their parents."""
    for mine, theirs in zip(before, after, strict=True):
        if all(map(kept.same, mine.given, theirs.given)) and not all(
            map(kept.same, mine.answer, theirs.answer)
        ):
            return mine
    return before[-1]


def _calls(model: nn.Module, batch: Microbatch) -> list[_Call]:
    calls: list[_Call] = []
    open_calls: list[list[Tensor]] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        open_calls.append(_copies((args, kwargs)))

    def leave(name: str) -> Callable[..., None]:
        def record(module: nn.Module, _args: Any, _kwargs: Any, answer: Any) -> None:
            calls.append(_Call(name, type(module).__name__, open_calls.pop(), _copies(answer)))

        return record

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave(name), with_kwargs=True).remove)
        _logits(model, batch)
    return calls


def _first_backward(model: nn.Module, batch: Microbatch, kept: Tensor) -> _Call:
    """Return the call through which the kept records' loss first reached other records in the backward pass."""
    rows, calls = _Kept(kept), []

    def leave(name: str) -> Callable[..., None]:
        def record(module: nn.Module, given: Any, answer: Any) -> None:
            calls.append(_Call(name, type(module).__name__, _copies(answer), _copies(given)))

        return record

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_full_backward_hook(leave(name)).remove)
        inputs = tuple(each.clone().requires_grad_(each.is_floating_point()) for each in batch.inputs)
        losses(model(*inputs), batch.labels)[kept].sum().backward()  # type: ignore[no-untyped-call]
    for call in calls:
        if all(map(rows.silent, call.given)) and not all(map(rows.silent, call.answer)):
            return call
    return _Call("", type(model).__name__, [], [])


def _copies(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested.detach().clone()]
    if isinstance(nested, Mapping):
        return [each for value in nested.values() for each in _copies(value)]
    if isinstance(nested, list | tuple):
        return [each for value in nested for each in _copies(value)]
    return []


def _mixes(call: _Call) -> ConfigError:
    return ConfigError(
        f"submodule {call.name or '(the model itself)'} ({call.kind}) mixes records of a batch, so one record "
        "changes the gradients of others and no clip norm bounds what it does",
        advice=_ADVICE,
    )
