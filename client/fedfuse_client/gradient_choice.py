"""The fastest gradient mode proven for a model, and how records may be packed, found on synthetic records alone.

Which of the proven modes is used changes the last bits of float32 arithmetic and the speed, never a guarantee: all
have passed the same proof. A mode that gives a record the same bits in every row comes before one that does not,
because records can then be packed densely. Because speed differs from one process to the next, so may the choice;
whoever needs equal bits in two processes names a mode.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from fedfuse_client.gradient_modes import MODES, GradientMode, Microbatch
from fedfuse_client.gradient_proof import Disproof, prove, reference
from fedfuse_client.independence import check_independence
from fedfuse_client.row_proof import shapes_alike
from fedfuse_client.synthetic import microbatch, shaken
from fedfuse_shared.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from fedfuse_shared.models import MultimodalClassifier

FASTEST: Final = "fastest"
"""Chooses by timing, instead of by name."""


class Choice(NamedTuple):
    """How gradients of a model are computed, and the shapes that may be filled densely."""

    name: str
    """A mode in :data:`MODES`."""
    shapes: tuple[int, ...]
    """Sizes of microbatches in whose every row a record has the same bits, the largest first; none if rows matter."""

    @property
    def mode(self) -> type[GradientMode]:
        """The mode of that name."""
        return MODES[self.name]


_LOG: Final = logging.getLogger(__name__)
_FEWEST: Final = 3  # rows in which a proof makes sense
_FEW: Final = 16  # rows of the first timing, which leaves out modes that have no chance
_HOPELESS: Final = 3.0
_REPEATS: Final = 21
_AT_LEAST: Final = 3
_SECONDS: Final = 0.2  # after which timing is not repeated
_chosen: dict[tuple[str, str, int, int, str, int], Choice] = {}
_choosing = threading.Lock()


def choice_for(model: MultimodalClassifier, count: int, wanted: str = FASTEST, expected: int = 0) -> Choice:
    """Return the gradient mode and the packing for a model and a size of microbatch, chosen once per process.

    Args:
        model: Its settings decide; its weights play no part.
        count: Rows of every microbatch.
        wanted: A name in :data:`MODES`, which must then pass, or :data:`FASTEST`.
        expected: Records that a step draws on average; public.

    Raises:
        ConfigError: the model mixes records or keeps state, no mode passes, or there is none of that name.
    """
    key = (model.config.model_dump_json(), repr(model), count, torch.get_num_threads(), wanted, expected)
    with _choosing:
        if key not in _chosen:
            # Mixing shows only among several records.
            pair = [microbatch(model.config, max(count, _FEWEST), seed) for seed in (2, 3)]
            found = choose(model, pair[0], pair[1], wanted, expected)
            _chosen[key] = found if count >= _FEWEST else found._replace(shapes=())
        return _chosen[key]


def choose(
    model: nn.Module, batch: Microbatch, other: Microbatch, wanted: str = FASTEST, expected: int = 0
) -> Choice:
    """Return the fastest mode that is proven for a model, or the one wanted; one that rows do not matter to, if any.

    Args:
        model: Left as it is.
        batch: Synthetic records in the shape of every microbatch, at least three.
        other: As many others.
        wanted: A name in :data:`MODES`, or :data:`FASTEST`.
        expected: Records that a step draws on average.

    Raises:
        ConfigError: as for :func:`choice_for`; the message says of each mode why it did not pass.
    """
    if wanted != FASTEST and wanted not in MODES:
        raise ConfigError(
            f"there is no gradient mode {wanted!r}", advice=f"choose one of {', '.join([FASTEST, *MODES])}"
        )
    check_independence(model, batch, other)
    names = _by_speed(model, batch) if wanted == FASTEST else [wanted]
    known, refused = reference(model, batch, other), []
    first: Choice | None = None
    for name in names:
        try:
            prove(name, known)
        except Disproof as reason:
            refused.append(f"{name}: {reason}")
            _LOG.info("gradient mode %s is not proven for this model: %s", name, reason)
            continue
        found = Choice(name, shapes_alike(name, model, batch, other, expected))
        first = first or found
        if found.shapes:
            first = found
            break
    if first is not None:
        sizes = ", ".join(map(str, first.shapes or [len(batch.labels)]))
        packing = "packed densely" if first.shapes else "each record in its own row"
        _LOG.info("gradients by mode %s, for microbatches of %s, %s", first.name, sizes, packing)
        return first
    raise ConfigError(
        f"no gradient mode gives this model's per-record gradients ({'; '.join(refused)})",
        advice="use layers that Opacus knows, or one of the shipped encoders",
    )


def _by_speed(model: nn.Module, batch: Microbatch) -> list[str]:
    """Return the modes, the fastest first; those too slow or not applicable stay in, last, so that they are tried."""
    few = Microbatch(tuple(each[:_FEW] for each in batch.inputs), batch.labels[:_FEW])
    modes: dict[str, GradientMode] = {}
    speed: dict[str, float] = {}
    for name, kind in MODES.items():
        try:
            modes[name] = kind(shaken(model))
            _timed(modes[name], few)  # sets it up
            speed[name] = _timed(modes[name], few)
        except Exception as problem:  # noqa: BLE001 - its proof will fail in the same way and be told
            _LOG.debug("gradient mode %s: %s", name, problem)
            speed[name] = math.inf
    hopeless = {name: each for name, each in speed.items() if each > _HOPELESS * min(speed.values())}
    spent: dict[str, list[float]] = {name: [] for name in modes if name not in hopeless}
    end = time.thread_time() + _SECONDS
    for repeat in range(_REPEATS):
        if repeat >= _AT_LEAST and time.thread_time() > end:
            break
        for name, times in spent.items():
            times.append(_timed(modes[name], batch))
    # The first pass at a shape prepares kernels for it, for all modes.
    found = {name: statistics.median(times[1:]) for name, times in spent.items()}
    _LOG.debug("seconds per microbatch: %s", {name: round(each, 5) for name, each in found.items()})
    return [*sorted(found, key=found.__getitem__), *sorted(set(MODES) - set(found), key=speed.__getitem__)]


def _timed(mode: GradientMode, batch: Microbatch) -> float:
    # This thread's own time: what else the machine does at the moment says nothing about the mode.
    started = time.thread_time()
    taken = mode.gradients(batch)
    norms = torch.stack([each.squared_norms() for each in taken]).sum(dim=0).sqrt()
    weights = 1.0 / norms.clamp(min=1.0)
    for each in taken:
        each.weighted_sum(weights)
    return time.thread_time() - started
