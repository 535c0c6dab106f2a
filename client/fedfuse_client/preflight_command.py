"""``fedfuse site preflight``: can this site take part? A line for each thing that could stop it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from fedfuse_client.preflight import Finding

_COLOURS: Final = {"pass": "green", "warn": "yellow", "fail": "red", "skip": "bright_black"}


def preflight(
    folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    offline: Annotated[bool, typer.Option("--offline", help="Do not connect to the server.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check everything a site needs before it runs: a line each, and what to do; exit code 1 if anything fails.

    Nothing is changed, and nothing of a record is shown. It may be run while the site is at work.
    """
    from pydantic_core import to_json

    from fedfuse_client.home import SiteHome
    from fedfuse_client.preflight import passed
    from fedfuse_client.preflight import preflight as checks

    findings = []
    for finding in checks(SiteHome(folder.absolute()), offline=offline):
        findings.append(finding)
        if not json:
            _show(finding)
    if json:
        typer.echo(to_json({"passed": passed(findings), "checks": findings}))
    if not passed(findings):
        raise typer.Exit(1)


def _show(finding: Finding) -> None:
    state = typer.style(finding.state.value, fg=_COLOURS[finding.state.value])
    typer.echo(
        f"{state}  {finding.check:<9} {finding.found}{f'; {finding.advice}' if finding.advice else ''}"
    )
