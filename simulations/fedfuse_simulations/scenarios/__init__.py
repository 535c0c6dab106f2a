"""Embedded data sets for simulations: written to an ordinary data folder, nothing downloaded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["SCENARIOS", "Scenario"]


class _Writer(Protocol):
    def __call__(
        self, folder: Path, *, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Scenario:
    """A data set that can be made on the spot; what it needs is imported only when it is written."""

    description: str
    """One line for a list of scenarios."""
    module: str
    sites: int
    """Sites the data set has."""

    def write(self, folder: Path, *, seed: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Write the data folder, whole or not at all; the same seed gives the same bytes.

        Args:
            folder: Where to; its parent exists and it does not.
            seed: Seed of the scenario's data.
            progress: Called with the records written so far and the records there will be.

        Raises:
            ConfigError: the folder exists already, its parent does not, or a package is missing.
        """
        cast("_Writer", importlib.import_module(self.module).write)(folder, seed=seed, progress=progress)


SCENARIOS: Final = {
    "digits": Scenario(
        "handwritten digits (scikit-learn's 1,797) with sentences and synthetic speech (eSpeak NG): "
        "6 sites, a language each",
        f"{__name__}.digits",
        6,
    ),
}
"""Every embedded scenario by the name `fedfuse simulate` knows it by."""
