"""The wheel: what is in it, and that each role works where only that role's requirements are installed.

No network: an environment per extra holds links to the installed distributions that the wheel's own metadata asks
for, directly or not, and nothing else.
"""

import email
import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.small_federation import SmallFederation, write_data

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"fedfuse_client", "fedfuse_server", "fedfuse_shared", "fedfuse_simulations"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy: others may write to the tree while it is built
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "bench")
    shutil.copytree(ROOT, source, ignore=ignored)
    shutil.copy(ROOT / ".gitignore", source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out / "dist", source]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = (out / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def installed(metadata, extra):
    """Return the distributions that an install of the wheel with an extra brings, by canonical name."""
    found = {}
    seen = set()
    todo = [("fedfuse", extra)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name == "fedfuse":
            lines = metadata.get_all("Requires-Dist")
        else:
            found[name] = importlib.metadata.distribution(name)
            lines = found[name].requires or []
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                below = canonicalize_name(requirement.name)
                todo += [(below, extra) for extra in ("", *requirement.extras)]
    return found


class Environment:
    """A virtual environment with the wheel and what one extra requires."""

    def __init__(self, folder, wheel, metadata, extra):
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        (packages,) = folder.glob("lib/python*/site-packages")
        for distribution in installed(metadata, extra).values():
            tops = {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}
            for top in tops:
                target = Path(distribution.locate_file(top)).resolve()
                if target.exists() and not (packages / top).exists():
                    (packages / top).symlink_to(target)
        command = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet"]
        options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
        subprocess.run([*command, *options, wheel], check=True, capture_output=True, timeout=120)

    def fedfuse(self, *arguments):
        return self._run(self.bin / "fedfuse", *arguments)

    def fedfuse_without(self, modules, *arguments):
        """Run a command in a process in which some modules cannot be imported."""
        block = "; ".join(f"sys.modules[{module!r}] = None" for module in modules)
        code = f"import sys; {block}; sys.argv[0] = 'fedfuse'; from fedfuse_shared.cli import main; main()"
        return self._run(self.bin / "python", "-I", "-c", code, *arguments)

    def import_all(self, *packages):
        code = (
            "import importlib, pkgutil, sys\n"
            "for name in sys.argv[1:]:\n"
            "    package = importlib.import_module(name)\n"
            "    print(package.__file__)\n"
            "    for module in pkgutil.walk_packages(package.__path__, name + '.'):\n"
            "        importlib.import_module(module.name)\n"
        )
        done = self._run(self.bin / "python", "-I", "-c", code, *packages)
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():  # not the checkout's
            assert Path(line).is_relative_to(self.bin.parent)

    def _run(self, *command):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.bin.parent), "FLWR_TELEMETRY_ENABLED": "0"}
        return subprocess.run(
            list(map(str, command)),
            check=False,
            capture_output=True,
            text=True,
            timeout=240,
            cwd=self.bin.parent,
            env=environment,
        )


@pytest.fixture
def environment(tmp_path, wheel, metadata):
    return lambda extra: Environment(tmp_path / "venv", wheel, metadata, extra)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    federation = SmallFederation(tmp_path_factory.mktemp("federation"), {"rounds": 1})
    federation.run()
    return federation.home


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = tops - PACKAGES
    assert info == "fedfuse-0.1.0.dist-info"
    assert tops >= PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    sources = {
        path.relative_to(ROOT / root).as_posix()
        for root in ("client", "server", "shared", "simulations")
        for path in (ROOT / root).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.split("/")[0] in PACKAGES} == sources


def test_version_and_changelog_agree(metadata):
    assert metadata["Version"] == "0.1.0"
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## Unreleased"
    assert headings[1].startswith("## 0.1.0 - 20")


def test_an_auditor_needs_no_torch(environment, run):
    auditor = environment("")
    assert auditor.fedfuse("--version").stdout == "fedfuse 0.1.0\n"
    auditor.import_all("fedfuse_server.audit", "fedfuse_shared.ledger")
    done = auditor.fedfuse("audit", run.ledger, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    for command in (["simulate"], ["predict", run.root, "--text", "x"]):
        done = auditor.fedfuse(*command)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "is not installed; pip install 'fedfuse[simulation]'" in line


def test_a_site_has_what_its_modules_import_and_checks_data_without_torch(environment, run):
    site = environment("site")
    site.import_all("fedfuse_client", "fedfuse_shared")
    done = site.fedfuse_without(["torch", "flwr"], "data", "check", run.root.parent / "data")
    assert done.returncode == 0, done.stderr
    assert "no problems" in done.stdout


def test_a_server_has_what_its_modules_import(environment, run):
    server = environment("server")
    # Not all of fedfuse_shared: noise is drawn at sites alone.
    server.import_all(
        "fedfuse_server", *(f"fedfuse_shared.{part}" for part in ("ledger", "models", "secagg"))
    )
    done = server.fedfuse("audit", run.ledger)
    assert done.returncode == 0, done.stderr


def test_a_simulation_runs_from_the_wheel(environment, tmp_path):
    researcher = environment("simulation")
    researcher.import_all(*sorted(PACKAGES))
    data = write_data(tmp_path / "data", rows_per_site=16)
    out = tmp_path / "run"
    done = researcher.fedfuse(
        "simulate", "--data", data, "--rounds", "2", "--epsilon", "50", "--out", out, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 2
    done = researcher.fedfuse("predict", out, "--text", "round", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["modalities"] == ["text"]
    done = researcher.fedfuse("audit", out / "ledger.jsonl")
    assert done.returncode == 0, done.stderr
