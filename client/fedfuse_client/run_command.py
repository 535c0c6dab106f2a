"""``fedfuse site run``: a site at work, in one process in the foreground, with Flower's SuperNode as its child."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedfuse_client.connection import Connection, load_connection
from fedfuse_client.home import SiteHome
from fedfuse_client.journal import Event, Journal
from fedfuse_client.run_lock import only_one
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.proxies import reach_directly
from fedfuse_shared.tied import PYTHON

PROGRAM: Final = (*PYTHON, "-m", "fedfuse_client.supernode")
"""Flower's SuperNode, as it is installed."""
_POLL: Final = 0.1
"""Between two looks at the SuperNode's queue (seconds)."""
_GRACE: Final = 30.0
"""How long a reply that is ready may take to be sent when the site is told to end (seconds)."""
_QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Flower reports to nobody."""


def run_site(folder: Path, *, insecure: bool, json_logs: bool) -> None:
    """Answer messages until told to end (SIGTERM or SIGINT).

    Raises:
        FedfuseError: the folder cannot be used, another process serves it, or the connection is not safe.
    """
    home = SiteHome(folder.absolute())
    policy = home.load_policy()
    connection = load_connection(home.connection)
    program = [*PROGRAM, *_reach(home, connection, insecure=insecure)]
    os.environ.update(_QUIET)
    # Flower's client obeys proxies, also on the way to its own SuperNode on this machine.
    reach_directly("127.0.0.1")
    with (
        only_one(home),
        _journal(policy.site, home, json_logs=json_logs) as journal,
        _secret(home) as secret,
    ):
        journal.say(Event.STARTED, server=connection.address, mode="warm" if policy.warm else "fresh")
        _serve(home, journal, program, secret, warm=policy.warm, watched=not insecure)
        journal.say(Event.STOPPED)


def _serve(
    home: SiteHome, journal: Journal, program: Sequence[str], secret: Path, *, warm: bool, watched: bool
) -> None:
    # Imported here: Flower reads its environment when it is imported.
    from fedfuse_client.answers import Fresh, Warm
    from fedfuse_client.executor import Executor
    from fedfuse_client.server_watch import ServerWatch, trouble
    from fedfuse_client.supervisor import SuperNode
    from fedfuse_client.tasks import Tasks

    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    executor = Executor(Warm(home) if warm else Fresh(home, home.logs / "answers.log"), journal)

    def command(port: int) -> list[str]:
        return [
            *program,
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]

    environment = {**os.environ, "FLWR_HOME": str(home.root / "flwr")}
    node = SuperNode(command, environment, home.logs / "supernode.log", journal)
    # Without TLS there is nothing to check, and the server is on this machine.
    watch = ServerWatch(lambda: trouble(home), journal) if watched else None
    try:
        end = None
        while True:
            if stopping.is_set() and end is None:
                journal.say(Event.STOPPING)
                end = time.monotonic() + _GRACE
            if end is not None and (executor.is_idle or time.monotonic() > end):
                break
            if (address := node.tend()) is not None:
                executor.attend(Tasks(address, secret.read_bytes()))
            busy = executor.turn(accept=end is None)
            if watch is not None and end is None:
                watch.turn(busy=busy)
            if not busy:
                # Told to end, `wait` returns at once: then only a reply on its way is waited for.
                time.sleep(_POLL) if stopping.is_set() else stopping.wait(_POLL)
    finally:
        node.end()
        executor.close()


def _reach(home: SiteHome, connection: Connection, *, insecure: bool) -> list[str]:
    """Return how the SuperNode reaches its server.

    Raises:
        ConfigError: without encryption to another machine, or a file of the kit is missing.
    """
    if insecure:
        if not connection.is_loopback:
            raise ConfigError(
                f"{connection.address} is another machine: with --insecure anyone on the way reads it all",
                who=str(home.connection),
                advice="leave --insecure out, or try on one machine with a loopback address",
            )
        return ["--superlink", connection.address, "--insecure"]
    for needed in (home.node_key, home.authority):
        if not needed.is_file():
            raise ConfigError(
                "is missing",
                who=str(needed),
                advice="join the federation first (fedfuse site init, fedfuse site join)",
            )
    return [
        *("--superlink", connection.address),
        *("--root-certificates", str(home.authority)),
        *("--auth-supernode-private-key", str(home.node_key)),
    ]


@contextmanager
def _journal(site: str, home: SiteHome, *, json_logs: bool) -> Iterator[Journal]:
    journal = Journal(site, home.logs, json_lines=json_logs)
    logger = logging.getLogger("fedfuse_client")
    logger.addHandler(journal)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield journal
    finally:
        logger.removeHandler(journal)
        journal.close()


@contextmanager
def _secret(home: SiteHome) -> Iterator[Path]:
    """A new secret between executor and SuperNode, in a file only its owner reads, gone in the end."""
    path = home.root / "supernode.secret"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
