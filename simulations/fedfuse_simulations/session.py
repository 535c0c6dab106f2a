"""What a person sees of a simulation: progress while it runs, tables at the end, or one JSON object."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table

from fedfuse_client.data.manifest import load_dataset
from fedfuse_server.audit.sources import Sources
from fedfuse_server.events import Event
from fedfuse_server.home import RunHome
from fedfuse_server.progress import showing
from fedfuse_shared.config.base import Trust
from fedfuse_shared.ledger.verification import verify_ledger
from fedfuse_shared.ledger.verification_report import Report
from fedfuse_simulations.examiner import Examiner
from fedfuse_simulations.metrics import Metrics, Watcher
from fedfuse_simulations.run import conclude, run_rounds
from fedfuse_simulations.scoring import Score, Scores
from fedfuse_simulations.simulation import Simulation, check_data, prepare
from fedfuse_simulations.sitelog import SiteLog

SCORINGS = 12
"""Times a run is scored on its way, so that a curve can be drawn."""


def run_session(home: RunHome, simulation: Simulation, *, json: bool) -> None:
    """Run a simulation that was begun, from its start or from where it stopped, and print its outcome.

    Raises:
        FedfuseError: a setting or the data is wrong, or no round was opened.
    """
    console = Console(stderr=True)
    began = time.monotonic()
    with console.status("preparing") as status:
        prepared = prepare(home, simulation, status.update)
    if prepared.config.privacy.trust is Trust.NONE:
        console.print(
            "WARNING: no differential privacy. The sites train without noise; the model can give records away.",
            style="bold red",
        )
    examiner = Examiner(prepared.config.model, prepared.dataset)
    rounds = prepared.config.rounds
    started = time.monotonic()
    try:
        with showing(console, rounds) as show, SiteLog(_line_of(console)) as log:
            accuracy = ""

            def told(event: Event, scores: Scores | None) -> None:
                nonlocal accuracy
                log.check_room()
                if scores is not None:
                    accuracy = f"accuracy {scores.all_rows.accuracy:.3f}"
                show(event, accuracy)

            watch = Watcher(home.root / "progress.jsonl", examiner, max(1, rounds // SCORINGS), told)
            run_rounds(home, prepared, simulation, watch=watch)
    except KeyboardInterrupt:
        console.print(f"Stopped. Go on with: fedfuse simulate --resume {home.root}", soft_wrap=True)
        raise typer.Exit(1) from None
    metrics = conclude(home, watch, examiner.examine_published(home), started)
    report = audit(home)
    from fedfuse_simulations.report import write_report  # noqa: PLC0415 - matplotlib is not needed before

    write_report(home, metrics, report)
    if json:
        typer.echo(to_json(_summary(home, metrics, report, time.monotonic() - began)))
    else:
        _print_outcome(Console(), home, metrics, report)
    if not report.ok:
        raise typer.Exit(1)


def run_evaluation(run: Path, data: Path | None, *, json: bool) -> None:
    """Score a run's published model on test rows and print the scores.

    Raises:
        FedfuseError: the run or the data cannot be used.
    """
    home = RunHome(run)
    config = home.load_config()
    dataset = check_data(data) if data else load_dataset(Simulation.load(home).data_folder(home))
    examiner = Examiner(config.model, dataset)
    scores = examiner.examine_published(home)
    if json:
        typer.echo(to_json(scores))
    else:
        Console().print(_score_table(scores))


def run_report(run: Path, *, json: bool) -> None:
    """Write a finished run's ``report.html`` anew, its ledger audited anew, and print where it is.

    Raises:
        FedfuseError: a file of the run cannot be used.
    """
    from fedfuse_simulations.report import read_metrics, write_report  # noqa: PLC0415 - as above

    home = RunHome(run)
    metrics = read_metrics(home)
    report = audit(home)
    path = write_report(home, metrics, report)
    if json:
        typer.echo(to_json({"report": str(path), "audit": report.ok}))
    else:
        typer.echo(path)
    if not report.ok:
        raise typer.Exit(1)


def _line_of(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _summary(home: RunHome, metrics: Metrics, report: Report, seconds: float) -> dict[str, object]:
    final = metrics.final
    complete = final.complete_rows
    return {
        "rounds": len(metrics.rounds),
        "stopped": metrics.stopped,
        "accuracy": final.all_rows.accuracy,
        "accuracy_complete": complete.accuracy if complete else None,
        "balanced_accuracy": final.all_rows.balanced_accuracy,
        "f1_macro": final.all_rows.f1_macro,
        "subsets": {name: score.accuracy for name, score in final.subsets.items()},
        "subsets_balanced": {name: score.balanced_accuracy for name, score in final.subsets.items()},
        "evaluated": {number: each.accuracy for number, each in metrics.evaluated()},
        "epsilon": {site.site: site.epsilon for site in report.sites},
        "delta": next(site.delta for site in report.sites),
        "audit": report.ok,
        "ledger": str(home.ledger),
        "report": str(home.root / "report.html"),
        "seconds": round(seconds, 3),
    }


def _score_table(scores: Scores) -> Table:
    table = Table(title="Scores on test rows", title_justify="left")
    for heading in ("modalities shown", "rows", "accuracy", "balanced", "F1 macro"):
        table.add_column(heading, justify="left" if heading == "modalities shown" else "right")

    def row(name: str, score: Score) -> None:
        figures = (score.accuracy, score.balanced_accuracy, score.f1_macro)
        table.add_row(name, str(score.rows), *(f"{figure:.3f}" for figure in figures))

    row("what each row has", scores.all_rows)
    table.add_section()
    for name, score in scores.subsets.items():
        row(name, score)
    return table


def _evaluation_table(metrics: Metrics) -> Table:
    table = Table(title="By the sites' own noised counts, under the budget", title_justify="left")
    for heading in ("after round", "accuracy", "±", "rows, noised"):
        table.add_column(heading, justify="right")
    for number, each in metrics.evaluated():
        figures = (each.accuracy, each.deviation)
        table.add_row(str(number), *("-" if f is None else f"{f:.3f}" for f in figures), str(each.rows))
    table.caption, table.caption_justify = "± is one standard deviation of the noise alone", "left"
    return table


def _budget_table(report: Report) -> Table:
    table = Table(title="Privacy spent, per record of each site", title_justify="left")
    table.add_column("site")
    for heading in ("epsilon", "cap", "delta", "charged rounds"):
        table.add_column(heading, justify="right")
    for site in report.sites:
        figures = (site.epsilon, site.cap, site.delta)
        table.add_row(site.site, *("-" if f is None else f"{f:.4g}" for f in figures), str(site.reservations))
    unprotected = any(site.trust is Trust.NONE for site in report.sites)
    whom = "everybody (trust = site)"
    withstood = {site.colluders for site in report.sites if site.trust is Trust.AGGREGATE}
    if withstood:
        least = min(number for number in withstood if number is not None)
        whom = f"the server with up to {least} colluding sites (trust = aggregate)"
        spent = [site.epsilon_all_collude for site in report.sites]
        worst = "unbounded" if None in spent else f"{max(each for each in spent if each is not None):.4g}"
        whom += f"; epsilon if everybody else colludes: {worst}"
    guarantee = f"adjacency: add or remove one record; against {whom}"
    table.caption = "NO PRIVACY: trained without noise (--no-dp)" if unprotected else guarantee
    table.caption_justify = "left"
    return table


def audit(home: RunHome) -> Report:
    """Return what an audit of a run's ledger says.

    Raises:
        FedfuseError: the ledger, roster or checkpoint cannot be read.
    """
    sources = Sources.beside(home.ledger, None, None)
    roster = sources.load_roster(None)
    return verify_ledger(sources.lines(), roster, sources.load_head(roster))


def _print_outcome(console: Console, home: RunHome, metrics: Metrics, report: Report) -> None:
    console.print(_score_table(metrics.final))
    if metrics.evaluated():
        console.print(_evaluation_table(metrics))
    if metrics.stopped:
        console.print(f"[bold red]The run ended early:[/] {metrics.stopped}")
    console.print(_budget_table(report))
    verdict = "the ledger holds" if report.ok else f"{len(report.findings)} findings"
    console.print(f"Audit: {verdict}, {report.leaves} leaves, root {report.root[:16]}…")
    console.print(f"{len(metrics.rounds)} rounds in {metrics.seconds:.0f} s.")
    for label, path in (
        ("run", home.root),
        ("model", home.model_file),
        ("metrics", home.root / "metrics.json"),
        ("ledger", home.ledger),
        ("report", home.root / "report.html"),
    ):
        console.print(f"  {label:8} {path}", highlight=False, soft_wrap=True)
    console.print(f"Check every site's privacy yourself: fedfuse audit {home.ledger}", soft_wrap=True)
