"""The ServerApp, the same over every grid; wiring only."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfuse_server.coordinator import Coordinator
from fedfuse_server.home import RunHome
from fedfuse_shared.errors import ConfigError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation whose folder the run configuration names.

    Raises:
        ConfigError: the run configuration names no folder, or the settings in it are wrong.
    """
    folder = context.run_config.get("home")
    if not isinstance(folder, str):
        raise ConfigError("the run configuration names no folder", advice='set home = "/path/to/run"')
    Coordinator(grid, RunHome(Path(folder))).run()
