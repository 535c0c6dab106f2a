"""``fedfuse plan``: what a schedule's noise leaves of the signal, and which schedule leaves more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    sites: Annotated[int | None, typer.Option(help="Sites that take part.", show_default=False)] = None,
    records: Annotated[
        int | None, typer.Option(help="Training records at each site, as far as may be said.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds to plan.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy per record over all planned rounds.")] = None,
    delta: Annotated[float | None, typer.Option(help="Probability with which epsilon may not hold.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A data folder: sites, records, classes and modalities are counted in its manifest. For whoever "
            "holds the data: the counts are exact, and nothing of them leaves this machine."
        ),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="Classes to tell apart, where neither data nor settings say; 10.")
    ] = None,
    alignment: Annotated[
        float, typer.Option(help="Factor on the assumed agreement of gradients; below 1 for harder data.")
    ] = 1.0,
    trust: Annotated[
        str | None, typer.Option(help="Against whom each site protects itself: `site` means everybody.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML; options win over it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Predict the noise of a schedule and find a better one, before any privacy is spent.

    Prints the noise multiplier for the schedule, what it leaves of each modality's signal in the summed update, and
    other rounds, sampling rates and clips that cost the same epsilon. Trains nothing.

    For example:

      fedfuse plan --sites 6 --records 300 --rounds 40 --epsilon 3
      fedfuse plan --data ../shared/data/digits --epsilon 1 --json
    """
    from pydantic_core import to_json

    from fedfuse_simulations.plan_forecast import Asked, make_plan
    from fedfuse_simulations.plan_text import as_json, print_plan

    asked = Asked(
        sites=sites,
        records=records,
        data=data,
        classes=classes,
        alignment=alignment,
        file=config,
        changes={"rounds": rounds, "privacy": {"epsilon": epsilon, "delta": delta, "trust": trust}},
    )
    found = make_plan(asked, quiet=json)
    if json:
        typer.echo(to_json(as_json(found)).decode())
    else:
        print_plan(found)
