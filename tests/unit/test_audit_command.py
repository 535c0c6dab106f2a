"""`fedfuse audit` as people and scripts use it: what it prints, its exit codes, and what it never loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from support.federation import Federation
from support.ledgers import LedgerBuilder
from typer.testing import CliRunner

from fedfuse_server.audit.command import audit
from fedfuse_shared.config.base import OPERATOR, Trust
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.errors import DataError, FedfuseError, VerificationError
from fedfuse_shared.ledger.log import LedgerWriter
from fedfuse_shared.ledger.records import Charge, Reservation
from fedfuse_shared.ledger.verification_report import ADVICE, Code, Report

app = typer.Typer()
app.command()(audit)


def publish(builder: LedgerBuilder, folder: Path) -> Path:
    """Write what a server hands to an auditor."""
    writer = LedgerWriter(folder / "ledger.jsonl")
    writer.append(builder.leaves)
    writer.checkpoint("lab", builder.federation.server)
    writer.close()
    roster = seal(builder.federation.roster, OPERATOR, builder.federation.operator)
    (folder / "roster.json").write_bytes(encode(roster) + b"\n")
    return folder / "ledger.jsonl"


@pytest.fixture
def builder() -> LedgerBuilder:
    builder = LedgerBuilder().enrol()
    builder.round()
    builder.round()
    return builder


def run(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, FedfuseError):
        raise result.exception
    return result


def test_honest_ledger_holds(builder: LedgerBuilder, tmp_path: Path) -> None:
    result = run(publish(builder, tmp_path))
    assert result.exit_code == 0
    assert "The ledger holds." in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == f"Federation lab, roster {builder.federation.roster.hash()}"
    assert lines[1].startswith(f"Up to head {len(builder.leaves)}, root ")
    rows = [line.split() for line in lines if line.startswith("site0")]
    assert [row[0] for row in rows] == list(builder.federation.names)
    assert {row[2] for row in rows} == {"2/2"}
    assert {row[-1] for row in rows} == {"ok"}
    # Adjacency, delta, against whom, and what it does not prove are said wherever an epsilon is.
    for words in ("adding or removing one record", "delta 1e-05", "Against everybody", "Not proved"):
        assert words in result.stdout


def test_finding_is_one_line_with_its_leaf_and_what_to_do(builder: LedgerBuilder, tmp_path: Path) -> None:
    builder.policy("site02", schedule=Schedule.FREE)
    offer = builder.offer()
    charged = Charge(sampling_rate=0.01, noise_multiplier=1.5, steps=1)
    builder.reserve("site02", offer, charge=charged)
    builder.abort(offer)
    result = run(publish(builder, tmp_path))
    assert result.exit_code == 1
    leaf = builder.find(Reservation, "site02")[-1]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FINDING")]
    assert line.startswith(f"FINDING parameters (leaf {leaf}, site02): charges something else")
    assert "sampling rate 0.01 for 0.25" in line
    assert line.endswith(ADVICE[Code.PARAMETERS])
    status = {
        row[0]: row[-1] for row in map(str.split, result.stdout.splitlines()) if row and row[0] == "site02"
    }
    assert status == {"site02": "FINDINGS"}
    assert "1 finding: the ledger does not hold." in result.stdout


def test_spent_cap_is_said_in_words(tmp_path: Path) -> None:
    builder = LedgerBuilder(cap=1.0).enrol()
    for _ in range(4):
        builder.round()
    result = run(publish(builder, tmp_path))
    assert result.exit_code == 1
    assert result.stdout.count("OVER CAP") == 4
    assert "stop training on this data set" in result.stdout


def test_shared_noise_is_told_apart_by_whom_it_withstands(tmp_path: Path) -> None:
    builder = LedgerBuilder(Federation.of(5)).enrol()
    asked = builder.federation.offer().privacy
    shared = asked.model_copy(
        update={"trust": Trust.AGGREGATE, "noise_sites": 3, "noise_share": 1.5 / 3**0.5}
    )
    builder.round(privacy=shared, colluders=1, threshold=4, min_survivors=4)
    path = publish(builder, tmp_path)
    assert "up to 1 colluding sites" in run(path).stdout
    report = json.loads(run(path, "--json").stdout)
    for row in report["sites"]:
        assert (row["trust"], row["colluders"]) == ("aggregate", 1)
        assert row["epsilon_all_collude"] > 1.5 * row["epsilon"]


def test_free_schedules_are_pointed_out(builder: LedgerBuilder, tmp_path: Path) -> None:
    assert "Free schedules" not in run(publish(builder, tmp_path)).stdout
    for site in builder.federation.names:
        builder.policy(site, schedule=Schedule.FREE)
    asked = builder.federation.offer().privacy
    builder.round(privacy=asked.model_copy(update={"noise_multiplier": 2.0, "noise_share": 2.0}))
    again = tmp_path / "again"
    again.mkdir()
    assert "Free schedules" in run(publish(builder, again)).stdout


def test_json_is_one_object_with_the_published_keys(builder: LedgerBuilder, tmp_path: Path) -> None:
    result = run(publish(builder, tmp_path), "--json")
    assert result.stdout.count("\n") == 1
    shown = json.loads(result.stdout)
    assert list(shown) == ["ok", "leaves", "root", "sites", "findings"]
    assert set(shown["sites"][0]) == {
        "site", "dataset", "trust", "colluders", "epsilon", "epsilon_rdp", "epsilon_all_collude", "delta", "cap",
        "adjacency", "schedule", "rounds", "reservations", "unmatched", "mechanisms",
    }  # fmt: skip
    assert shown["ok"] is True
    assert shown["leaves"] == len(builder.leaves)
    assert Report.model_validate_json(result.stdout).ok


def test_sites_that_never_took_part_are_listed(tmp_path: Path) -> None:
    builder = LedgerBuilder().enrol()
    shown = json.loads(run(publish(builder, tmp_path), "--json").stdout)
    assert [(row["site"], row["dataset"], row["epsilon"]) for row in shown["sites"]] == [
        (site, None, 0.0) for site in builder.federation.names
    ]


def test_unbounded_spending_is_null(tmp_path: Path) -> None:
    builder = LedgerBuilder().enrol()
    asked = builder.federation.offer().privacy
    builder.round(privacy=asked.model_copy(update={"noise_multiplier": 1e-9, "noise_share": 1e-9}))
    path = publish(builder, tmp_path)
    result = run(path, "--json")
    assert result.exit_code == 1
    assert {row["epsilon"] for row in json.loads(result.stdout)["sites"]} == {None}
    assert "unbounded" in run(path).stdout


def test_files_may_lie_elsewhere(builder: LedgerBuilder, tmp_path: Path) -> None:
    path = publish(builder, tmp_path)
    (tmp_path / "other").mkdir()
    roster = (tmp_path / "roster.json").rename(tmp_path / "other" / "r.json")
    checkpoint = (tmp_path / "ledger.checkpoint").rename(tmp_path / "other" / "c")
    assert run(path, "--roster", roster, "--checkpoint", checkpoint).exit_code == 0
    with pytest.raises(DataError, match=r"roster\.json: cannot be read .* with --roster"):
        run(path)
    with pytest.raises(DataError, match=r"cannot be read .* with --checkpoint"):
        run(path, "--roster", roster)


def test_pinned_roster(builder: LedgerBuilder, tmp_path: Path) -> None:
    path = publish(builder, tmp_path)
    assert run(path, "--pin", builder.federation.roster.hash()).exit_code == 0
    with pytest.raises(VerificationError, match="is not the pinned") as caught:
        run(path, "--pin", "0" * 64)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["ledger.jsonl", "roster.json", "ledger.checkpoint"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"{}", b"x" * 70_000])
def test_unreadable_input_is_no_finding(
    builder: LedgerBuilder, tmp_path: Path, name: str, content: bytes | None
) -> None:
    """Exit code 2: nothing can be said of the ledger. (Here no content ends in a newline: each is a torn line.)"""
    path = publish(builder, tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        run(path)
    assert caught.value.exit_code == 2
    assert caught.value.advice


def test_every_finding_has_advice() -> None:
    assert set(ADVICE) == set(Code)


def test_audit_loads_neither_torch_nor_flower_nor_opacus(builder: LedgerBuilder, tmp_path: Path) -> None:
    """A whole audit through the real entry point, in a fresh process."""
    path = publish(builder, tmp_path)
    code = (
        "import sys; sys.argv[0] = 'fedfuse'\n"
        "from fedfuse_shared.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'dp_accounting' in sys.modules\n"
        "print(sorted({'torch', 'flwr', 'opacus', 'torchvision', 'sklearn'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "audit", str(path), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["ok"] is True
    assert done.stderr.strip() == "[]"


def test_exit_code_two_through_the_real_entry_point(tmp_path: Path) -> None:
    code = "from fedfuse_shared.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "audit", str(tmp_path / "none.jsonl")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
