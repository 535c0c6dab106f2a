"""What a report says, gathered from a run's own files, and its page."""

from __future__ import annotations

import math
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from fedfuse_server.home import RunHome
from fedfuse_shared.config.base import Trust
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.errors import DataError
from fedfuse_shared.files import write_durably
from fedfuse_shared.ledger.verification_report import ADVICE, Report, SiteReport
from fedfuse_simulations.metrics import LeftOut, Metrics
from fedfuse_simulations.report import charts
from fedfuse_simulations.report.participation import Part, Participation, read_participation
from fedfuse_simulations.scenarios import SCENARIOS
from fedfuse_simulations.scoring import Scores
from fedfuse_simulations.simulation import Simulation

ROWS: Final = 100
"""Most rows of any table that grows with a run; the page says how many it leaves out."""
MATRIX: Final = 30
"""Most classes whose confusion is shown as a matrix; beyond that the most frequent confusions are listed."""
_MAX_METRICS: Final = 256 * 2**20  # bytes
_PACKAGES: Final = ("fedfuse", "torch", "opacus", "dp-accounting", "flwr", "numpy", "scikit-learn")


def read_metrics(home: RunHome) -> Metrics:
    """Return a finished run's ``metrics.json``.

    Raises:
        DataError: it is missing, too large or not what a run writes.
    """
    path = home.root / "metrics.json"
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_METRICS + 1)
    except OSError as problem:
        raise DataError(
            f"cannot be read ({problem.strerror})",
            who=str(path),
            advice=f"a run writes it at its end: fedfuse simulate --resume {shlex.quote(str(home.root))}",
        ) from problem
    if len(raw) > _MAX_METRICS:
        raise DataError(f"is over the limit of {_MAX_METRICS} bytes", who=str(path))
    try:
        return Metrics.model_validate_json(raw)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"is not a run's metrics ({place}: {first['msg']})", who=str(path), advice="restore the file"
        ) from problem


def write_report(home: RunHome, metrics: Metrics, audit: Report) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    Args:
        home: The run's folder.
        metrics: What happened in it.
        audit: What an audit of its ledger says.

    Raises:
        FedfuseError: a file of the run cannot be used.
        OSError: the disk is full; no report, or the one before, is there.
    """
    path = home.root / "report.html"
    write_durably(path, render(home, metrics, audit).encode("utf-8", "replace"))
    return path


def render(home: RunHome, metrics: Metrics, audit: Report) -> str:
    """Return the page; the same run and versions give the same bytes.

    Raises:
        FedfuseError: a file of the run cannot be used.
    """
    config = home.load_config()
    simulation = Simulation.load(home)
    roster = home.load_roster().body
    sites = tuple(sorted(roster.sites))
    seen = read_participation(home.ledger, sites)
    final = metrics.final
    _check_confusion(home, config, final)
    points = [(r.round, r.scores.all_rows) for r in metrics.rounds if r.scores is not None]
    last = metrics.rounds[-1].round if metrics.rounds else 0
    points = [*(point for point in points if point[0] != last), (last, final.all_rows)]
    budgets = [charts.Budget(_named(row, audit), row.epsilon, row.cap) for row in audit.sites]
    left_out = _left_out(metrics, seen)
    pictures = {
        "curve": charts.curve(points, _most_frequent(final)),
        "subsets": charts.subsets(list(final.subsets.items())) if final.subsets else "",
        "budgets": charts.budgets(budgets) if budgets else "",
        "participation": charts.participation(seen) if seen.rounds and sites else "",
    }
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            name=home.root.resolve().name,
            federation=roster.federation,
            roster_hash=roster.hash(),
            metrics=metrics,
            final=final,
            points=points,
            evaluated=metrics.evaluated(),
            baseline=_most_frequent(final),
            classes=config.model.classes,
            matrix=len(config.model.classes) <= MATRIX,
            mistakes=_mistakes(config, final),
            audit=audit,
            advice=ADVICE,
            spending=list(zip(audit.sites, budgets, strict=True)),
            tightest=_tightest(audit),
            unprotected=config.privacy.trust is Trust.NONE,
            aggregate=any(row.trust is Trust.AGGREGATE for row in audit.sites),
            deltas=sorted({row.delta for row in audit.sites if row.delta is not None}),
            seen=seen,
            tally=_tally(seen),
            left_out=left_out,
            config=config,
            settings=_settings(config, simulation, seen),
            scenario=None if simulation.data else SCENARIOS.get(simulation.scenario),
            simulation=simulation,
            commands=_commands(home, simulation),
            versions={"Python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            pictures=pictures,
            rows=ROWS,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,  # names and reasons are other people's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"spent": _spent, "score": lambda value: f"{value:.3f}", "plain": _plain}
    return environment


def _spent(value: float | None) -> str:
    """Round up: what is shown is never less than what was spent."""
    return "unbounded" if value is None else f"{math.ceil(value * 1000) / 1000:.3f}"


def _plain(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _named(row: SiteReport, audit: Report) -> str:
    """Name a budget: by its site, and by its data set where the site has several."""
    several = sum(other.site == row.site for other in audit.sites) > 1
    return f"{row.site} {(row.dataset or '')[:4]}" if several else row.site


def _tightest(audit: Report) -> SiteReport | None:
    """Return the budget that is nearest to its cap or furthest over it."""

    def used(row: SiteReport) -> float:
        if row.epsilon is None:
            return math.inf
        return row.epsilon / row.cap if row.cap else row.epsilon

    return max(audit.sites, key=used, default=None)


def _check_confusion(home: RunHome, config: RunConfig, final: Scores) -> None:
    classes = len(config.model.classes)
    if len(final.confusion) != classes or any(len(row) != classes for row in final.confusion):
        raise DataError(
            "has a confusion matrix of another model than config.toml's",
            who=str(home.root / "metrics.json"),
            advice="restore the run's folder",
        )


def _most_frequent(final: Scores) -> float:
    """Return the accuracy of always naming the test rows' most frequent class."""
    per_class = [sum(row) for row in final.confusion]
    return max(per_class) / (sum(per_class) or 1)


def _mistakes(config: RunConfig, final: Scores) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions: true class, predicted class, rows."""
    names = config.model.classes
    found = [
        (names[true], names[predicted], count)
        for true, row in enumerate(final.confusion)
        for predicted, count in enumerate(row)
        if true != predicted and count
    ]
    return sorted(found, key=lambda mistake: -mistake[2])[:20]


def _tally(seen: Participation) -> list[tuple[str, dict[str, int]]]:
    return [(site, {part.value: parts.count(part) for part in Part}) for site, parts in seen.parts.items()]


def _left_out(metrics: Metrics, seen: Participation) -> list[LeftOut]:
    """Return why sites were left out, with an entry for each round where nobody noted it."""
    noted = {(entry.round, entry.site) for entry in metrics.left_out}
    missing = [
        LeftOut(round=number, site=site, step="unknown", reason="not noted: the server was stopped just then")
        for site, parts in seen.parts.items()
        for number, part in zip(seen.rounds, parts, strict=True)
        if part is Part.LEFT_OUT and (number, site) not in noted
    ]
    return sorted([*metrics.left_out, *missing], key=lambda entry: (entry.round, entry.site))


def _settings(
    config: RunConfig, simulation: Simulation, seen: Participation
) -> dict[str, list[tuple[str, object]]]:
    """Return the settings a reader needs to judge the run, by group."""
    privacy, offer, aggregation = config.privacy, seen.offer, config.aggregation
    groups: dict[str, list[tuple[str, object]]] = {
        "Privacy": [
            ("trust", privacy.trust.value),
            ("epsilon asked for", _plain(privacy.epsilon)),
            ("delta", _plain(privacy.delta)),
            ("noise multiplier", _plain(privacy.noise_multiplier)),
            ("clip (L2 norm)", _plain(privacy.clip)),
            ("sampling rate", _plain(privacy.sampling_rate)),
            ("steps per round", privacy.steps_per_round),
            ("expected batch size", privacy.expected_batch_size),
        ],
        "Model and training": [
            *((f"{m.value} encoder", encoder.name) for m, encoder in config.model.encoders.items()),
            ("fusion", config.model.fusion.value),
            ("site learning rate", _plain(config.training.learning_rate)),
            ("server optimiser", aggregation.optimizer.value),
            ("server learning rate", _plain(aggregation.learning_rate)),
            ("server momentum", _plain(aggregation.momentum)),
            ("published average (EMA)", _plain(aggregation.ema)),
        ],
        "Run": [
            ("rounds planned", config.rounds),
            ("sites asked per round", config.sites_per_round or "all"),
            ("seed", config.seed),
            ("engine", simulation.engine),
            ("replies lost on purpose", f"{simulation.dropout:.1%}" if simulation.dropout else "none"),
        ],
    }
    if offer is not None:
        groups["Secure aggregation, last round"] = [
            ("sites asked", len(offer.participants)),
            ("shares needed to open", offer.threshold),
            ("colluding sites withstood", offer.colluders),
            ("fewest sites in an opened sum", offer.min_survivors),
            ("ring", f"{offer.ring_bits} bits"),
            (
                "graph",
                f"sparse, {offer.neighbours} neighbours: for a server that keeps to the protocol"
                if offer.neighbours
                else "complete: for a server that lies",
            ),
        ]
    return groups


def _commands(home: RunHome, simulation: Simulation) -> dict[str, str]:
    """Return what to type, by what it does; every word is quoted for a shell."""
    run = home.root.resolve()
    again = ["fedfuse", "simulate", "--config", str(run / "config.toml")]
    again += ["--data", str(simulation.data)] if simulation.data else ["--scenario", simulation.scenario]
    again += ["--dropout", f"{simulation.dropout:g}"] if simulation.dropout else []
    again += ["--engine", simulation.engine]
    again += ["--ray-address", simulation.ray_address] if simulation.ray_address else []
    again += ["--out", f"{run}-again"]
    return {
        "Run it again": shlex.join(again),
        "Check every site's privacy": shlex.join(["fedfuse", "audit", str(run / "ledger.jsonl")]),
        "Score the model again": shlex.join(["fedfuse", "evaluate", str(run)]),
        "Write this page again": shlex.join(["fedfuse", "report", str(run)]),
    }
