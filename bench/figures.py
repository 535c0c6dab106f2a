"""The accuracy table of the README: digits and stamps at epsilon 1, 3, 8 and without privacy, three seeds each.

    .venv/bin/python bench/figures.py            all that are missing; a run takes about a minute
    .venv/bin/python bench/figures.py digits     only of one data set, so that two series can run side by side
    .venv/bin/python bench/figures.py --table    only print the table

Every run is a whole `fedfuse simulate` in a process of its own; results are kept in bench/results/figures.jsonl, so
that an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "figures.jsonl"
DATA = Path(os.environ.get("FEDFUSE_DATA", HERE.parents[1] / "shared" / "data"))
SETS = ("digits", "stamps")
EPSILONS = ("8", "3", "1", "none")
SEEDS = (0, 1, 2)


def simulate(name: str, options: list[str]) -> tuple[dict[str, Any], float, float]:
    """Return the JSON of a whole run in a process of its own, its CPU seconds and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["simulate", "--data", str(DATA / name), *options, "--json"]
        fedfuse = Path(sys.executable).with_name("fedfuse")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [str(fedfuse), *command, "--out", f"{folder}/run"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout), seconds, after.ru_maxrss / 1024


def run(name: str, epsilon: str, seed: int) -> dict[str, object]:
    """Return one run's figures."""
    privacy = ["--no-dp"] if epsilon == "none" else ["--epsilon", epsilon]
    found, seconds, memory = simulate(name, [*privacy, "--seed", str(seed)])
    subsets, balanced = found["subsets"], found["subsets_balanced"]
    single = max(("text", "image", "audio"), key=lambda m: balanced[m])
    return {
        "data": name,
        "epsilon": epsilon,
        "seed": seed,
        "rounds": found["rounds"],
        "accuracy": found["accuracy"],
        "accuracy_complete": found["accuracy_complete"],
        "balanced_complete": balanced["all"],
        "best_single": single,
        "best_single_accuracy": subsets[single],
        "best_single_balanced": balanced[single],
        "f1_macro": found["f1_macro"],
        "cpu_seconds": seconds,
        "peak_mb": memory,
    }


def table(rows: list[dict[str, object]]) -> str:
    """Return the table in Markdown: mean and deviation over seeds."""
    lines = [
        "| data | epsilon | complete rows | best single, same rows | all rows | macro F1 | CPU s | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        score = "balanced_complete" if name == "stamps" else "accuracy_complete"
        single = "best_single_balanced" if name == "stamps" else "best_single_accuracy"
        for epsilon in EPSILONS:
            chosen = [r for r in rows if (r["data"], r["epsilon"]) == (name, epsilon)]
            if not chosen:
                continue

            def figure(key: str, chosen: list[dict[str, object]] = chosen) -> str:
                values = [float(str(r[key])) for r in chosen]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                return f"{statistics.mean(values):.3f} ± {spread:.3f}"

            seconds = statistics.median(float(str(r["cpu_seconds"])) for r in chosen)
            memory = max(float(str(r["peak_mb"])) for r in chosen)
            best = ", ".join(sorted({str(r["best_single"]) for r in chosen}))
            lines.append(
                f"| {name} | {epsilon} | **{figure(score)}** | {figure(single)} ({best}) | {figure('accuracy')} "
                f"| {figure('f1_macro')} | {seconds:.0f} | {memory:.0f} MB |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    RESULTS.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    known = {(r["data"], r["epsilon"], r["seed"]) for r in rows}
    if "--table" not in sys.argv:
        for seed in SEEDS:
            for name in [wanted for wanted in sys.argv[1:] if wanted in SETS] or SETS:
                for epsilon in EPSILONS:
                    if (name, epsilon, seed) in known:
                        continue
                    row = run(name, epsilon, seed)
                    rows.append(row)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
