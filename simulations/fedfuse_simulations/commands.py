"""``fedfuse simulate``, ``evaluate``, ``predict`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def simulate(
    data: Annotated[
        Path | None, typer.Option(help="A data folder; every value of its site column becomes a site.")
    ] = None,
    scenario: Annotated[
        str, typer.Option(help="An embedded data set, used where --data is left out.")
    ] = "digits",
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the run; left out: runs/NAME-DATE-TIME.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder; its own settings hold.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings in TOML, as in a run's config.toml; options win over it.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to plan.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy per record over all planned rounds.")] = None,
    delta: Annotated[float | None, typer.Option(help="Probability with which epsilon may not hold.")] = None,
    trust: Annotated[
        str | None, typer.Option(help="Against whom each site protects itself: `site` means everybody.")
    ] = None,
    no_dp: Annotated[
        bool, typer.Option("--no-dp", help="Without any privacy, for comparison; ledger and report say so.")
    ] = False,
    fusion: Annotated[str | None, typer.Option(help="How modalities are fused: concat or late.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Server optimiser: fedavg or fedadam.")] = None,
    sites_per_round: Annotated[int | None, typer.Option(min=3, help="Sites drawn for each round.")] = None,
    colluders: Annotated[int | None, typer.Option(min=0, help="Sites that may help a lying server.")] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rounds between evaluations by the sites, under the budget; left out: none."
        ),
    ] = None,
    dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Chance that a site's reply in an exchange is lost.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of initial weights and scenario data, never of noise or keys.")
    ] = None,
    engine: Annotated[
        Literal["inline", "ray"],
        typer.Option(help="inline: all sites in this process; ray: in Ray's worker processes."),
    ] = "inline",
    ray_address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster that sees this run's folder; left out: Ray on this machine."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Run a whole federation on this machine: sites, privacy, secure aggregation, ledger.

    Without options it runs the embedded scenario `digits`: six sites in six languages, handwritten digits, a spoken
    number (synthetic speech) and a sentence that holds it.

    For example:

      fedfuse simulate
      fedfuse simulate --data ../shared/data/digits --epsilon 8 --json
      fedfuse simulate --rounds 20 --epsilon 3 --fusion late --dropout 0.02
      fedfuse simulate --resume runs/digits-20261124-101500
    """
    from datetime import datetime

    from fedfuse_server.home import RunHome
    from fedfuse_shared.errors import ConfigError
    from fedfuse_simulations.session import run_session
    from fedfuse_simulations.settings import gather
    from fedfuse_simulations.simulation import Simulation, begin, check_early

    if resume is not None:
        home = RunHome(resume)
        run_session(home, Simulation.load(home), json=json)
        return
    if no_dp and (epsilon is not None or trust is not None):
        raise ConfigError("--no-dp gives no guarantee", advice="leave out --epsilon and --trust")
    if ray_address is not None and engine != "ray":
        raise ConfigError("there is a Ray address but no Ray", advice="add --engine ray")
    changes = {
        "rounds": rounds,
        "sites_per_round": sites_per_round,
        "seed": seed,
        "privacy": {"epsilon": epsilon, "delta": delta, "trust": "none" if no_dp else trust},
        "model": {"fusion": fusion},
        "aggregation": {"optimizer": optimizer},
        "secure_aggregation": {"colluders": colluders},
        "evaluation": {"every": evaluate_every},
    }
    name = data.name if data else scenario
    home = RunHome(out or Path("runs") / f"{name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}")
    simulation = Simulation(
        data=data.resolve() if data else None,
        scenario=scenario,
        engine=engine,
        ray_address=ray_address,
        dropout=dropout,
        settings=gather(config, changes),
    )
    check_early(simulation)
    begin(home, simulation)
    run_session(home, simulation, json=json)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    data: Annotated[
        Path | None,
        typer.Option(help="A data folder with test rows; left out: the one the run was made with."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Score a run's global model on test rows.

    Accuracy, balanced accuracy and macro F1 over all test rows, and for every subset of modalities over the rows
    that have them all. The scores come from rows on this machine, never from a site's messages.
    """
    from fedfuse_simulations.session import run_evaluation

    run_evaluation(run, data, json=json)


def predict(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    text: Annotated[str | None, typer.Option(help="The record's text itself.")] = None,
    image: Annotated[Path | None, typer.Option(help="The record's image, a file.")] = None,
    audio: Annotated[Path | None, typer.Option(help="The record's recording, a file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Classify one record with a run's global model.

    Give what the record has of text, image and audio, at least one; what is left out is treated as missing, as in
    training.

    For example:

      fedfuse predict runs/first --image seven.png
      fedfuse predict runs/first --text "seven of them" --audio seven.wav --json
    """
    from fedfuse_simulations.prediction import run_prediction

    run_prediction(run, text=text, image=image, audio=audio, json=json)


def report(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write a run's report.html again: scores, privacy, who took part, how to reproduce.

    One page that opens offline, loads nothing and runs no script. The ledger is audited anew for it; exit code 1 says
    that there are findings, which the page lists.
    """
    from fedfuse_simulations.session import run_report

    run_report(run, json=json)
