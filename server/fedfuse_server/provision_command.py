"""``fedfuse provision``: a federation's keys, roster and kits, from the sites' requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def provision(
    config: Annotated[
        Path, typer.Argument(help="The federation's settings, federation.toml.", metavar="FEDERATION.TOML")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")] = Path("kits"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Make a federation: certificate authority, signed roster, the server's folder and one kit per site.

    Sites make their own private keys before (fedfuse site init) and send their request.json; put those into the
    folder that `requests` names.
    """
    from pydantic_core import to_json
    from rich.console import Console
    from rich.table import Table

    from fedfuse_server.provisioning import load_federation
    from fedfuse_server.provisioning import provision as write

    settings = load_federation(config)
    with Console(stderr=True).status("choosing the noise, making keys"):
        roster = write(settings, out)
    if json:
        typer.echo(to_json({"out": str(out), "roster_hash": roster.hash(), "sites": sorted(roster.sites)}))
        return
    console = Console()
    table = Table(title=f"Federation {roster.federation}: {len(roster.sites)} sites", title_justify="left")
    for heading in ("folder", "goes to", "holds"):
        table.add_column(heading, overflow="fold")
    table.add_row(
        f"{out}/operator", "you; keep it offline", "operator.key, ca.key: who holds them makes rosters"
    )
    table.add_row(f"{out}/server", "the server's machine", "settings, roster, server's keys and certificate")
    made = [f"{out}/{role}" for role in ("coordinator", "auditor") if (out / role).exists()]
    for folder in made:
        table.add_row(folder, f"the {Path(folder).name}s", "a key for each who gave none")
    for site in sorted(roster.sites):
        table.add_row(f"{out}/sites/{site}", site, "roster, kit, what to do; nothing secret")
    console.print(table)
    console.print("Compare each key with what its site told you by another way than its request:")
    for site, key in sorted(roster.sites.items()):
        console.print(f"{key} {site}", highlight=False, soft_wrap=True)
    console.print("Tell every site the roster hash by another way than its kit, for `fedfuse site join`:")
    console.print(roster.hash(), highlight=False, soft_wrap=True)
    names = sorted(settings.coordinators)
    console.print(
        f"Start the server: fedfuse server run {out}/server --as {out}/coordinator/{names[0]}.key",
        highlight=False,
        soft_wrap=True,
    )
