"""What an independent review of the deployment found; each attack is run against the real thing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.deployed_site import write_site
from support.lone_site import Around
from support.served import free_port, three_sites

from fedfuse_client.answers import Fresh
from fedfuse_client.run_command import PROGRAM
from fedfuse_client.tied import tied
from fedfuse_server.supervisor import Listening, SuperLink

pytestmark = pytest.mark.filterwarnings("ignore")

SHADOW = """\
from pathlib import Path
(Path(__file__).parents[1] / "ran").touch()
raise SystemExit(3)
"""


# --- the folder a command is given in ------------------------------------------------------------------------------
@pytest.fixture
def where(tmp_path, monkeypatch) -> Path:
    """A folder somebody else fills (a kit that came by mail, a data folder, /tmp), and a person works in."""
    folder = tmp_path / "kit"
    for package in ("fedfuse_client", "fedfuse_server", "fedfuse_shared", "flwr"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(SHADOW)
    monkeypatch.chdir(folder)
    return folder


def test_that_folder_would_be_imported_from(where):
    """The attack itself: Python puts the working directory first for ``-m``."""
    assert subprocess.run([sys.executable, "-m", "fedfuse_client.tied"], check=False).returncode == 3
    assert (where / "ran").exists()


def test_the_supernode_of_a_site_is_not_taken_from_there(where):
    done = subprocess.run(tied([*PROGRAM, "--version"]), capture_output=True, text=True, check=False)
    assert not (where / "ran").exists(), done.stderr
    assert done.stdout.startswith("Flower version")


def test_no_answer_is_computed_by_code_from_there(where, tmp_path):
    home = write_site(tmp_path / "site", Around(), warm=False)
    home.logs.mkdir()
    Fresh(home, home.logs / "answers.log").close()  # asks a process at once
    assert not (where / "ran").exists()


@pytest.mark.slow
def test_the_superlink_is_not_taken_from_there(where, tmp_path):
    home = three_sites(tmp_path / "federation").home
    superlink = SuperLink(home, Listening("127.0.0.1", free_port(), insecure=True))
    home.logs.mkdir()
    superlink._start()  # not `ensure`, which would try it again and again
    try:
        assert superlink._answers()
    finally:
        superlink.stop()
    assert not (where / "ran").exists()
