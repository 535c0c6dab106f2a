"""The SuperLink as a child process: started, watched, started again, and gone when the coordinator is.

Its state lies in SQLite, so that nodes keep their identifiers and connected sites come back by themselves after it
was started again. Nothing in that file is needed otherwise: where the SuperLink cannot start on it, it is set aside.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from fedfuse_server.home import RunHome
from fedfuse_server.superlink import Setup
from fedfuse_shared.errors import ConfigError, StateError

log = logging.getLogger(__name__)

START_SECONDS: Final = 90.0
"""Longest time until a SuperLink that was started answers (seconds)."""

MAX_STARTS: Final = 6
"""Starts in a row that fail before the coordinator gives up."""

LONGEST_PAUSE: Final = 30.0
"""Longest wait before it is started again (seconds)."""

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_ANY: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared with, not bound to
_POLL: Final = 0.1


@dataclass(frozen=True)
class Listening:
    """Where sites reach the SuperLink, and whether over TLS."""

    host: str
    port: int
    insecure: bool

    def __post_init__(self) -> None:
        """Refuse plain HTTP where others could listen in.

        Raises:
            ConfigError: plain HTTP was asked for on an address that is not this machine's own.
        """
        if self.insecure and self.host not in _LOOPBACK:
            raise ConfigError(
                f"--insecure on {self.host} would let anybody read and connect",
                advice="leave it out; it is for tests on 127.0.0.1",
            )

    @property
    def own_address(self) -> str:
        """The address by which this machine reaches it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{_ANY.get(self.host, host)}:{self.port}"


class SuperLink:
    """Flower's SuperLink, run by ``fedfuse_server.superlink`` in a process of its own.

    Args:
        home: The run's folder.
        listening: Where it listens.

    Raises:
        StateError: a TLS file is missing or its key is open to others.
    """

    def __init__(self, home: RunHome, listening: Listening) -> None:
        self._home = home
        self.listening = listening
        self._process: subprocess.Popen[bytes] | None = None
        self.token = ""
        """Opens the Control and Runtime APIs of the process that runs now."""
        self.superexec = ""
        """Secret of task acquisition of the process that runs now."""
        self.trust: ssl.SSLContext | bool = False
        """How the coordinator knows its SuperLink: by the very certificate, whatever name it is for."""
        if not listening.insecure:
            self.trust = _pinned(home)

    @property
    def base_url(self) -> str:
        """Where the coordinator reaches it."""
        return f"{'http' if self.listening.insecure else 'https'}://{self.listening.own_address}"

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process."""
        return self._process.pid if self._process is not None else None

    def ensure(self) -> bool:
        """See that it runs and answers; return whether it had to be started.

        Raises:
            StateError: it does not start.
            ConfigError: somebody else listens there.
        """
        if self.alive:
            return False
        if self._process is not None:
            log.warning("the SuperLink ended with code %s and is started again", self._process.returncode)
        self._home.logs.mkdir(exist_ok=True)
        for failed in range(MAX_STARTS):
            self._check_port()
            if failed == 2:  # once may be chance
                self._set_aside()
            self._start()
            if self._answers():
                return True
            self.stop()
            pause = min(2.0**failed, LONGEST_PAUSE)
            log.warning("the SuperLink did not start; again in %g s", pause)
            time.sleep(pause)
        raise StateError(
            f"the SuperLink did not start {MAX_STARTS} times",
            who=str(self._log_file),
            advice="the end of that log says why",
        )

    def stop(self) -> None:
        """End it."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --- starting -------------------------------------------------------------------------------------------
    @property
    def _database(self) -> Path:
        return self._home.root / "server" / "superlink.db"

    @property
    def _log_file(self) -> Path:
        return self._home.logs / "superlink.log"

    def _start(self) -> None:
        self.token, self.superexec = secrets.token_hex(32), secrets.token_hex(32)
        secure = not self.listening.insecure
        setup = Setup(
            parent=os.getpid(),
            host=self.listening.host,
            port=self.listening.port,
            database=str(self._database.absolute()),
            token=self.token,
            superexec=self.superexec,
            certificate=str(self._home.certificate.absolute()) if secure else None,
            key=str(self._home.certificate_key.absolute()) if secure else None,
            authority=str(self._home.authority.absolute()) if secure else None,
        )
        environment = {
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str((self._home.root / "server" / "flwr").absolute()),
        }
        with self._log_file.open("ab") as file:
            # A session of its own: Ctrl-C at the terminal is the coordinator's to handle.
            self._process = subprocess.Popen(
                # -P: no module is taken from the folder the command was given in.
                [sys.executable, "-P", "-m", "fedfuse_server.superlink"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(setup.line())
            self._process.stdin.close()
        except BrokenPipeError:
            log.warning("the SuperLink ended while it was started")

    def _answers(self) -> bool:
        end = time.monotonic() + START_SECONDS
        with httpx.Client(verify=self.trust, timeout=5) as client:
            while self.alive and time.monotonic() < end:
                try:
                    if client.get(f"{self.base_url}/health").is_success:
                        return True
                except httpx.TransportError:
                    pass
                time.sleep(_POLL)
        return False

    def _check_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.listening.host else socket.AF_INET
        try:
            with socket.create_server((self.listening.host, self.listening.port), family=family):
                pass
        except OSError as problem:
            raise ConfigError(
                f"cannot listen on {self.listening.host}:{self.listening.port} ({problem.strerror})",
                advice="stop what listens there, or choose another --host or --port",
            ) from problem

    def _set_aside(self) -> None:
        for path in self._database.parent.glob(self._database.name + "*"):
            if not path.name.endswith(".aside"):
                path.replace(path.with_name(path.name + ".aside"))
                log.warning("%s was set aside: the SuperLink may not be able to start on it", path)


def _pinned(home: RunHome) -> ssl.SSLContext:
    """Return a context that believes exactly the server's own certificate."""
    for path in (home.certificate, home.certificate_key, home.authority):
        if not path.is_file():
            raise StateError(
                "TLS file is missing",
                who=str(path),
                advice="take the server's folder that `fedfuse provision` wrote",
            )
    if home.certificate_key.stat().st_mode & 0o077:
        raise StateError(
            "key is open to other users",
            who=str(home.certificate_key),
            advice=f"chmod 600 {home.certificate_key}",
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(home.certificate)
    except (ssl.SSLError, OSError) as problem:
        raise StateError(f"certificate cannot be read ({problem})", who=str(home.certificate)) from problem
    return context
