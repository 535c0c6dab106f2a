"""A prepared federation on one machine, from its first round, or the next, to its metrics."""

from __future__ import annotations

import time
from random import SystemRandom

from pydantic_core import to_json

from fedfuse_server.events import observing
from fedfuse_server.home import RunHome
from fedfuse_shared.errors import RoundAborted
from fedfuse_shared.files import write_durably
from fedfuse_simulations.metrics import Metrics, Watcher
from fedfuse_simulations.scoring import Scores
from fedfuse_simulations.simulation import Prepared, Simulation


def run_rounds(home: RunHome, prepared: Prepared, simulation: Simulation, *, watch: Watcher) -> None:
    """Run a prepared federation on the engine its simulation names.

    Args:
        home: The run's folder.
        prepared: Its settings and its sites' folders.
        simulation: The engine, and with what probability a site's reply in an exchange is lost.
        watch: Told of every event.

    Raises:
        FedfuseError: the run could not start.
    """
    # torch and both apps are imported here, so that a wrong setting is told before they load.
    from fedfuse_client.app import app as client_app  # noqa: PLC0415
    from fedfuse_server.app import app as server_app  # noqa: PLC0415
    from fedfuse_simulations.engines.inline import run_inline  # noqa: PLC0415
    from fedfuse_simulations.engines.ray import run_on_ray  # noqa: PLC0415

    chance = SystemRandom()

    def loses(_node: int, step: str) -> bool:
        return step.startswith("train.") and chance.random() < simulation.dropout

    apps, folders = (server_app, client_app), list(prepared.sites.values())
    threads = prepared.config.performance.threads
    with observing(watch):
        if simulation.engine == "ray":
            address = simulation.ray_address
            run_on_ray(apps, home.root, folders, threads=threads, loses=loses, address=address)
        else:
            run_inline(apps, home.root, folders, threads=threads, loses=loses)


def conclude(home: RunHome, watch: Watcher, final: Scores, started: float) -> Metrics:
    """Write ``metrics.json`` and return it.

    Args:
        home: The run's folder.
        watch: What happened.
        final: Scores of the published model.
        started: ``time.monotonic()`` when this process began with the rounds.
    """
    metrics = watch.metrics(final, time.monotonic() - started)
    if not metrics.rounds:
        raise RoundAborted(
            f"no round was opened: {watch.stopped or 'every attempt was aborted'}",
            who=str(home.root),
            advice="see the sites' reasons above",
        )
    write_durably(home.root / "metrics.json", to_json(metrics, indent=2) + b"\n")
    return metrics
