"""A whole federation on one machine: folders, engine, scores, audit, and the run's summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict
from pydantic_core import to_json

from fedfuse_client.data.manifest import Dataset, load_dataset
from fedfuse_server.events import Event, RoundOpened, RunStopped, SiteLeftOut, observing
from fedfuse_server.home import RunHome
from fedfuse_server.plan import resolve
from fedfuse_shared.config.base import Frozen
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.files import load_toml, save_toml
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.files import write_durably
from fedfuse_simulations.engines.inline import InlineGrid
from fedfuse_simulations.provision import provision
from fedfuse_simulations.scoring import Scores

if TYPE_CHECKING:
    from fedfuse_simulations.examiner import Examiner


class Simulation(Frozen):
    """The content of ``simulation.toml``: what only a simulation knows about a run."""

    data: Path
    """The data folder of all sites."""

    @classmethod
    def load(cls, home: RunHome) -> Simulation:
        """Return what a run's folder says.

        Raises:
            ConfigError: it is no simulation's folder.
        """
        return load_toml(home.root / "simulation.toml", cls)


class RoundMetrics(Frozen):
    """Scores after one round, and who was in it."""

    round: int
    survivors: tuple[str, ...]
    scores: Scores | None
    """None where the round was not scored."""


class Metrics(Frozen):
    """The content of ``metrics.json``."""

    rounds: tuple[RoundMetrics, ...]
    final: Scores
    left_out: tuple[tuple[int, str, str, str], ...]
    """Round, site, exchange and reason of everyone who was left out of something."""
    stopped: str
    """Why the run ended early; empty when it did not."""
    seconds: float


@dataclass
class Watcher:
    """Collects a run's events, scores the model now and then, and passes events on."""

    examiner: Examiner
    every: int
    """Rounds between two scorings; 0: only at the end."""
    show: Callable[[Event, Scores | None], None]
    rounds: list[RoundMetrics] = field(default_factory=list)
    left_out: list[tuple[int, str, str, str]] = field(default_factory=list)
    stopped: str = ""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        scores = None
        match event:
            case RoundOpened():
                if self.every and event.round % self.every == 0:
                    scores = self.examiner.examine(event.published)
                self.rounds.append(RoundMetrics(round=event.round, survivors=event.survivors, scores=scores))
            case SiteLeftOut():
                self.left_out.append((event.round, event.site, event.step, event.reason))
            case RunStopped():
                self.stopped = event.reason
            case _:
                pass
        self.show(event, scores)


def prepare(home: RunHome, config: RunConfig, data: Path) -> tuple[RunConfig, Dataset, dict[str, Path]]:
    """Write the folders of a new run and return its final settings, its data and its sites' folders.

    Raises:
        ConfigError: the folder is in use, or the settings do not fit the data.
        DataError: the data cannot be used.
    """
    if home.config.exists() or home.ledger.exists():
        raise ConfigError(
            "holds a run already", who=str(home.root), advice="choose another folder with --out"
        )
    dataset = load_dataset(data)
    for name in dataset.sites():
        if not dataset.select(site=name, split="train"):
            raise ConfigError(
                f"site {name} has no training rows", who=str(data), advice="give it some or remove its rows"
            )
    if not dataset.select(split="test"):
        raise ConfigError("there are no test rows to score with", who=str(data))
    settled = resolve(config)
    home.root.mkdir(parents=True, exist_ok=True)
    save_toml(home.root / "simulation.toml", Simulation(data=data.resolve()))
    folders = provision(home, settled, data, dataset.sites(), dataset.info.modalities)
    return settled, dataset, {name: folder.root for name, folder in folders.items()}


def run_inline(
    home: RunHome, config: RunConfig, folders: dict[str, Path], *, dropout: float, watch: Watcher
) -> Metrics:
    """Run a prepared federation in this process and return its metrics, written to ``metrics.json`` as well.

    Args:
        home: The run's folder.
        config: The run's settings.
        folders: Each site's folder.
        dropout: Probability with which a site's reply in an exchange is lost.
        watch: Told of every event.

    Raises:
        FedfuseError: the run could not start, or no round was opened.
    """
    # torch and both apps are imported here, so that a wrong setting is told before they load.
    import torch  # noqa: PLC0415

    from fedfuse_client.app import app as client_app  # noqa: PLC0415
    from fedfuse_client.round import close_sites  # noqa: PLC0415
    from fedfuse_server.app import app as server_app  # noqa: PLC0415

    torch.set_num_threads(config.performance.threads)
    chance = SystemRandom()
    nodes = {number: {"home": str(folder)} for number, folder in enumerate(folders.values(), start=2)}
    grid = InlineGrid(
        client_app, nodes, lambda _node, step: step.startswith("train.") and chance.random() < dropout
    )
    started = time.monotonic()
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"home": str(home.root.resolve())}
    )
    try:
        with observing(watch):
            server_app(grid, context)
    finally:
        close_sites()
    if not watch.rounds:
        raise ConfigError(f"no round was opened: {watch.stopped}", advice="look at the sites' reasons above")
    metrics = Metrics(
        rounds=tuple(watch.rounds),
        final=watch.examiner.examine_published(home),
        left_out=tuple(watch.left_out),
        stopped=watch.stopped,
        seconds=time.monotonic() - started,
    )
    write_durably(home.root / "metrics.json", to_json(metrics, indent=2) + b"\n")
    return metrics
