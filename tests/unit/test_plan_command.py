"""`fedfuse plan` as a planner sees it: the printed plan, JSON, a data folder, and what cannot be planned."""

import json
import subprocess
import sys

import pytest
from support.data_folder import rows, write_folder
from typer import Typer
from typer.testing import CliRunner

from fedfuse_shared.errors import FedfuseError
from fedfuse_shared.ledger.records import Charge
from fedfuse_shared.models import layout
from fedfuse_shared.models.classifier import build_model
from fedfuse_shared.privacy.accountant import epsilon, epsilon_rdp
from fedfuse_simulations.plan_command import plan
from fedfuse_simulations.plan_population import from_folder, population
from fedfuse_simulations.settings import complete

pytestmark = pytest.mark.slow

FEW = ("--rounds", "2", "--epsilon", "20")
"""Few steps, and an epsilon that is accounted on the coarse grid: a calibration is then short."""
SITES = ("--sites", "6", "--records", "300")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def run(*arguments, columns=80):
    app = Typer()
    app.command()(plan)
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": str(columns)})


def found(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def planned():
    return found(*SITES, *FEW)


def test_the_noise_is_calibrated_and_both_bounds_are_shown(planned):
    given = planned["given"]
    charge = Charge(sampling_rate=0.5, noise_multiplier=given["noise_multiplier"], steps=2)
    assert epsilon([charge], 1e-5) == planned["epsilon_pld"] <= 20.0 < 1.02 * planned["epsilon_pld"]
    assert planned["epsilon_rdp"] == epsilon_rdp([charge], 1e-5) > planned["epsilon_pld"]
    assert given["noise_of_sum"] == pytest.approx(given["noise_multiplier"] * 6**0.5)


def test_every_alternative_costs_no_more(planned):
    assert len(planned["alternatives"]) > 20
    for one in planned["alternatives"]:
        charge = Charge(
            sampling_rate=one["sampling_rate"], noise_multiplier=one["noise_multiplier"], steps=one["rounds"]
        )
        assert epsilon([charge], 1e-5) <= 20.0


def test_the_guarantee_is_stated_with_unit_adjacency_and_adversary(planned):
    assert planned["adjacency"] == "add-or-remove-one-record"
    assert (planned["unit"], planned["against"]) == ("one record of one site", "everybody")
    text = " ".join(run(*SITES, *FEW).stdout.split())
    assert "per record of each site, adding or removing one record" in text
    assert "against everybody (trust = site): the server, other sites" in text


@pytest.mark.parametrize("columns", [80, 120])
def test_the_printed_plan_fits_and_marks_what_was_asked_and_what_is_recommended(columns, planned):
    result = run(*SITES, *FEW, columns=columns)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "…" not in result.stdout
    marks = [line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")]
    assert sum("*" in mark for mark in marks) == sum(">" in mark for mark in marks) == 1
    text = " ".join(result.stdout.split())
    best = planned["best"]
    if best == planned["given"]:
        assert "Keep the schedule." in text
    else:
        assert f"Recommended: {best['rounds']} rounds, q {best['sampling_rate']:g}" in text


def test_what_is_recommended_can_be_pasted_and_is_then_kept(tmp_path):
    """No spiral: what a plan recommends is the schedule it recommends when asked for that one."""
    hard = ("--sites", "6", "--records", "300", "--epsilon", "20")
    first = found(*hard, "--rounds", "2", "--classes", "10")
    file = tmp_path / "settings.toml"
    best = first["best"]
    file.write_text(
        f"rounds = {best['rounds']}\n[privacy]\nsampling_rate = {best['sampling_rate']}\n"
        f"expected_batch_size = {best['expected_batch_size']}\nclip = {best['clip']}\n"
        f"[training]\nlearning_rate = {best['learning_rate']}\n"
    )
    again = found(*hard, "--config", file)["best"]
    assert (again["rounds"], again["sampling_rate"]) == (best["rounds"], best["sampling_rate"])


def test_a_modality_below_its_noise_drowns_and_the_others_do_not():
    few = found("--sites", "6", "--records", "40", *FEW)
    totals = {name: m["felt"] for name, m in few["given"]["modalities"].items()}
    assert totals["text"] < 1 < totals["image"]
    assert few["given"]["drowns"] == [name for name, total in totals.items() if total < 1]
    text = " ".join(run("--sites", "6", "--records", "40", *FEW).stdout.split())
    assert "text drowns" in text
    assert "image drowns" not in text
    many = found("--sites", "6", "--records", "60000", *FEW)
    assert many["given"]["drowns"] == []


def test_harder_data_are_a_factor(planned):
    half = found(*SITES, *FEW, "--alignment", "0.5")
    for name, m in half["given"]["modalities"].items():
        assert m["felt"] == pytest.approx(planned["given"]["modalities"][name]["felt"] / 4)
    assert [a["rounds"] for a in half["alternatives"]] == [a["rounds"] for a in planned["alternatives"]]


def test_a_data_folder_is_counted_and_its_holder_is_warned(tmp_path):
    records = rows(16)
    for index, row in enumerate(records):
        row["site"] = ("lyon", "turin", "bern")[index % 3]
        row["text"] = "" if index % 4 == 0 else row["text"]
    folder = write_folder(tmp_path / "data", records)
    counted = found("--data", folder, *FEW)
    train = [row for row in records if row["split"] == "train"]
    assert counted["sites"] == 3
    assert counted["classes"] == 2
    assert sum(counted["records"]) == len(train)
    wanted = sum(bool(row["text"]) for row in train) / len(train)
    assert counted["assumptions"]["parts"]["text"]["record_share"] == pytest.approx(wanted)
    # The divisor is the settings' own: a count of records would tell it to whoever sees the offer.
    assert counted["given"]["expected_batch_size"] == 128
    text = " ".join(run("--data", folder, *FEW).stdout.split())
    assert "this is for whoever holds the data. Nothing of it left this machine" in text
    assert "whoever holds the data" not in run(*SITES, *FEW).stdout


def test_the_coordinates_are_those_of_the_model(tmp_path):
    records = rows(12)
    for index, row in enumerate(records):
        row["site"] = ("lyon", "turin", "bern")[index % 3]
    holding = from_folder(write_folder(tmp_path / "data", records))
    config = complete({"model": {"image": {"size": 16}}}, holding.dataset.info)
    sizes = {part.name: part.size for part in population(holding, config, 3).parts}
    segments = layout(build_model(config.model, 0))
    assert sizes == {s.modality.value: s.size for s in segments if s.modality}


def test_settings_of_a_file_hold_and_a_pinned_multiplier_is_replaced_aloud(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(
        "rounds = 2\n[privacy]\nepsilon = 20.0\nsampling_rate = 1.0\nclip = 2.0\nnoise_multiplier = 0.25\n"
        '[model]\nclasses = ["a", "b", "c"]\n[model.encoders.image]\nname = "image-conv"\n'
    )
    planned = found(*SITES, "--config", file)
    assert (planned["given"]["sampling_rate"], planned["given"]["clip"]) == (1.0, 2.0)
    assert planned["given"]["noise_multiplier"] > 0.25
    assert planned["classes"] == 3
    assert list(planned["given"]["modalities"]) == ["image"]
    assert planned["assumptions"]["unmeasured"] == ["image-conv"]
    text = " ".join(run(*SITES, "--config", file).stdout.split())
    assert "noise_multiplier was left out" in text
    assert "image-conv was not measured" in text


def test_no_learning_rate_is_made_up_for_an_adaptive_optimiser(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[privacy]\nsampling_rate = 1.0\n[aggregation]\noptimizer = "fedadam"\n')
    assert found(*SITES, *FEW, "--config", file)["best"]["learning_rate"] is None
    assert "No learning rate is predicted" in " ".join(run(*SITES, *FEW, "--config", file).stdout.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--records", "300"), "add --sites and --records"),
        (("--sites", "6"), "add --sites and --records"),
        (("--sites", "2", "--records", "300"), "3 to 10000 sites, not 2; with two"),
        (("--sites", "101", "--records", "300"), "sparse"),
        (("--sites", "6", "--records", "0"), "0 training records"),
        (("--sites", "6", "--records", "-5"), "-5 training records"),
        ((*SITES, "--epsilon", "0"), "epsilon 0 is not a positive number; 1 to 10 is usual"),
        ((*SITES, "--epsilon", "-1"), "epsilon -1 is not a positive number"),
        ((*SITES, "--epsilon", "nan"), "epsilon nan is not a positive number"),
        ((*SITES, "--epsilon", "inf"), "epsilon inf is not a positive number"),
        ((*SITES, "--delta", "0"), "delta 0 does not lie between"),
        ((*SITES, "--delta", "nan"), "delta nan does not lie between"),
        ((*SITES, "--rounds", "0"), "0 rounds train nothing; plan at least one"),
        ((*SITES, "--classes", "1"), "1 classes leave nothing to learn"),
        ((*SITES, "--alignment", "nan"), "--alignment nan"),
        ((*SITES, "--trust", "none"), "nothing to plan"),
        ((*SITES, "--trust", "aggregate"), "is not forecast yet; plan with --trust site"),
        ((*SITES, "--trust", "all"), "trust"),
        (("--data", "nowhere"), "nowhere"),
        ((*SITES, "--config", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_what_cannot_be_planned_is_one_line_of_advice(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = run(*arguments).exception
    assert isinstance(problem, FedfuseError)
    assert problem.exit_code == 2
    assert said in str(problem)
    assert "\n" not in str(problem)


def test_a_folder_and_numbers_contradict_each_other(tmp_path):
    folder = write_folder(tmp_path / "data")
    assert "leave out --sites" in str(run("--data", folder, "--sites", "6").exception)
    assert "has 2 sites" in str(run("--data", folder).exception)


def test_an_error_ends_the_process_with_2_and_one_line():
    code = "import sys; from fedfuse_shared.cli import main; sys.argv[0] = 'fedfuse'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--sites", "2", "--records", "9"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: a round has 3")
    assert done.stderr.count("\n") == 1


def test_the_command_itself_loads_nothing_heavy():
    code = (
        "import sys, fedfuse_simulations.plan_command;"
        "sys.exit(bool({'pydantic', 'numpy', 'torch', 'rich.progress'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
