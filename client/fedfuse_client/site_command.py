"""``fedfuse site``: what a site's operator looks after; needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedfuse_client.join_command import init, join
from fedfuse_client.leave_command import leave
from fedfuse_client.preflight_command import preflight
from fedfuse_client.status_command import status

if TYPE_CHECKING:
    from fedfuse_client.budget import Statement

app = typer.Typer(help="Set up, check, run and look after a site.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The site's folder, with policy.toml and store.db.")]

app.command()(init)
app.command()(join)
app.command()(preflight)
app.command()(status)
app.command()(leave)

_BAR = 40
_BLOCKS = "▁▂▃▄▅▆▇█"


@app.command()
def budget(
    folder: Folder,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show what each data set has spent, by whom, what is left, and how many more rounds fit.

    Everything comes from the site's own store, also while the site is at work: the server is not asked.
    """
    from pydantic_core import to_json
    from rich.console import Console

    from fedfuse_client.budget import statements
    from fedfuse_client.home import SiteHome

    home = SiteHome(folder)
    policy = home.load_policy()
    with home.view_store() as store, Console(stderr=True).status("accounting"):
        found = statements(store, policy)
    if json:
        typer.echo(to_json({"site": policy.site, "budgets": found}))
        return
    console = Console()
    if not found:
        console.print(f"{policy.site}: nothing was ever charged; the cap is epsilon {policy.epsilon_cap:g}")
    for statement in found:
        _show(console, policy.site, statement)


@app.command()
def run(
    folder: Folder,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No encryption; only to a server on this machine, for trials.")
    ] = False,
    json_logs: Annotated[
        bool, typer.Option("--json-logs", help="Show one JSON object per event, for a log collector.")
    ] = False,
) -> None:
    """Take part: answer the server's messages until told to end (SIGTERM, or Ctrl-C).

    Messages are answered by the fedfuse that is installed here, within policy.toml; nothing that a server sends is
    ever executed. An edited policy.toml holds from the next message on.
    """
    from fedfuse_client.run_command import run_site

    run_site(folder, insecure=insecure, json_logs=json_logs)


@app.command()
def code() -> None:
    """Print the hash of the fedfuse code installed here, for `code` in policy.toml.

    A site whose policy names hashes takes part only with that code: an upgrade nobody reviewed is refused.
    """
    from fedfuse_client.code import code_hash

    typer.echo(code_hash())


@app.command()
def models(
    config: Annotated[
        Path, typer.Argument(help="A run's settings, config.toml, as the coordinator sends them.")
    ],
) -> None:
    """Print the hash of the model in a run's settings, for `models` in policy.toml."""
    from fedfuse_shared.config.federation import RunConfig
    from fedfuse_shared.config.files import load_toml
    from fedfuse_shared.offer import architecture_hash

    typer.echo(architecture_hash(load_toml(config, RunConfig).model))


@app.command()
def backup(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
) -> None:
    """Write a copy of the store, also while the site is at work, without the secrets of rounds in progress.

    A site restored from it refuses to train once the ledger shows something that the copy lacks: put back the newest
    one, and never run two copies of a site.
    """
    from fedfuse_client.home import SiteHome

    with SiteHome(folder).view_store() as store:
        store.backup(target)
    typer.echo(target)


def _show(console: object, site: str, statement: Statement) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    spent, cap = statement.epsilon, statement.cap
    filled = min(_BAR, round(_BAR * spent / cap))
    style = "red" if spent > 0.9 * cap else "yellow" if spent > 0.6 * cap else "green"
    name = ", ".join(f"{identifier[:12]}…" for identifier in statement.datasets)
    console.print(f"[bold]{site}[/bold], data set {name}", highlight=False)
    bar = f"[{style}]{'█' * filled}[/]{'░' * (_BAR - filled)}"
    console.print(f"{bar} epsilon {spent:.3f} of {cap:g} at delta {statement.delta:g}", highlight=False)
    if not statement.curve:
        return
    top = max(cap, spent)
    line = "".join(_BLOCKS[min(7, int(8 * value / top))] for _, value in statement.curve)
    console.print(f"{line} over {statement.curve[-1][0]} charged rounds", highlight=False)
    table = Table()
    table.add_column("federation")
    for heading in ("charged rounds", "steps", "epsilon alone"):
        table.add_column(heading, justify="right")
    for share in statement.shares:
        table.add_row(share.federation, str(share.rounds), str(share.steps), f"{share.epsilon:.3f}")
    console.print(table)
    more = statement.more_rounds
    console.print(
        f"{more} more round{'' if more == 1 else 's'} like the last one fit under the cap."
        if more
        else "No further round like the last one fits: raise epsilon_cap in policy.toml, or stop."
    )
    console.print("Adjacency: add or remove one record. Charges of a crash or an aborted attempt stay.")
