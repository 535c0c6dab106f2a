"""A whole small federation on real images: four sites, two modalities, every part real, seconds to run."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fedfuse_client.app import app as client_app
from fedfuse_client.round import close_sites
from fedfuse_server.events import Event, observing
from fedfuse_server.home import RunHome
from fedfuse_shared.config.federation import RunConfig
from fedfuse_simulations.engines.inline import InlineGrid
from fedfuse_simulations.simulation import Simulation, begin, prepare

SITES = ("bern", "lyon", "oslo", "rome")
WORDS = {0: ("nothing", "round"), 1: ("one", "upright")}
INFO = """\
name = "zero-or-one"
task = "classification"
classes = ["0", "1"]
modalities = ["text", "image"]
record = "A handwritten digit and a few words about it."
"""


def write_data(folder: Path, *, rows_per_site: int = 40) -> Path:
    """Handwritten zeros and ones (scikit-learn), each with a few words; a quarter of the rows lack one of the two."""
    digits = load_digits(n_class=2)
    numbers = np.random.default_rng(0)
    order = numbers.permutation(len(digits.target))[: rows_per_site * len(SITES)]
    (folder / "images").mkdir(parents=True)
    (folder / "dataset.toml").write_text(INFO)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "site", "split", "label", "text", "image", "audio"])
        for count, index in enumerate(order):
            label = int(digits.target[index])
            picture = f"images/{count}.png"
            Image.fromarray((digits.images[index] * 15).astype(np.uint8)).save(folder / picture)
            words = " ".join(numbers.choice([*WORDS[label], "shape", "ink", "a", "the"], 5))
            missing = count % 8
            table.writerow(
                [
                    f"r{count}",
                    SITES[count % len(SITES)],
                    "test" if count // len(SITES) % 4 == 3 else "train",
                    label,
                    "" if missing == 0 else words,
                    "" if missing == 1 else picture,
                    "",
                ]
            )
    return folder


@dataclass
class SmallFederation:
    """A prepared run; ``run`` plays it with the real apps over the inline grid."""

    root: Path
    changes: dict[str, object] = field(default_factory=dict)
    home: RunHome = field(init=False)
    config: RunConfig = field(init=False)
    folders: dict[str, Path] = field(init=False)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        data = self.root / "data"
        if not data.exists():
            write_data(data)
        self.home = RunHome(self.root / "run")
        changes = {"rounds": 3, **self.changes}
        # A given noise multiplier saves the calibration; epsilon is the cap of every site.
        privacy = {"expected_batch_size": 8, "noise_multiplier": 4.0, **changes.pop("privacy", {})}
        simulation = Simulation(data=data, settings={**changes, "privacy": privacy})
        begin(self.home, simulation)
        prepared = prepare(self.home, simulation, lambda _: None)
        self.config, self.folders = prepared.config, prepared.sites

    def grid(self, loses=lambda _site, _step: False, app=client_app, grid_type=InlineGrid) -> InlineGrid:
        names = dict(enumerate(self.folders, start=2))
        nodes = {node: {"home": str(self.folders[name])} for node, name in names.items()}
        return grid_type(app, nodes, lambda node, step: loses(names[node], step))

    def run(self, grid: InlineGrid | None = None) -> None:
        from flwr.app import Context, RecordDict

        from fedfuse_server.app import app as server_app

        context = Context(1, 1, {}, RecordDict(), {"home": str(self.home.root)})
        try:
            with observing(self.events.append):
                server_app(grid or self.grid(), context)
        finally:
            close_sites()

    def told(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]
