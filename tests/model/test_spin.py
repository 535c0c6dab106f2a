"""The Promela models say of the code what the code does, and spin finds nothing against them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedfuse_shared.messages import Step
from fedfuse_shared.secagg.bounds import choose
from fedfuse_shared.secagg.site import SitePhase

MODELS = Path(__file__).parents[2] / "docs" / "model"
LYING = (MODELS / "lying-server.pml").read_text()
HONEST = (MODELS / "honest-server.pml").read_text()


def defined(text):
    return {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)$", text, re.MULTILINE)}


def test_the_phases_are_the_sites_own_in_their_order():
    phases = [phase.name for phase in SitePhase]
    named = defined(LYING)
    assert [named[name] for name in phases] == list(range(len(phases)))


def test_the_exchanges_are_those_of_a_round_in_their_order():
    exchanges = [step.name for step in Step if step.value.startswith("train.")]
    named = defined(HONEST)
    assert [named[name] for name in exchanges] == list(range(1, len(exchanges) + 1))


@pytest.mark.parametrize(("n", "colluders"), [(3, 0), (4, 1)])
def test_the_bounds_searched_are_the_usual_choice(n, colluders):
    bounds = choose(n)
    assert (bounds.threshold, bounds.colluders, bounds.min_survivors) == (3, colluders, 3)
    assert f'("N={n}", "T=3"' in (MODELS / "check.py").read_text()


@pytest.mark.deployment
def test_every_sound_model_holds_and_every_broken_one_is_caught():
    done = subprocess.run(
        [sys.executable, MODELS / "check.py"], capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| holds |") == 8
    assert done.stdout.count("| caught |") == 10
