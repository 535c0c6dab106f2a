"""A run that is finished, as `fedfuse simulate` leaves it, with sites left out and an attempt aborted on the way."""

from __future__ import annotations

import time
from pathlib import Path

from fedfuse_client.data.manifest import load_dataset
from fedfuse_server.home import RunHome
from fedfuse_simulations.examiner import Examiner
from fedfuse_simulations.metrics import Watcher
from fedfuse_simulations.run import conclude
from support.small_federation import SmallFederation


def finished_run(root: Path) -> RunHome:
    """Run four rounds: lyon's vector is lost in the second, every key but one in the third's first attempt."""
    federation = SmallFederation(root, {"rounds": 4, "privacy": {"epsilon": 50.0}})
    count: dict[tuple[str, str], int] = {}

    def loses(site: str, step: str) -> bool:
        count[site, step] = count.get((site, step), 0) + 1
        if step == "train.update":
            return site == "lyon" and count[site, step] == 2
        return step == "train.keys" and site != "bern" and count[site, step] == 3

    federation.run(federation.grid(loses))
    home = federation.home
    examiner = Examiner(federation.config.model, load_dataset(root / "data"))
    watch = Watcher(home.root / "progress.jsonl", examiner, 1, lambda _event, _scores: None)
    for event in federation.events:
        watch(event)
    conclude(home, watch, examiner.examine_published(home), time.monotonic())
    return home
