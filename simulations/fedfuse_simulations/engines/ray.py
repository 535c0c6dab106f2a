"""The same ServerApp and ClientApp on Flower's own simulation engine: Ray's worker processes play the sites.

Flower gives a simulated node a number, not a folder. The list of folders travels inside the ClientApp that this
module makes of the real one, so nothing a site installs can be told a folder from outside (ADR 7). Messages between
the processes of one simulation are pickled by Ray; there is nobody on that path but this simulation.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import copy_context
from pathlib import Path

from flwr.app import ConfigRecordValues, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fedfuse_client.learner import Learner
from fedfuse_shared.errors import ConfigError
from fedfuse_simulations.engines.inline import Loses

_POLL = 0.05
"""Seconds between two looks for replies; Flower's own engine delivers every 0.1 s."""


class SitesApp(ClientApp):
    """A ClientApp for nodes that are told only which of ``num-partitions`` they are.

    Args:
        app: The ClientApp every node runs.
        folders: The site's folder of each partition.
        threads: Threads of torch in a worker.
    """

    def __init__(self, app: ClientApp, folders: Sequence[Path], threads: int) -> None:
        super().__init__()
        self._app = app
        self._folders = tuple(str(folder.resolve()) for folder in folders)
        self._threads = threads

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message as the site of this node; any worker can answer the next, so its store is closed."""
        import torch  # noqa: PLC0415 - in the worker, before the site's own import of it

        from fedfuse_client.round import close_sites, site_in  # noqa: PLC0415

        torch.set_num_threads(self._threads)
        logging.getLogger("flwr").setLevel(logging.ERROR)  # it warns when a worker ends as it should
        folder = self._folders[int(context.node_config["partition-id"])]
        here = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config={**context.node_config, "home": folder},
            state=context.state,
            run_config=context.run_config,
        )
        try:
            site = site_in(folder)
            site._learner = _learners.setdefault(folder, site._learner)  # noqa: SLF001 - saves reading all records
            return self._app(message, here)
        finally:
            close_sites()


_learners: dict[str, Learner] = {}
"""What this worker has read of each site's records; kept where the site's store is let go of."""


class WatchedGrid(Grid):
    """Flower's Grid of a simulation, which can lose replies and lets a waiting server be stopped.

    Args:
        grid: The Grid.
        nodes: Nodes the simulation has; the server hears of none before all are there and Ray has started.
        loses: Which replies get lost, to simulate dropouts.
        stopped: Set when the simulation ends before the server does.
    """

    def __init__(self, grid: Grid, nodes: int, loses: Loses, stopped: threading.Event) -> None:
        self._grid = grid
        self._nodes = nodes
        self._loses = loses
        self._stopped = stopped

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes, once they can answer."""
        import ray  # noqa: PLC0415 - seconds to import

        while len(nodes := list(self._grid.get_node_ids())) < self._nodes or not ray.is_initialized():
            self._wait()
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, once each."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies that came in time and were not lost."""
        waiting = set(self.push_messages(messages))
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        kept = []
        while waiting and time.monotonic() < end:
            replies = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            kept += [r for r in replies if not self._loses(r.metadata.src_node_id, r.metadata.message_type)]
            if waiting:
                self._wait()
        return kept

    def _wait(self) -> None:
        if self._stopped.wait(_POLL):
            raise SystemExit  # ends the server's thread alone; what it holds is closed on the way


class RayServer:
    """A ServerApp as Flower's engine runs it: in a thread, with the caller's context variables.

    Args:
        app: The ServerApp.
        home: The run's folder.
        nodes: Nodes of the simulation.
        loses: Which replies get lost.
        threads: Threads of torch.
    """

    def __init__(self, app: ServerApp, home: Path, nodes: int, loses: Loses, threads: int) -> None:
        self.problem: Exception | None = None
        self.finished = False
        self._app = app
        self._home = home
        self._nodes = nodes
        self._loses = loses
        self._threads = threads
        self._variables = copy_context()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def as_app(self) -> ServerApp:
        """Return the ServerApp to hand to Flower."""
        app = ServerApp()
        app.main()(self._main)
        return app

    def ask_to_stop(self) -> None:
        """Let the server end where it next waits for sites; Flower's engine ends after it."""
        self._stopped.set()

    def stop(self) -> None:
        """End the server if it still runs, and wait until its files are closed."""
        self.ask_to_stop()
        if self._thread is not None:
            self._thread.join()

    def _main(self, grid: Grid, context: Context) -> None:
        import torch  # noqa: PLC0415

        self._thread = threading.current_thread()
        torch.set_num_threads(self._threads)  # the number is kept for each thread apart
        watched = WatchedGrid(grid, self._nodes, self._loses, self._stopped)
        here = Context(
            context.run_id, context.node_id, {}, context.state, {"home": str(self._home.resolve())}
        )
        try:
            self._variables.run(self._app, watched, here)
            self.finished = True
        except Exception as problem:
            self.problem = problem
            raise


def run_on_ray(
    apps: tuple[ServerApp, ClientApp],
    home: Path,
    folders: Sequence[Path],
    *,
    threads: int,
    loses: Loses = lambda _node, _type: False,
    address: str | None = None,
) -> None:
    """Run a federation on Flower's simulation engine until its server is done.

    Args:
        apps: The ServerApp and the ClientApp.
        home: The run's folder.
        folders: The sites' folders; on a cluster every machine must see them under these paths.
        threads: Threads of torch, and processors each worker claims.
        loses: Which replies get lost, given node and message type.
        address: A Ray cluster; none starts Ray on this machine and ends it with the run.

    Raises:
        FedfuseError: whatever the server raises.
        ConfigError: Ray could not be started or reached, or it lost its workers.
    """
    if address is not None:
        check_address(address)
    server_app, client_app = apps
    server = RayServer(server_app, home, len(folders), loses, threads)
    sites = SitesApp(client_app, folders, threads)
    backend = _backend(address, threads, len(folders))
    with _contained(), _interrupting(server):
        import ray  # noqa: PLC0415 - seconds to import
        from flwr.simulation import run_simulation  # noqa: PLC0415

        try:
            run_simulation(server.as_app(), sites, len(folders), backend_config=backend)
        except RuntimeError as problem:
            if server.problem is None:
                raise _engine_failed(problem, address) from problem
            raise
        finally:
            server.stop()
            ray.shutdown()
    if not server.finished:
        raise _engine_failed(RuntimeError("it ended before the server did"), address)


def check_address(address: str) -> None:
    """Refuse a Ray cluster that is not there; Ray itself would try for minutes.

    Raises:
        ConfigError: nothing answers at the address, or it is none.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"{address} is no address of a Ray cluster", advice="it looks like 10.0.0.7:6379")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as problem:
        raise ConfigError(
            f"does not answer ({problem.strerror or problem})",
            who=f"Ray at {address}",
            advice="start it with `ray start --head`, or leave out --ray-address",
        ) from problem


def _backend(address: str | None, threads: int, nodes: int) -> BackendConfig:
    """Return the settings of Flower's Ray backend: as many workers as processors, but no more than sites."""
    start: dict[str, ConfigRecordValues] = {
        "address": address or "local",  # said, so that no cluster is found by the environment or left files
        "include_dashboard": False,
        "log_to_driver": True,
        "logging_level": "ERROR",
    }
    if address is None:
        processors = max(threads, len(os.sched_getaffinity(0)))
        start |= {
            "num_cpus": min(processors, threads * nodes),
            "num_gpus": 0,
            "_node_ip_address": "127.0.0.1",
        }
    return {"init_args": start, "client_resources": {"num_cpus": threads, "num_gpus": 0.0}, "actor": {}}


def _engine_failed(problem: BaseException, address: str | None) -> ConfigError:
    while problem.__cause__ is not None:
        problem = problem.__cause__
    said = str(problem).strip().splitlines()
    return ConfigError(
        f"failed ({said[0] if said else type(problem).__name__})",
        who="Ray" if address is None else f"Ray at {address}",
        advice="see memory and the logs in /tmp/ray, or use --engine inline",
    )


@contextmanager
def _interrupting(server: RayServer) -> Iterator[None]:
    """Turn Ctrl-C into an orderly end of the simulation, KeyboardInterrupt coming after it; a second one is at once.

    Flower's threads that wait for Ray do not all survive its being shut down under them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    interrupted = False

    def note(_number: int, _frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)
        server.ask_to_stop()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


@contextmanager
def _contained() -> Iterator[None]:
    """Keep Flower and Ray from reporting home, printing to standard output or leaving anything in this process."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray starts
    path = os.environ.get("PYTHONPATH")  # Flower puts all of sys.path into it, for its workers
    flower = logging.getLogger("flwr")
    level = flower.level
    # What it says there is that run_simulation is deprecated, and tracebacks of what is raised anyway.
    flower.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():  # Ray prints what workers print
            warnings.filterwarnings(
                "ignore", message="Tip: In future versions of Ray", category=FutureWarning
            )
            yield
    finally:
        flower.setLevel(level)
        os.environ.pop("PYTHONPATH", None)
        if path is not None:
            os.environ["PYTHONPATH"] = path
