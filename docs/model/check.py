"""Checks the models with spin, all states of them, and shows that each of them can fail.

    python docs/model/check.py           every run; minutes, and 2.2 GB for the largest
    python docs/model/check.py --fast    without the two largest

Needs spin and gcc (Debian: apt-get install spin gcc). A sound model must be searched to the end without an error; one
that is broken on purpose must show one. Prints a table; exits with 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LYING, HONEST = "lying-server.pml", "honest-server.pml"
MEMORY = 8000
"""Megabytes the search may take."""


@dataclass(frozen=True)
class Run:
    """One search.

    Attributes:
        model: The file.
        settings: Macros.
        fails: What a broken model has to be caught by; empty for a sound one.
        shows: What the run is for.
        large: Left out by --fast.
        forever: Look for endless runs too, under weak fairness, not only for stuck ones.
    """

    model: str
    settings: tuple[str, ...]
    shows: str
    fails: str = ""
    large: bool = False
    forever: bool = False


FOUR = ("N=4", "T=3", "COLLUDERS=1")
RUNS = (
    Run(LYING, ("N=3", "T=3"), "all properties, n = 3, the usual bounds"),
    Run(LYING, ("N=3", "T=2"), "all properties, n = 3, one dropout tolerated, c = 0"),
    Run(LYING, FOUR, "all properties, n = 4, one site helps the server"),
    Run(LYING, ("N=4", "T=3"), "all properties, n = 4, nobody helps it", large=True),
    Run(LYING, ("N=3", "T=2", "SEND_FIRST"), "sent before it is on disk: two vectors", "emitted"),
    Run(LYING, (*FOUR, "SEND_FIRST"), "sent before it is on disk: two vectors", "emitted"),
    Run(LYING, (*FOUR, "SIGN_AGAIN"), "signs a second set of survivors: double reveal", "seeds"),
    Run(LYING, ("N=4", "T=2", "COLLUDERS=1", "ONLY_REVEAL"), "2t <= n + c: double reveal", "seeds"),
    Run(LYING, (*FOUR, "NO_QUORUM"), "reveals without t agreements: other survivors", "u3"),
    Run(LYING, (*FOUR, "NO_SUBSET"), "signs survivors outside its U2", "u3"),
    Run(LYING, ("N=3", "T=2", "ANY_DEALER"), "sites that masked nothing vouch: one vector opened", "opened"),
    Run(LYING, (*FOUR, "ANY_DEALER"), "sites that masked nothing vouch: one vector opened", "opened"),
    Run(LYING, (*FOUR, "FEWEST=3"), "a sum over m - c honest vectors is opened, as it should be", "opened"),
    Run(HONEST, ("N=3", "T=3"), "no stuck round, n = 3"),
    Run(HONEST, ("N=3", "T=2"), "no stuck round, n = 3, one dropout tolerated"),
    Run(HONEST, ("N=3", "T=3"), "no endless round either", forever=True),
    Run(HONEST, ("N=4", "T=3"), "no stuck round, n = 4", large=True),
    Run(HONEST, ("N=3", "T=2", "NO_TIMEOUT"), "waits for everybody: stuck", "invalid end state"),
)


@dataclass(frozen=True)
class Result:
    """What came of a search."""

    states: int
    depth: int
    megabytes: float
    seconds: float
    error: str
    whole: bool


def search(run: Run) -> Result:
    """Build a model's verifier in a folder of its own and run it."""
    with tempfile.TemporaryDirectory() as folder:

        def call(*command: str) -> str:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            return done.stdout + done.stderr

        macros = [f"-D{setting}" for setting in run.settings]
        said = call("spin", "-a", *macros, str(HERE / run.model))
        safety = [] if run.forever else ["-DSAFETY", "-DNOCLAIM"]
        # Small searches are over sooner than they are optimised.
        optimise = "-O2" if run.large else "-O1"
        said += call("gcc", optimise, "-w", "-DCOLLAPSE", f"-DMEMLIM={MEMORY}", *safety, "-o", "pan", "pan.c")
        if not (Path(folder) / "pan").exists():
            sys.exit(f"{run.model} {' '.join(run.settings)} cannot be built:\n{said}")
        began = time.perf_counter()
        text = call("./pan", "-m2000000", *(["-a", "-f", "-N", "ends"] if run.forever else []))
        seconds = time.perf_counter() - began

    def number(pattern: str) -> float:
        found = re.search(pattern, text)
        return float(found[1]) if found else 0.0

    errors = number(r"errors: (\d+)")
    said_error = re.search(r"pan:1: (.*)", text)
    return Result(
        states=int(number(r"([\d.e+]+) states, stored")),
        depth=int(number(r"depth reached (\d+)")),
        megabytes=number(r"([\d.]+)\ttotal actual memory usage"),
        seconds=seconds,
        error=said_error[1] if said_error else ("an error" if errors else ""),
        whole="Search not completed" not in text and "errors: " in text and "max search depth" not in text,
    )


def main() -> None:
    """Run them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="leave the two largest out")
    fast = parser.parse_args().fast
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} missing; on Debian: apt-get install spin gcc")
    print("| model | settings | shows | states | depth | MB | s | result |")
    print("|---|---|---|---|---|---|---|---|")
    wrong = 0
    for run in RUNS:
        if fast and run.large:
            continue
        found = search(run)
        if run.fails:
            good, result = run.fails in found.error, "caught" if found.error else "**not caught**"
        else:
            good = found.whole and not found.error
            result = "holds" if good else f"**{found.error or 'not searched to the end'}**"
        wrong += not good
        name = run.model.removesuffix(".pml") + (", fair" if run.forever else "")
        print(
            f"| {name} | {' '.join(run.settings)} | {run.shows} | {found.states:,} | {found.depth} "
            f"| {found.megabytes:.0f} | {found.seconds:.1f} | {result} |",
            flush=True,
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
