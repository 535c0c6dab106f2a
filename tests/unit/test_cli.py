"""The root command: fast help, commands from entry points, one-line errors, exit codes."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import typer

from fedfuse_shared.cli import GROUP, SUMMARIES


def fedfuse(*arguments, **options):
    code = "import sys; from fedfuse_shared.cli import main; sys.argv[0] = 'fedfuse'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom fedfuse_shared.cli import main\nsys.argv = ['fedfuse', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'flwr', 'pydantic', 'dp_accounting'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "[]"
    for name in SUMMARIES:
        assert name in done.stdout


def test_every_contributed_command_has_a_summary_and_the_summary_is_its_own():
    for point in entry_points(group=GROUP):
        target = point.load()
        text = target.__doc__ if callable(target) and target.__doc__ else None
        if isinstance(target, typer.Typer):
            text = target.info.help
        assert text, point.name
        assert text.strip().splitlines()[0] == SUMMARIES[point.name]


@pytest.mark.parametrize("command", sorted(SUMMARIES))
def test_every_command_explains_itself(command):
    done = fedfuse(command, "--help")
    assert done.returncode == 0
    assert "Usage: fedfuse " + command in done.stdout


def test_an_unknown_command_is_bad_usage():
    done = fedfuse("simulat")
    assert done.returncode == 2
    assert "simulat" in done.stderr


def test_a_fedfuse_error_is_one_line_with_advice(tmp_path):
    done = fedfuse("evaluate", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "config.toml" in line


def test_bad_settings_are_told_before_anything_is_written(tmp_path):
    settings = tmp_path / "s.toml"
    settings.write_text("[privacy]\nepsilonn = 3\n")
    out = tmp_path / "run"
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset.toml").write_text(
        'name = "x"\nclasses = ["a", "b"]\nmodalities = ["text"]\nrecord = "A line of text."\n'
    )
    done = fedfuse("simulate", "--data", str(data), "--config", str(settings), "--out", str(out))
    assert done.returncode == 2
    assert "did you mean epsilon?" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_an_impossible_epsilon_is_bad_input(tmp_path, value):
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset.toml").write_text(
        'name = "x"\nclasses = ["a", "b"]\nmodalities = ["text"]\nrecord = "A line of text."\n'
    )
    done = fedfuse("simulate", "--data", str(data), "--epsilon", value, "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "epsilon" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_version():
    assert fedfuse("--version").stdout.startswith("fedfuse ")


def test_json_mode_puts_one_object_on_standard_output(tmp_path):
    from support.small_federation import write_data

    done = fedfuse("data", "show", str(write_data(tmp_path / "d")), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)


def test_the_choice_of_a_graph_is_printed_with_its_reasons():
    done = fedfuse("graph", "1000")
    assert done.returncode == 0
    assert "1000 sites: 34 neighbours, threshold 18; 50 colluders, 50 dropouts" in done.stdout
    for reason in ("2^-41.2", "2^-48.4", "2^-37.4", "32 neighbours", 'graphs = ["sparse"]'):
        assert reason in done.stdout
    found = json.loads(fedfuse("graph", "1000", "--json").stdout)
    assert (found["neighbours"], found["threshold"], found["min_survivors"]) == (34, 18, 950)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("5",), "no sparse graph protects 5 sites"),
        (("1000", "--corruption", "1.5"), "shares lie between 0 and 1"),
        (("100000",), "3 to 10000 sites"),
    ],
)
def test_a_graph_that_cannot_be_is_one_line(arguments, said):
    done = fedfuse("graph", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
