"""``fedfuse server``: run a federation's server, take a site out of it, see where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table

from fedfuse_shared.errors import ConfigError

if TYPE_CHECKING:
    from fedfuse_server.status import Status

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Run a federation's server, take a site out of it, see where it stands.",
)

Home = Annotated[
    Path, typer.Argument(help="The server's folder.", metavar="HOME", exists=True, file_okay=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
KEY = "Signing key of a coordinator in the roster."


@app.command()
def run(
    home: Home,
    as_: Annotated[Path | None, typer.Option("--as", help=KEY, metavar="KEYFILE")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run begun here.")] = False,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for missing sites before going on with fewer.")
    ] = 300.0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104 - sites are elsewhere
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, anybody may connect; on 127.0.0.1 only, for tests.")
    ] = False,
    json: Json = False,
) -> None:
    """Run the rounds with the sites that connect, and audit the ledger at the end.

    It is stopped by Ctrl-C or SIGTERM and goes on with --resume. Logs are in HOME/logs.
    """
    from fedfuse_server.audit.sources import Sources
    from fedfuse_server.home import RunHome
    from fedfuse_server.serving import serve
    from fedfuse_server.status import status_of
    from fedfuse_server.supervisor import Listening
    from fedfuse_shared.ledger.verification import verify_ledger

    folder, console = RunHome(home), Console(stderr=True)
    listening = Listening(host, port, insecure)
    try:
        served = serve(folder, listening, as_, resume=resume, wait=wait, console=console)
    except KeyboardInterrupt:
        console.print(f"Stopped. Go on with: fedfuse server run {home} --resume", soft_wrap=True)
        raise typer.Exit(1) from None
    sources = Sources.beside(folder.ledger, None, None)
    roster = sources.load_roster(None)
    report = verify_ledger(sources.lines(), roster, sources.load_head(roster))
    status = status_of(folder)
    if json:
        summary = {
            "rounds": served.rounds,
            "stopped": served.stopped,
            "epsilon": {site.site: site.epsilon for site in status.sites},
            "audit": report.ok,
            "ledger": str(folder.ledger),
            "model": str(folder.model_file) if served.rounds else None,
            "seconds": round(served.seconds, 3),
        }
        typer.echo(to_json(summary))
    else:
        _show(Console(), status)
    if not report.ok or served.stopped:
        raise typer.Exit(1)


@app.command()
def revoke(
    home: Home,
    site: Annotated[str, typer.Argument(help="The site to take out.", metavar="SITE")],
    as_: Annotated[Path, typer.Option("--as", help=KEY, metavar="KEYFILE")],
    reason: Annotated[str, typer.Option(help="Why; it stands on the ledger.", metavar="TEXT")],
) -> None:
    """Take a site out of the federation for good: it is asked nothing any more and cannot connect.

    What it was charged for stays charged. A running server does it before its next attempt.
    """
    from fedfuse_server.home import RunHome
    from fedfuse_server.revocation import revoke_site
    from fedfuse_shared.keyfile import load_key

    if len(reason) > 400:
        raise ConfigError("the reason is over 400 characters", advice="shorten it")
    done = revoke_site(RunHome(home), site, load_key(as_), reason)
    if done:
        typer.echo(f"{site} is revoked.")
    else:
        typer.echo(f"{site} is revoked before the next attempt of the server that runs.")


@app.command()
def status(home: Home, json: Json = False) -> None:
    """Show the round, the sites and what they spent, and the last attempts; while the server runs and after."""
    from fedfuse_server.home import RunHome
    from fedfuse_server.status import status_of

    found = status_of(RunHome(home))
    if json:
        typer.echo(to_json(found))
    else:
        _show(Console(), found)


def _show(console: Console, status: Status) -> None:
    server = f"server runs (process {status.pid or '?'})" if status.running else "no server runs"
    console.print(f"{status.federation}: round {status.round} of {status.rounds}; {server}", markup=False)
    table = Table(title="Sites", title_justify="left")
    for heading in ("site", "is", "epsilon", "of", "rounds", "charged for"):
        table.add_column(heading, justify="left" if heading in {"site", "is"} else "right")
    for row in status.sites:
        table.add_row(
            row.site,
            row.state.value,
            "unbounded" if row.epsilon is None else f"{row.epsilon:.3f}",
            "-" if row.cap is None else f"{row.cap:g}",
            str(row.rounds),
            str(row.reservations),
        )
    console.print(table)
    for each in status.attempts:
        line = f"round {each.round}, attempt {each.attempt}: {each.outcome}"
        console.print(f"{line}: {each.reason}" if each.reason else line, markup=False, highlight=False)
