"""A simulation as it is written down before it starts, so that it can be started again after any crash."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedfuse_client.data.info import read_info
from fedfuse_client.data.manifest import Dataset, DatasetInfo, load_dataset
from fedfuse_server.home import RunHome
from fedfuse_server.plan import resolve
from fedfuse_shared.config.base import Frozen
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.files import load_toml, save_toml
from fedfuse_shared.errors import ConfigError
from fedfuse_simulations.provision import provision, site_folders
from fedfuse_simulations.scenarios import SCENARIOS
from fedfuse_simulations.settings import complete

FILE = "simulation.toml"


class Simulation(Frozen):
    """The content of ``simulation.toml``: what only a simulation knows about a run."""

    data: Path | None = None
    """The data folder of all sites; none: the scenario's, written into the run's folder."""
    scenario: str = "digits"
    engine: Literal["inline"] = "inline"
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a site's reply in an exchange is lost."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What was set by file and options, before the data set completed it."""

    @classmethod
    def load(cls, home: RunHome) -> Simulation:
        """Return what a run's folder says.

        Raises:
            ConfigError: it is no simulation's folder.
        """
        return load_toml(home.root / FILE, cls)

    def data_folder(self, home: RunHome) -> Path:
        """Return where all sites' rows are."""
        return self.data or home.root / "data"


@dataclass(frozen=True)
class Prepared:
    """A run whose folders are complete."""

    config: RunConfig
    dataset: Dataset
    sites: dict[str, Path]
    """Each site's folder."""


def begin(home: RunHome, simulation: Simulation) -> None:
    """Write a new simulation down; nothing of it exists before.

    Raises:
        ConfigError: the folder is in use, or there is no such scenario.
    """
    if home.root.exists() and any(home.root.iterdir()):
        raise ConfigError(
            "is not empty",
            who=str(home.root),
            advice="choose another folder with --out, or go on with that run: --resume",
        )
    if simulation.data is None and simulation.scenario not in SCENARIOS:
        raise ConfigError(
            f"there is no scenario {simulation.scenario!r}", advice=f"there are: {', '.join(SCENARIOS)}"
        )
    home.root.mkdir(parents=True, exist_ok=True)
    save_toml(home.root / FILE, simulation)


def prepare(home: RunHome, simulation: Simulation, say: Callable[[str], None]) -> Prepared:
    """Return the run's folders, written if they are not complete yet; every part is whole or written anew.

    Args:
        home: The run's folder, begun before.
        simulation: What was written down.
        say: Told what is being done.

    Raises:
        ConfigError: the settings do not fit the data.
        DataError: the data cannot be used.
    """
    data = simulation.data_folder(home)
    if not data.exists() and simulation.data is None:
        scenario = SCENARIOS[simulation.scenario]
        say(f"writing scenario {simulation.scenario}: {scenario.description}")
        seed = simulation.settings.get("seed", 0)
        scenario.write(data, seed=seed if isinstance(seed, int) else 0)
    say("reading the manifest")
    dataset = load_dataset(data)
    if home.config.exists():  # written last: all else is complete
        return Prepared(home.load_config(), dataset, site_folders(home))
    _check_rows(dataset, data)
    say("choosing the noise")
    config = resolve(complete(simulation.settings, dataset.info))
    # Nothing was offered or charged yet: what a crash left of the folders is made anew.
    for leftover in (home.server_key.parent, home.root / "sites"):
        shutil.rmtree(leftover, ignore_errors=True)
    say("writing the sites' folders")
    provision(home, config, data, dataset.sites(), dataset.info.modalities)
    return Prepared(config, dataset, site_folders(home))


def check_early(simulation: Simulation) -> None:
    """Refuse wrong settings before anything is written.

    Raises:
        ConfigError: a setting is wrong, or the data folder has no usable description.
    """
    info = None
    if simulation.data is not None:
        found = read_info(simulation.data)
        if not isinstance(found, DatasetInfo):
            load_dataset(simulation.data)  # raises, naming the first problem
        info = found if isinstance(found, DatasetInfo) else None
    complete(simulation.settings, info)


def _check_rows(dataset: Dataset, data: Path) -> None:
    for name in dataset.sites():
        if not dataset.select(site=name, split="train"):
            raise ConfigError(
                f"site {name} has no training rows", who=str(data), advice="give it some or remove its rows"
            )
    if not dataset.select(split="test"):
        raise ConfigError(
            "there are no test rows to score with", who=str(data), advice="set split to test in some rows"
        )
