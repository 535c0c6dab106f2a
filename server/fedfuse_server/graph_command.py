"""``fedfuse graph``: how few neighbours a large federation needs, and why."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated

import typer

from fedfuse_shared.errors import ConfigError
from fedfuse_shared.secagg.sparse import ETA, SIGMA, Choice, chances, choose_graph


def graph(
    sites: Annotated[int, typer.Argument(help="Sites in one round, n.", metavar="SITES")],
    corruption: Annotated[float, typer.Option(help="Share of the sites that may collude.")] = 0.05,
    dropout: Annotated[float, typer.Option(help="Share of the sites that may be missing.")] = 0.05,
    sigma: Annotated[
        int, typer.Option(min=20, max=128, help="At most 2^-SIGMA that a round gives a site away.")
    ] = SIGMA,
    eta: Annotated[int, typer.Option(min=1, max=128, help="At most 2^-ETA that it cannot be opened.")] = ETA,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Choose the neighbours and the threshold of a sparse graph, and show why.

    A sparse graph holds only if the server keeps to the protocol. Up to 100 sites use the complete graph, which holds
    against one that lies.
    """
    if not (0 <= corruption < 1 and 0 <= dropout < 1):
        raise ConfigError("shares lie between 0 and 1", advice="correct --corruption or --dropout")
    colluders, least = math.ceil(corruption * sites), sites - math.ceil(dropout * sites)
    choice = choose_graph(sites, colluders=colluders, min_survivors=least, sigma=sigma, eta=eta)
    if json:
        typer.echo(_as_json(choice))
    else:
        _show(choice, sigma, eta)


def _as_json(choice: Choice) -> str:
    from pydantic_core import to_json

    found = choice.chances
    return to_json(
        {
            "sites": choice.sites,
            "neighbours": choice.neighbours,
            "threshold": choice.threshold,
            "colluders": choice.colluders,
            "min_survivors": choice.min_survivors,
            "log2_exposed": _log2(found.exposed),
            "log2_split": _log2(found.split),
            "log2_stuck": _log2(found.stuck),
        }
    ).decode()


def _show(choice: Choice, sigma: int, eta: int) -> None:
    from rich.console import Console
    from rich.table import Table

    n, k, t = choice.sites, choice.neighbours, choice.threshold
    c, m = choice.colluders, choice.min_survivors
    console = Console()
    console.print(
        f"[bold]{n} sites: {k} neighbours, threshold {t}[/bold]; {c} colluders, {n - m} dropouts",
        highlight=False,
    )
    table = Table(title="Chances in one round, exact, added up over all sites", title_justify="left")
    for heading in ("what may go wrong", "this graph", "allowed", f"{k - 2} neighbours"):
        table.add_column(heading, justify="left" if heading.startswith("what") else "right")
    found, fewer = choice.chances, chances(n, k - 2, min(t, k - 2), c, m) if k > 2 else None
    rows = (
        (f"a site has {t} corrupt neighbours: its masks can be opened", "exposed", sigma),
        (f"{k // 2} in a row are corrupt or gone: two sums instead of one", "split", sigma),
        (f"a site has fewer than {t} surviving neighbours: no sum", "stuck", eta),
    )
    for text, name, allowed in rows:
        other = _power(getattr(fewer, name)) if fewer else "-"
        table.add_row(text, _power(getattr(found, name)), f"2^-{allowed}", other)
    console.print(table)
    console.print(
        f"Keys, shares and masks per site: {k} instead of {n - 1}. A lying server can undo this: every site has to "
        'allow it with graphs = ["sparse"] in its policy.',
        highlight=False,
    )


def _log2(chance: Fraction) -> float | None:
    return math.log2(chance) if chance else None


def _power(chance: Fraction) -> str:
    power = _log2(chance)
    return "never" if power is None else f"2^{power:.1f}"
