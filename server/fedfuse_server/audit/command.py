"""``fedfuse audit``: check a ledger and recompute every site's spent privacy, trusting nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def audit(
    ledger: Annotated[Path, typer.Argument(help="The ledger, ledger.jsonl.", metavar="LEDGER")],
    roster: Annotated[
        Path | None,
        typer.Option(help="The operator's signed roster; roster.json beside the ledger if left out."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The server's checkpoint; ledger.checkpoint beside the ledger if left out."),
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Hash the roster must have, as the operator published it."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check a ledger and recompute every site's spent privacy, trusting nobody.

    Exit codes: 0 the ledger holds, 1 there are findings, 2 something could not be read.
    """
    from rich.console import Console

    from fedfuse_server.audit.progress import counted
    from fedfuse_server.audit.sources import Sources
    from fedfuse_server.audit.text import show
    from fedfuse_shared.ledger.verification import verify_ledger

    sources = Sources.beside(ledger, roster, checkpoint)
    enrolled = sources.load_roster(pin)
    head = sources.load_head(enrolled)
    with counted(sources.lines(), head.size) as lines:
        report = verify_ledger(lines, enrolled, head)
    if json:
        typer.echo(report.model_dump_json())
    else:
        console = Console()
        if not console.is_terminal:  # a file or a pipe is as wide as it has to be
            console.width = 160
        show(report, enrolled, console)
    if not report.ok:
        raise typer.Exit(1)
