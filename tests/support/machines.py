"""Flower's and our own processes for real, each with a log, over loopback; nothing of them is left in the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Machines:
    """Flower's processes, one environment and one log each; nothing of them is left in the end."""

    def __init__(self, root):
        self.root = root
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(root / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "FEDFUSE_MACHINES": str(root),
        }

    def start(self, name, *command, **more):
        """Start a command; ``more`` is added to its environment."""
        with (self.root / f"{name}.log").open("wb") as log:
            environment = {**self.environment, **more}
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def flwr(self, *command):
        done = subprocess.run(
            ["flwr", *command, "--format", "json"],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return json.loads(done.stdout[done.stdout.index("{") :])

    def wait(self, condition, seconds, pause):
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                logs = "\n".join(
                    f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.root.glob("*.log")
                )
                raise AssertionError(f"not within {seconds} s\n{logs}")
            time.sleep(pause)
        return found

    def left(self):
        """Return what still runs of all that was started, by the environment it inherited: some detach."""
        mark = f"FEDFUSE_MACHINES={self.root}".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
            except OSError:  # somebody else's, or gone
                continue
        return found

    def end(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.left():
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + 15
            while self.left() and time.monotonic() < end:
                time.sleep(0.1)
