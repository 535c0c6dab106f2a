"""A prepared federation on one machine, from its first round, or the next, to its metrics."""

from __future__ import annotations

import time
from random import SystemRandom

from flwr.app import Context, RecordDict
from pydantic_core import to_json

from fedfuse_server.events import observing
from fedfuse_server.home import RunHome
from fedfuse_shared.errors import RoundAborted
from fedfuse_shared.files import write_durably
from fedfuse_simulations.engines.inline import InlineGrid
from fedfuse_simulations.metrics import Metrics, Watcher
from fedfuse_simulations.scoring import Scores
from fedfuse_simulations.simulation import Prepared


def run_inline(home: RunHome, prepared: Prepared, *, dropout: float, watch: Watcher) -> None:
    """Run a prepared federation in this process.

    Args:
        home: The run's folder.
        prepared: Its settings and its sites' folders.
        dropout: Probability with which a site's reply in an exchange is lost.
        watch: Told of every event.

    Raises:
        FedfuseError: the run could not start.
    """
    # torch and both apps are imported here, so that a wrong setting is told before they load.
    import torch  # noqa: PLC0415

    from fedfuse_client.app import app as client_app  # noqa: PLC0415
    from fedfuse_client.round import close_sites  # noqa: PLC0415
    from fedfuse_server.app import app as server_app  # noqa: PLC0415

    torch.set_num_threads(prepared.config.performance.threads)
    chance = SystemRandom()
    nodes = {number: {"home": str(folder)} for number, folder in enumerate(prepared.sites.values(), start=2)}
    grid = InlineGrid(
        client_app, nodes, lambda _node, step: step.startswith("train.") and chance.random() < dropout
    )
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"home": str(home.root.resolve())}
    )
    try:
        with observing(watch):
            server_app(grid, context)
    finally:
        close_sites()


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
