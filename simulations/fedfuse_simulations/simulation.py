"""A simulation as it is written down before it starts, so that it can be started again after any crash."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from fedfuse_client.data.check import check_folder
from fedfuse_client.data.info import read_info
from fedfuse_client.data.manifest import Dataset, DatasetInfo, load_dataset
from fedfuse_server.home import RunHome
from fedfuse_server.plan import bounds_for, cohort, resolve, scale_for
from fedfuse_shared import limits
from fedfuse_shared.config.base import Frozen
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.files import load_toml, save_toml
from fedfuse_shared.errors import ConfigError, DataError
from fedfuse_shared.files import is_disk_full
from fedfuse_shared.models import outline
from fedfuse_simulations.engines.ray import check_address
from fedfuse_simulations.provision import provision, site_folders
from fedfuse_simulations.scenarios import SCENARIOS, Scenario
from fedfuse_simulations.settings import complete

FILE = "simulation.toml"


class Simulation(Frozen):
    """The content of ``simulation.toml``: what only a simulation knows about a run."""

    data: Path | None = None
    """The data folder of all sites; none: the scenario's, written into the run's folder."""
    scenario: str = "digits"
    engine: Literal["inline", "ray"] = "inline"
    ray_address: str | None = None
    """The Ray cluster of engine ``ray``; none: Ray on this machine."""
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
        ConfigError: the folder is in use, or cannot be written.
    """
    if home.root.exists() and not home.root.is_dir():
        raise ConfigError("is not a folder", who=str(home.root), advice="choose another with --out")
    if home.root.exists() and any(home.root.iterdir()):
        raise ConfigError(
            "is not empty",
            who=str(home.root),
            advice="choose another folder with --out, or go on with that run: --resume",
        )
    new = not home.root.exists()
    try:
        home.root.mkdir(parents=True, exist_ok=True)
        save_toml(home.root / FILE, simulation)
    except OSError as problem:
        if new and home.root.exists():
            home.root.rmdir()  # it was made a moment ago and nothing came to be in it
        if is_disk_full(problem):
            raise
        raise ConfigError(
            f"cannot be written ({problem.strerror})",
            who=str(home.root),
            advice="choose another folder with --out",
        ) from problem


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
        scenario = _scenario(simulation)
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
    """Refuse settings and data that a run would fail on, before anything is written.

    Raises:
        ConfigError: a setting is wrong or does not fit the data.
        DataError: something in the data folder cannot be used.
    """
    if simulation.ray_address is not None:
        check_address(simulation.ray_address)
    if simulation.data is None:
        config, sites = complete(simulation.settings, None), _scenario(simulation).sites
    else:
        info = read_info(simulation.data)
        config = complete(simulation.settings, info if isinstance(info, DatasetInfo) else None)
        dataset = check_data(simulation.data)
        _check_rows(dataset, simulation.data)
        sites = len(dataset.sites())
    bounds = bounds_for(config, sites, cohort(config, sites))
    scale_for(resolve(config), bounds, sum(segment.size for segment in outline(config.model)[0]))


def check_data(folder: Path) -> Dataset:
    """Return a data set every file of which was opened; progress goes to standard error.

    Raises:
        DataError: the first problem of the folder, with its file and row, and how many more there are.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening files", total=None)
        problems = check_folder(
            folder, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if problems:
        others = len(problems) - 1
        advice = f"`fedfuse data check {folder}` lists every problem"
        raise DataError(
            problems[0].message,
            who=f"{folder / problems[0].where}",
            advice=f"and {others} more; {advice}" if others else advice,
        )
    return load_dataset(folder)


def _scenario(simulation: Simulation) -> Scenario:
    if simulation.scenario not in SCENARIOS:
        raise ConfigError(
            f"there is no scenario {simulation.scenario!r}", advice=f"there are: {', '.join(SCENARIOS)}"
        )
    return SCENARIOS[simulation.scenario]


def _check_rows(dataset: Dataset, data: Path) -> None:
    sites = dataset.sites()
    if len(sites) < limits.MIN_SITES:
        raise DataError(
            f"{len(sites)} site{'s' if len(sites) > 1 else ''} in the site column; secure aggregation needs at "
            f"least {limits.MIN_SITES}",
            who=str(data / dataset.manifest),
            advice="with two, each would learn the other's update from the sum",
        )
    for name in sites:
        if not dataset.select(site=name, split="train"):
            raise DataError(
                f"site {name} has no training rows",
                who=str(data / dataset.manifest),
                advice="give it some or remove its rows",
            )
    if not dataset.select(split="test"):
        raise DataError(
            "there are no test rows to score with",
            who=str(data / dataset.manifest),
            advice="set split to test in some rows",
        )
