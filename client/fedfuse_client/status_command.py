"""``fedfuse site status``: how a site stands, from its own folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from fedfuse_client.status import Attempt, Status

_MEANINGS: Final = {
    "reserved": "charged, no update was sent",
    "receipt": "charged, its update was sent",
    "refused": "nothing was charged",
}


def status(
    folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show whether the site is running, its last attempts, and what is spent and left.

    Everything comes from the site's own folder, also while the site is at work; the server is not asked.
    """
    from pydantic_core import to_json

    from fedfuse_client.home import SiteHome
    from fedfuse_client.status import status as look

    found = look(SiteHome(folder.absolute()))
    if json:
        typer.echo(to_json(found))
    else:
        _show(found)


def _show(found: Status) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, Text(value))  # Text: a reason somebody gave is not read as markup
    console = Console()
    console.print(table)
    if not found.attempts:
        console.print("No round was offered yet.")
        return
    attempts = Table(title="last attempts, the newest first", title_justify="left")
    for heading in ("leaf", "attempt", "came to", "steps", "why"):
        attempts.add_column(
            heading, overflow="fold", justify="right" if heading in {"leaf", "steps"} else "left"
        )
    for number, attempt in enumerate(reversed(found.attempts)):
        attempts.add_row(
            str(attempt.leaf),
            f"{attempt.context[:12]}…",
            attempt.stage.value,
            str(attempt.steps),
            Text(_why(attempt, in_progress=found.in_progress and number == 0)),
        )
    console.print(attempts)


def _rows(found: Status) -> list[tuple[str, str]]:
    rows = [
        ("site", found.site),
        ("federation", found.federation + (f", left: {found.left}" if found.left is not None else "")),
        ("running", f"yes, process {found.process}" if found.process else "no"),
        ("chain", f"{found.leaves} {'leaf' if found.leaves == 1 else 'leaves'}"),
    ]
    for budget in found.budgets:
        more = (
            "" if budget.more_rounds is None else f", {budget.more_rounds} more rounds like the last one fit"
        )
        left = max(0.0, budget.cap - budget.epsilon)
        rows.append(
            (
                "spent",
                f"epsilon {budget.epsilon:.3f} of {budget.cap:g}, {left:.3f} left at delta {budget.delta:g}{more}",
            )
        )
    if not found.budgets:
        rows.append(("spent", "nothing was ever charged"))
    ends = found.authority_expires
    rows.append(("authority", f"expires {ends:%Y-%m-%d}" if ends else "ca.crt cannot be used"))
    return rows


def _why(attempt: Attempt, *, in_progress: bool) -> str:
    if in_progress and attempt.stage.value == "reserved":
        return "charged, in progress"
    return attempt.reason or _MEANINGS[attempt.stage.value]
