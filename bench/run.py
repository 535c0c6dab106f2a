"""Runs the benchmarks, or the ones named, and writes bench/results/*.json and the table in bench/README.md.

    make bench              all of them
    make bench ONLY=P1b     one

Every figure is a ratio against a peer or a limit measured in the same run: the two are timed in turn, at least five
times, and the median of the pairwise ratios is reported.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from entries import ENTRIES, Entry  # noqa: E402

REPEATS = 7
MARK = "<!-- results -->"


def machine() -> str:
    """Return what the figures were taken on."""
    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        f"model: {platform.processor()}",
    )
    name = model.split(":", 1)[1].strip()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"


def commit() -> str:
    """Return the commit measured, marked where the tree differs from it."""
    git = ["git", "-C", str(HERE)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False)
    return name.stdout.strip() + ("+" if dirty.returncode else "")


def timed(work: Callable[[], object]) -> float:
    """Return the seconds one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(entry: Entry) -> dict[str, object]:
    """Return one entry's result as it is written."""
    if entry.exact is not None:
        runs: list[float] = [entry.exact()]
    else:
        ours, theirs = entry.pair()
        for work in (ours, theirs):
            work()  # a warm-up each
        runs = [entry.ratio(timed(ours), timed(theirs)) for _ in range(REPEATS)]
    value = statistics.median(runs)
    return {
        "id": entry.name,
        "what": entry.what,
        "value": round(value, 4),
        "goal": entry.goal,
        "met": value <= entry.goal if entry.lower_is_better else value >= entry.goal,
        "unit": entry.unit,
        "peer": entry.peer,
        "command": f"make bench ONLY={entry.name}",
        "runs": [round(run, 4) for run in runs],
        "machine": machine(),
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "commit": commit(),
    }


def write_table() -> None:
    """Rewrite the table in bench/README.md from the results on disk."""
    rows = ["| # | what | figure | goal | met | against | date, commit |", "|---|---|---|---|---|---|---|"]
    for path in sorted((HERE / "results").glob("*.json")):
        r = json.loads(path.read_text())
        sign = "<=" if next(e for e in ENTRIES if e.name == r["id"]).lower_is_better else ">="
        met = "yes" if r["met"] else "**no**"
        rows.append(
            f"| {r['id']} | {r['what']} | {r['value']:g} {r['unit']} | {sign} {r['goal']:g} | {met} | {r['peer']} "
            f"| {r['date']}, {r['commit']} |"
        )
    readme = HERE / "README.md"
    head = readme.read_text().split(MARK)[0]
    readme.write_text(f"{head}{MARK}\n\n" + "\n".join(rows) + "\n")


def main() -> None:
    """Run what was asked for."""
    wanted = sys.argv[1:]
    unknown = set(wanted) - {entry.name for entry in ENTRIES}
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(entry.name for entry in ENTRIES)}")
    (HERE / "results").mkdir(exist_ok=True)
    for entry in ENTRIES:
        if not wanted or entry.name in wanted:
            result = measure(entry)
            (HERE / "results" / f"{entry.name}.json").write_text(json.dumps(result, indent=2) + "\n")
            print(
                f"{entry.name}: {result['value']} {entry.unit} (goal {entry.goal}): {entry.what}", flush=True
            )
    write_table()


if __name__ == "__main__":
    main()
