"""Peers live in virtual environments of their own, made from hashed requirements on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def interpreter(name: str) -> Path:
    """Return the Python of a peer's environment, ``.bench/NAME``; it is made where it is missing or incomplete."""
    folder = ROOT / ".bench" / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        print(f"making the environment of {name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
        subprocess.run([str(python), *install, "-r", str(HERE / f"{name}.txt")], check=True)
        ready.touch()
    return python


class Peer:
    """A peer's program that does its job once for every line it is sent.

    Args:
        name: The environment.
        program: A file beside this one.
        arguments: What it is told on its command line.
    """

    def __init__(self, name: str, program: str, *arguments: object) -> None:
        command = [str(interpreter(name)), str(HERE / program), *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer("ready")

    def run(self) -> None:
        """Let it do its job once, and wait until it is done."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._answer("done")

    def _answer(self, expected: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if line != expected:
            raise RuntimeError(f"the peer said {line!r}, not {expected!r}")
