"""An audit's report for people: a table, the findings with what to do about each, and what it does not prove."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fedfuse_shared.config.base import Trust
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.ledger.verification_budget import over
from fedfuse_shared.ledger.verification_report import ADVICE, Finding, Report, SiteReport
from fedfuse_shared.roster import Roster

_NOT_PROVED = (
    "Not proved by any ledger: that noise and sampling were really drawn, that data sets of two sites do not "
    "overlap, that the model is the sum, that a site restored from a backup was not fooled, or that nobody is "
    "shown another ledger: the verdict holds up to this head."
)
_SHOWN = 100
"""Most findings that are printed; --json has them all."""


def show(report: Report, roster: Roster, console: Console) -> None:
    """Print a report; what is not the table is one line each, however long, so that it can be searched."""
    for part in _parts(report, roster):
        console.print(part, soft_wrap=isinstance(part, Text), highlight=False)


def _parts(report: Report, roster: Roster) -> Iterator[RenderableType]:
    yield Text(f"Federation {roster.federation}, roster {roster.hash()}")
    yield Text(f"Up to head {report.leaves}, root {report.root}")
    yield _table(report)
    yield Text(_meaning(report.sites))
    if any(row.schedule is Schedule.FREE for row in report.sites):
        yield Text(
            "Free schedules: the policies let mechanisms change or evaluate under the budget, so epsilon is by Renyi "
            "accounting, which holds even if they were chosen after seeing results."
        )
    yield Text(_NOT_PROVED)
    yield Text()
    for finding in report.findings[:_SHOWN]:
        yield _line(finding)
    if len(report.findings) > _SHOWN:
        yield Text(f"and {len(report.findings) - _SHOWN} more: fedfuse audit --json lists them")
    count = "1 finding" if len(report.findings) == 1 else f"{len(report.findings)} findings"
    verdict = "The ledger holds." if report.ok else f"{count}: the ledger does not hold."
    yield Text(verdict, style="bold green" if report.ok else "bold red")


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("site")
    table.add_column("data set")
    for name in ("rounds", "epsilon", "RDP", "all collude", "cap", "left"):
        table.add_column(name, justify="right")
    table.add_column("status")
    blamed = {finding.site for finding in report.findings}
    for row in report.sites:
        status, style = _status(row, blamed=row.site in blamed)
        table.add_row(
            row.site,
            f"{row.dataset[:8]}…" if row.dataset else "none",
            f"{row.rounds}/{row.reservations}",
            _spent(row.epsilon),
            _spent(row.epsilon_rdp),
            _spent(row.epsilon_all_collude),
            "none" if row.cap is None else f"{row.cap:g}",
            "-" if row.cap is None else f"{_left(row):.3f}",
            Text(status, style=style),
        )
    return table


def _status(row: SiteReport, *, blamed: bool) -> tuple[str, str]:
    if row.trust is Trust.NONE:
        return "NO PRIVACY", "bold red"
    if row.epsilon is None or (row.cap is not None and over(row.epsilon, row.cap)):
        return "OVER CAP", "bold red"
    if blamed:
        return "FINDINGS", "bold red"
    if row.cap is None:
        return "no policy", "yellow"
    return ("ok", "green") if row.reservations else ("idle", "dim")


def _left(row: SiteReport) -> float:
    if row.cap is None or row.epsilon is None:
        return 0.0
    return math.floor(max(0.0, row.cap - row.epsilon) * 1000) / 1000


def _spent(value: float | None) -> str:
    """Round up: what is shown is never less than what was spent."""
    return "unbounded" if value is None else f"{math.ceil(value * 1000) / 1000:.3f}"


def _meaning(sites: tuple[SiteReport, ...]) -> str:
    """Say what the numbers mean: adjacency, delta, and against whom."""
    deltas = ", ".join(sorted({f"{row.delta:g}" for row in sites if row.delta is not None})) or "none"
    text = (
        f"epsilon: spent, upper bound at delta {deltas}, for adding or removing one record of one site; over every "
        "reservation, whether or not its round was opened. rounds: opened with the site's update, of those charged."
    )
    if any(row.trust is Trust.NONE for row in sites):
        return f"{text} NO PRIVACY: with trust = none sites trained without a guarantee, as their policies allowed."
    withstood = {row.colluders for row in sites if row.trust is Trust.AGGREGATE}
    if withstood:
        least = min(count for count in withstood if count is not None)
        return f"{text} Against the server with up to {least} colluding sites; 'all collude' is against everybody."
    return f"{text} Against everybody: the server and all other sites together (trust = site)."


def _line(finding: Finding) -> Text:
    place = "ledger" if finding.leaf is None else f"leaf {finding.leaf}"
    who = f", {finding.site}" if finding.site else ""
    text = Text("FINDING ", style="red")
    text.append(
        f"{finding.code.value} ({place}{who}): {finding.detail}; {ADVICE[finding.code]}", style="default"
    )
    return text
