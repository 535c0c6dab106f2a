"""What a round takes beyond training in a real deployment: five sites on loopback, TLS, exchange by exchange.

    .venv/bin/python bench/rounds.py [--rounds 4] [--sites 5]

Every party is a process of its own: `fedfuse server run` with its SuperLink, five `fedfuse site run` with their
SuperNodes. A row is an exchange: from the server's last look at the one before to its next, taken from the server's
log; beside it, how long the slowest site worked on its answer. The rest is transport: polling and Flower's processes.
The first round, in which sites import torch and read their data, is told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.deployment import Deployment

RESULTS = Path(__file__).parent / "results" / "rounds.jsonl"
STEPS = ("train.keys", "train.shares", "train.update", "train.agree", "train.unmask")


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sites", type=int, default=5)
    given = parser.parse_args()
    names = ("bern", "lyon", "oslo", "rome", "wien", "riga", "kiew", "bonn")[: given.sites]
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder) / "demo", rounds=given.rounds, sites=names, patience=120.0)
        try:
            deployment.start_sites()
            code = deployment.wait_for_end(deployment.start_server(), 1200)
            if code:
                raise SystemExit((deployment.root / "server-0.log").read_text()[-3000:])
            rounds = _rounds(deployment)
        finally:
            deployment.end()
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "sites": given.sites,
        "rounds": rounds,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(_table(rounds))


def _rounds(deployment: Deployment) -> list[dict[str, list[float]]]:
    """Return, for every round and step, how long the exchange took and how long the slowest site worked on it."""
    answered = [
        (_time(line), line["step"], line["seconds"])
        for site in deployment.sites
        for line in deployment.said(site)
        if line.get("event") == "answered"
    ]
    found = []
    starts = [_time(line) for line in deployment.events("RoundStarted")]
    ends = [_time(line) for line in deployment.events("RoundOpened")]
    exchanges = [(_time(line), line["step"]) for line in deployment.events("ExchangeEnded")]
    for begun, ended in zip(starts, ends, strict=True):
        at, steps = begun, {}
        for step in STEPS:
            end = next(time for time, name in exchanges if name == step and begun <= time <= ended)
            worked = max(s for time, name, s in answered if name == step and begun <= time <= ended)
            steps[step] = [end - at, worked]
            at = end
        steps["open"] = [ended - at, 0.0]
        found.append(steps)
    return found


def _time(line: dict) -> float:
    return datetime.fromisoformat(line["time"]).timestamp()


def _table(rounds: list[dict[str, list[float]]]) -> str:
    lines = ["| exchange | seconds | of these a site's work | transport |", "|---|---|---|---|"]
    total = [0.0, 0.0]
    for step in (*STEPS, "open"):
        later = [each[step] for each in rounds[1:]]
        took, worked = (statistics.median(column) for column in zip(*later, strict=True))
        total = [total[0] + took, total[1] + worked]
        lines.append(f"| {step} | {took:.2f} | {worked:.2f} | {took - worked:.2f} |")
    lines.append(f"| all | {total[0]:.2f} | {total[1]:.2f} | {total[0] - total[1]:.2f} |")
    first = [sum(column) for column in zip(*rounds[0].values(), strict=True)]
    lines.append(f"| first round | {first[0]:.2f} | {first[1]:.2f} | {first[0] - first[1]:.2f} |")
    return "\n".join(lines)


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
