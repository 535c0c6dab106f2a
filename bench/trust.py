"""Both trust modes on digits at epsilon 1, 3 and 8, five seeds: what sharing the noise buys (design page 3).

    .venv/bin/python bench/trust.py            all that are missing; a run takes about a minute
    .venv/bin/python bench/trust.py 2 3        only these seeds, so that two series can run side by side
    .venv/bin/python bench/trust.py --table    only print the table

`aggregate` states h, the survivors that are sure to be honest and whose shares make up the noise: min_survivors less
colluders. Runs are kept in bench/results/trust.jsonl, so that an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from figures import simulate

RESULTS = Path(__file__).parent / "results" / "trust.jsonl"
MODES = {
    "site": "",
    "aggregate, c = 1, h = 4": "[secure_aggregation]\ncolluders = 1\nmin_survivors = 5\n",
    "aggregate, c = 0, h = 6": "[secure_aggregation]\ncolluders = 0\nmin_survivors = 6\n",
}
EPSILONS = ("1", "3", "8")
SEEDS = (0, 1, 2, 3, 4)
SHOWN = ("all", "image", "audio", "text", "image+audio")


def run(mode: str, epsilon: str, seed: int) -> dict[str, object]:
    """Return one run's figures."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as settings:
        settings.write(MODES[mode])
        settings.flush()
        trust = ["--trust", mode.split(",", maxsplit=1)[0], "--config", settings.name]
        found, seconds, _ = simulate("digits", ["--epsilon", epsilon, "--seed", str(seed), *trust])
    return {
        "mode": mode,
        "epsilon": epsilon,
        "seed": seed,
        "rounds": found["rounds"],
        "all_rows": found["accuracy"],
        "subsets": found["subsets"],
        "spent": max(found["epsilon"].values()),
        "audit": found["audit"],
        "cpu_seconds": seconds,
    }


def table(rows: list[dict]) -> str:
    """Return the table: fused / image / audio / text / image+audio on complete rows; all rows in brackets."""
    lines = [
        "| epsilon | " + " | ".join(f"`{mode}`" for mode in MODES) + " |",
        "|---" * (len(MODES) + 1) + "|",
    ]
    for epsilon in EPSILONS:
        cells = []
        for mode in MODES:
            chosen = [row for row in rows if (row["mode"], row["epsilon"]) == (mode, epsilon)]
            if not chosen:
                cells.append("-")
                continue
            means = {name: statistics.mean(row["subsets"][name] for row in chosen) for name in SHOWN}
            spread = statistics.stdev(row["subsets"]["all"] for row in chosen) if len(chosen) > 1 else 0.0
            whole = statistics.mean(row["all_rows"] for row in chosen)
            others = " / ".join(f"{means[name]:.3f}" for name in SHOWN[1:])
            cells.append(f"**{means['all']:.3f} ± {spread:.3f}** ({whole:.3f}) / {others}")
        lines.append(f"| {epsilon} | " + " | ".join(cells) + " |")
    for mode in MODES:
        chosen = [row["cpu_seconds"] / row["rounds"] for row in rows if row["mode"] == mode]
        if chosen:
            lines.append(f"\n{mode}: {statistics.median(chosen):.2f} CPU seconds a round, {len(chosen)} runs")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    RESULTS.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    known = {(row["mode"], row["epsilon"], row["seed"]) for row in rows}
    if "--table" not in sys.argv:
        for seed in [int(word) for word in sys.argv[1:]] or SEEDS:
            for epsilon in EPSILONS:
                for mode in MODES:
                    if (mode, epsilon, seed) in known:
                        continue
                    rows.append(run(mode, epsilon, seed))
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
