"""How much noise a planned schedule needs for a target epsilon; found once and remembered on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from importlib.metadata import version
from pathlib import Path

from fedfuse_shared.envelope import canonical
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.files import write_durably
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.privacy.accountant import epsilon, epsilon_rdp

_SMALLEST, _LARGEST = 0.2, 5000.0
_DIGITS = 4


def noise_multiplier(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier, to four significant digits, under which a schedule costs at most ``target``.

    It is rounded up, so ``accountant.epsilon`` of the schedule is never above the target.

    Raises:
        ConfigError: the target is not a positive number, or no reasonable noise reaches it.
    """
    if not (target > 0 and math.isfinite(target)):
        raise ConfigError(f"epsilon {target} is not a positive number", advice="1 to 10 is usual")

    remembered = _recall(target, delta, sampling_rate, steps)
    if remembered is not None:
        # A file is not believed: what it says is checked against the accountant.
        schedule = Charge(sampling_rate=sampling_rate, noise_multiplier=remembered, steps=steps)
        if epsilon([schedule], delta) <= target:
            return remembered
    sigma = _search(target, delta, sampling_rate, steps)
    _remember(sigma, target, delta, sampling_rate, steps)
    return sigma


def _search(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier that costs at most the target, rounded up to ``_DIGITS`` digits.

    Renyi accounting is cheap and never below the privacy loss distribution, so its answer bounds ours from above;
    ours is then found within a few per cent below it.
    """

    def charge(sigma: float) -> list[Charge]:
        return [Charge(sampling_rate=sampling_rate, noise_multiplier=sigma, steps=steps)]

    low, high = _SMALLEST, _LARGEST
    if epsilon_rdp(charge(high), delta) > target:
        raise ConfigError(
            f"no noise multiplier up to {_LARGEST:g} reaches epsilon {target:g} with sampling rate "
            f"{sampling_rate:g} over {steps} steps",
            advice="plan fewer rounds or a lower sampling rate",
        )
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon_rdp(charge(middle), delta) <= target else (middle, high)
    low = max(_SMALLEST, 0.9 * high)
    while low > _SMALLEST and epsilon(charge(low), delta) <= target:
        low, high = max(_SMALLEST, 0.9 * low), low
    while _round_up(low) < _round_up(high) and high - low > 0.1 ** (_DIGITS + 1) * high:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon(charge(middle), delta) <= target else (middle, high)
    return _round_up(high)


def _round_up(sigma: float) -> float:
    """Return the next decimal of four significant digits, so that the number in an offer is short."""
    places = _DIGITS - 1 - math.floor(math.log10(sigma))
    return math.ceil(sigma * 10**places - 1e-9) / 10**places


def _path(target: float, delta: float, sampling_rate: float, steps: int) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedfuse" / "calibration"
    question = [version("dp-accounting"), target, delta, sampling_rate, steps]
    return folder / f"{hashlib.sha256(canonical(question)).hexdigest()[:32]}.json"


def _recall(target: float, delta: float, sampling_rate: float, steps: int) -> float | None:
    try:
        found = json.loads(_path(target, delta, sampling_rate, steps).read_bytes()[:1000])
    except (OSError, ValueError, RuntimeError):
        return None
    return found if isinstance(found, float) and _SMALLEST <= found <= _LARGEST else None


def _remember(sigma: float, target: float, delta: float, sampling_rate: float, steps: int) -> None:
    try:
        path = _path(target, delta, sampling_rate, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(sigma).encode())
    except (OSError, RuntimeError):
        return  # a cache that cannot be written costs seconds, nothing else
