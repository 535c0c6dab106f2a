"""Every decoder under its seeds, mutations of them, and what once broke it; then a little coverage-guided fuzzing.

The long runs are ``make fuzz``; their counts are in results.json.
"""

import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from targets import TARGETS  # noqa: E402

MUTATIONS = 60
RUNS = 400


def mutated(seed, chance):
    """Return a seed with a few bytes changed, cut, doubled or put in another place."""
    data = bytearray(seed)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[place : place + chance.randrange(1, 30)]
            case 2:
                data[place:place] = data[place : place + chance.randrange(1, 30)]
            case 3:
                data[place:place] = chance.randbytes(chance.randrange(1, 9))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_only_typed_errors_leave_a_decoder(name):
    target = TARGETS[name]
    work = target.checked()
    chance = random.Random(name)
    seeds = target.seeds()
    assert seeds
    for seed in seeds:
        work(seed)
    for _ in range(MUTATIONS):
        work(mutated(chance.choice(seeds), chance)[: target.longest])
    for known in sorted((HERE / "regressions" / name).glob("*")):
        work(known.read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="atheris has no wheel for this machine",
)
def test_coverage_guided_fuzzing_finds_nothing(tmp_path):
    command = [sys.executable, str(HERE / "run.py"), "--runs", str(RUNS), "--dry"]
    place = {**os.environ, "FEDFUSE_FUZZ_CORPUS": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("holds") == len(TARGETS)


def test_the_long_runs_cover_every_decoder():
    results = json.loads((HERE / "results.json").read_text())
    assert results.keys() == TARGETS.keys()
    assert all(found["result"] == "holds" and found["inputs"] > 1000 for found in results.values())
