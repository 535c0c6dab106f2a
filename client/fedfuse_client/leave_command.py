"""``fedfuse site leave``: take part in nothing any more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def leave(
    folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; everybody who reads the ledger sees it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Leave the federation for good: sign it, and from then on refuse every offer.

    Stop the site first. What its data have spent stays charged; keep the store, for it remembers that.
    """
    from fedfuse_client.home import SiteHome
    from fedfuse_client.leaving import leave as sign

    home = SiteHome(folder)
    policy = home.load_policy()
    if not yes:
        typer.echo(
            f"{policy.site} leaves federation {policy.federation} for good. The ledger will say: {reason}"
        )
        if not typer.confirm("Leave?"):
            typer.echo("Nothing was changed.")
            raise typer.Exit(1)
    leaf = sign(home, reason).body
    typer.echo(f"{policy.site} left federation {policy.federation}: leaf {leaf.seq} of its chain says so.")
    typer.echo(
        f"The server does not know yet: run the site (fedfuse site run {folder}) until it has asked for it."
    )
