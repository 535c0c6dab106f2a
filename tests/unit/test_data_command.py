"""`fedfuse data check` and `fedfuse data show` as an operator sees them."""

import json
import subprocess
import sys

import pytest
from support.data_folder import rows, write_folder, write_manifest
from typer.testing import CliRunner

from fedfuse_client.data.command import app
from fedfuse_shared.errors import DataError


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_check_of_a_good_folder(folder):
    result = run("check", folder)
    assert (result.exit_code, result.stdout) == (0, f"{folder}: no problems\n")


def test_check_prints_a_line_per_problem(folder):
    records = rows()
    records[0]["label"] = "cow"
    write_manifest(folder, records)
    (folder / "images/1.png").write_bytes(b"nothing")
    result = run("check", folder)
    assert result.exit_code == 1
    first, second, last = result.stdout.splitlines()
    assert first == "manifest.csv row 2 column label: 'cow' is not among the classes of dataset.toml"
    assert second.startswith("manifest.csv row 3 column image: 'images/1.png' is not an image")
    assert last == f"{folder}: 2 problems"


def test_quick_check_opens_nothing_and_says_so(folder):
    (folder / "images/1.png").write_bytes(b"nothing")
    result = run("check", "--quick", folder)
    assert (result.exit_code, result.stdout) == (0, f"{folder}: no problems (files were not opened)\n")


def test_check_as_json_is_one_object(folder):
    (folder / "images/1.png").write_bytes(b"nothing")
    result = run("check", folder, "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert (problem["file"], problem["row"], problem["column"]) == ("manifest.csv", 3, "image")
    assert problem["code"] == "unreadable"
    assert not result.stderr


def test_show_counts_per_site(folder):
    records = rows()
    records[1]["image"] = ""
    records[3]["text"] = ""
    write_manifest(folder, records)
    result = run("show", folder, "--json")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["sites"]["lyon"] == {
        "records": 2,
        "train": 1,
        "test": 1,
        "with": {"text": 1, "image": 1, "audio": 2},
        "complete": 0,
        "classes": {"cat": 1, "dog": 1},
    }
    assert summary["all"]["records"] == 4
    assert summary["all"]["complete"] == 2


def test_show_fits_a_terminal(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run("show", folder)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "animals: One animal" in lines[0]
    (lyon,) = [" ".join(line.split()) for line in lines if line.startswith("lyon")]
    assert lyon == "lyon 2 1 1 2 2 2 2 50.0% to 50.0%"
    assert "…" not in result.stdout


def test_show_does_not_read_markup(folder):
    toml = folder / "dataset.toml"
    toml.write_text(toml.read_text().replace("One animal", "[red]One animal[/red]"))
    assert "[red]One animal[/red]" in run("show", folder).stdout


def test_show_refuses_a_folder_with_a_problem(folder):
    (folder / "images/0.png").unlink()
    result = run("show", folder)
    assert isinstance(result.exception, DataError)
    assert "row 2" in str(result.exception)
    assert "fedfuse data check" in str(result.exception)


def test_the_command_itself_loads_nothing_heavy():
    code = (
        "import sys, fedfuse_client.data.command;"
        "sys.exit(bool({'pydantic', 'numpy', 'torch', 'rich.progress', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
