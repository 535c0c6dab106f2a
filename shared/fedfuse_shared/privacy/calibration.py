"""How much noise a planned schedule needs for a target epsilon; found once and remembered on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from fedfuse_shared.envelope import canonical
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.files import write_durably
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy.accountant import epsilon, epsilon_rdp

_SMALLEST: Final = 0.2
_LARGEST: Final = 5000.0
_DIGITS: Final = 5
_CHORDS: Final = 8
_MAX_ENTRY: Final = 100
"""Largest cache entry that is read (bytes): it is one number."""


def noise_multiplier(
    target: float, delta: float, sampling_rate: float, steps: int, *, near: float | None = None
) -> float:
    """Return the smallest noise multiplier, to five significant digits, that keeps a schedule within ``target``.

    It is rounded up, so ``accountant.epsilon`` of the schedule is never above the target; and it is a short decimal,
    so that what an offer states is exactly what was calibrated.

    Args:
        target: Epsilon for the whole schedule.
        delta: The delta it is meant at.
        sampling_rate: Poisson sampling rate q of every step.
        steps: Steps of all rounds together.
        near: A guess, from a neighbouring schedule say; it saves time and cannot change the answer.

    Raises:
        ConfigError: an argument is out of bounds, or no reasonable noise reaches the target.
    """
    if not (target > 0 and math.isfinite(target)):
        raise ConfigError(f"epsilon {target} is not a positive number", advice="1 to 10 is usual")
    if not 0 < sampling_rate <= 1:
        raise ConfigError(f"sampling rate {sampling_rate} does not lie above 0 and up to 1")
    if steps < 1:
        raise ConfigError(f"a schedule of {steps} steps needs no noise", advice="plan at least one round")
    remembered = _recall(target, delta, sampling_rate, steps)
    if remembered is not None and _is_smallest(remembered, target, delta, sampling_rate, steps):
        return remembered
    sigma = _search(target, delta, sampling_rate, steps, near)
    _remember(sigma, target, delta, sampling_rate, steps)
    return sigma


def noise_beside(
    beside: Sequence[Charge], target: float, delta: float, sampling_rate: float, steps: int
) -> float:
    """Return the smallest noise multiplier, to five digits, with which a schedule and other charges cost ``target``.

    By Renyi accounting, which is what counts where a data set is charged for several mechanisms.

    Args:
        beside: What else is charged to the same data set.
        target: Epsilon for everything together.
        delta: The delta it is meant at.
        sampling_rate: Poisson sampling rate q of every step; 1 for a release over all records.
        steps: Steps, or releases.

    Raises:
        ConfigError: the target is no positive number, or no reasonable noise reaches it.
    """
    if not (target > 0 and math.isfinite(target)):
        raise ConfigError(f"epsilon {target} is not a positive number", advice="1 to 10 is usual")

    def ratio(sigma: float) -> float:
        return epsilon_rdp([*beside, *_schedule(sigma, sampling_rate, steps)], delta) / target

    if ratio(_LARGEST) > 1:
        raise ConfigError(
            f"no noise multiplier up to {_LARGEST:g} keeps {steps} steps and what is charged beside them within "
            f"epsilon {target:g} at delta {delta:g}",
            advice="plan fewer rounds, a smaller evaluation.share or a lower sampling rate, or allow more",
        )
    low, high = _SMALLEST, _LARGEST
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if ratio(middle) <= 1 else (middle, high)
    return _narrow(ratio, high)


def _schedule(sigma: float, sampling_rate: float, steps: int) -> list[Charge]:
    return [Charge(sampling_rate=sampling_rate, noise_multiplier=sigma, steps=steps)]


def _is_smallest(sigma: float, target: float, delta: float, sampling_rate: float, steps: int) -> bool:
    """Return whether a number meets the target and the next smaller one does not: a file is not believed."""
    if epsilon(_schedule(sigma, sampling_rate, steps), delta) > target:
        return False
    return sigma == _SMALLEST or epsilon(_schedule(_step(sigma, -1), sampling_rate, steps), delta) > target


def _search(target: float, delta: float, sampling_rate: float, steps: int, near: float | None) -> float:
    """Return the smallest number of ``_DIGITS`` digits that costs at most the target, by bisection.

    Renyi accounting is cheap and never below the privacy loss distribution, so its answer bounds ours from above;
    ours is then found some per cent below it.
    """
    low, high = _SMALLEST, _LARGEST
    least = epsilon_rdp(_schedule(high, sampling_rate, steps), delta)
    if least > target:
        raise ConfigError(
            f"no noise multiplier up to {_LARGEST:g} reaches epsilon {target:g} at delta {delta:g}: sampling rate "
            f"{sampling_rate:g} over {steps} steps costs {least:.3g} even then",
            advice="plan fewer rounds or a lower sampling rate, or allow more",
        )
    if near is not None and _SMALLEST < near < _LARGEST:
        high = min(1.02 * near, _LARGEST)
        low = high  # no need to look for a start
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        enough = epsilon_rdp(_schedule(middle, sampling_rate, steps), delta) <= target
        low, high = (low, middle) if enough else (middle, high)
    return _narrow(lambda sigma: epsilon(_schedule(sigma, sampling_rate, steps), delta) / target, high)


def _narrow(ratio: Callable[[float], float], enough: float) -> float:
    """Return the least decimal whose ratio of epsilon to its target is at most 1.

    Epsilon falls about as a power of the noise. So the first guesses follow the chord in logarithms, which needs few
    of the evaluations that cost a second each; bisection ends what they leave.
    """
    low, high = max(_SMALLEST, 0.9 * enough), _round_up(enough)
    at_low, at_high = ratio(low), ratio(high)
    while at_high > 1:  # only after a guess: what Renyi accounting allows is enough, and so is the largest
        low, at_low = high, at_high
        high = min(_round_up(1.1 * high), _LARGEST)
        at_high = ratio(high)
    while at_low <= 1:
        if low == _SMALLEST:
            return low
        low, high, at_high = max(_SMALLEST, 0.9 * low), _round_up(low), at_low
        at_low = ratio(low)
    for asked in range(100):
        first, last = _step(low, 1), _step(high, -1)
        if first > last:
            break
        share = math.log(at_low) / (math.log(at_low) - math.log(at_high)) if asked < _CHORDS else 0.5
        guess = min(max(_round_up(low * (high / low) ** share), first), last)
        found = ratio(guess)
        if found <= 1:
            high, at_high = guess, found
        else:
            low, at_low = guess, found
    return high


def _places(sigma: float) -> int:
    """Return the decimal places that give ``_DIGITS`` significant digits."""
    return _DIGITS - 1 - math.floor(math.log10(sigma))


def _step(sigma: float, direction: int) -> float:
    """Return the nearest number of ``_DIGITS`` significant digits strictly above or below."""
    grid = 10.0 ** -_places(sigma)
    return _round_up(sigma + 0.5 * grid) if direction > 0 else _round_up(sigma - 1.5 * grid)


def _round_up(sigma: float) -> float:
    """Return the least number of ``_DIGITS`` significant digits that is not below."""
    places = _places(sigma)
    rounded = round(sigma, places)
    return rounded if rounded >= sigma else round(rounded + 10.0**-places, places)


def _path(target: float, delta: float, sampling_rate: float, steps: int) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedfuse" / "calibration"
    question = [version("dp-accounting"), target, delta, sampling_rate, steps]
    return folder / f"{hashlib.sha256(canonical(question)).hexdigest()[:32]}.json"


def _recall(target: float, delta: float, sampling_rate: float, steps: int) -> float | None:
    try:
        with _path(target, delta, sampling_rate, steps).open("rb") as file:
            found = json.loads(file.read(_MAX_ENTRY))
    except (OSError, ValueError, RuntimeError):  # not there, not JSON, no home folder
        return None
    return found if isinstance(found, float) and _SMALLEST <= found <= _LARGEST else None


def _remember(sigma: float, target: float, delta: float, sampling_rate: float, steps: int) -> None:
    try:
        path = _path(target, delta, sampling_rate, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(sigma).encode())
    except (OSError, RuntimeError):
        return  # a cache that cannot be written costs seconds, nothing else
