"""Fuzzes every decoder with atheris (libFuzzer for Python), guided by coverage of fedfuse's own code.

    python tests/fuzz/run.py --seconds 60            all targets, a minute each
    python tests/fuzz/run.py --only ledgers --runs 100000

One process a target. What was found worth keeping stays in .fuzz/TARGET and is where the next run begins; an input
that broke something is copied to regressions/TARGET, which every later run and test tries first. Prints a table and,
unless --dry, adds it to results.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CORPUS = Path(os.environ.get("FEDFUSE_FUZZ_CORPUS", ROOT / ".fuzz"))
REGRESSIONS = HERE / "regressions"

sys.path[:0] = [str(HERE), str(HERE.parent)]


def child(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(
        include=["fedfuse_shared", "fedfuse_client", "fedfuse_server", "targets"]
    ):
        from targets import TARGETS

        target = TARGETS[name]
        work = target.checked()
        seeds = target.seeds()
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for place, seed in enumerate(seeds):
        (corpus / f"seed-{place}").write_bytes(seed)
    known = REGRESSIONS / name
    atheris.Setup(
        [
            sys.argv[0],
            *arguments,
            f"-max_len={target.longest}",
            "-timeout=20",
            "-rss_limit_mb=4096",
            "-print_final_stats=1",
            f"-artifact_prefix={CORPUS}/crash-{name}-",
            str(corpus),
            *([str(known)] if known.is_dir() else []),
        ],
        work,
    )
    atheris.Fuzz()


def fuzz(name: str, *, seconds: int | None, runs: int | None, seed: int) -> dict[str, object]:
    """Fuzz one target in a process of its own and return what came of it."""
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.glob(f"crash-{name}-*"):
        old.unlink()
    limits = [
        f"-seed={seed}",
        *([f"-max_total_time={seconds}"] if seconds else []),
        *([f"-runs={runs}"] if runs else []),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", name, *limits],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    executed = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    crashes = sorted(CORPUS.glob(f"crash-{name}-*"))
    for crash in crashes:
        (REGRESSIONS / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(crash, REGRESSIONS / name / crash.name.rsplit("-", 1)[1][:16])
    ended_well = done.returncode == 0 and not crashes
    return {
        "target": name,
        "inputs": int(executed[-1]) if executed else 0,
        "covered": int(covered[-1]) if covered else 0,
        "result": "holds" if ended_well else "broken",
        "trace": "" if ended_well else done.stderr[-4000:],
    }


def main() -> None:
    """Fuzz what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--only", action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="do not write results.json")
    chosen = parser.parse_args()
    from targets import TARGETS

    unknown = set(chosen.only or ()) - TARGETS.keys()
    if unknown:
        sys.exit(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if not chosen.seconds and not chosen.runs:
        chosen.seconds = 60
    results = HERE / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    broken = False
    print("| target | inputs | coverage | result |\n|---|---|---|---|")
    for name in chosen.only or TARGETS:
        found = fuzz(name, seconds=chosen.seconds, runs=chosen.runs, seed=chosen.seed)
        trace = found.pop("trace")
        print(f"| {name} | {found['inputs']:,} | {found['covered']:,} | {found['result']} |", flush=True)
        if trace:
            broken = True
            print(trace, file=sys.stderr, flush=True)
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        known[name] = {
            **found,
            "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
            "commit": commit,
            "seed": chosen.seed,
        }
    if not chosen.dry:
        results.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    main()
