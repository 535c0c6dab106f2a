"""``fedfuse data check`` and ``fedfuse data show``: what an operator runs before anything else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fedfuse_client.data.manifest import Dataset, Record

app = typer.Typer(help="Check and describe a folder of data.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(help="Folder with dataset.toml and manifest.csv, .jsonl or .parquet.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

_MOST_CLASSES: Final = 24  # rows of the class table before the rest is summed up


@app.command()
def check(
    folder: Folder,
    as_json: Json = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not open images and recordings.")] = False,
) -> None:
    """List every problem of a data folder, one line each; exit code 1 if there are any."""
    from rich.console import Console
    from rich.progress import Progress

    from fedfuse_client.data.check import check_folder

    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("opening files", total=None)
        problems = check_folder(
            folder, deep=not quick, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if as_json:
        listed = [
            {"file": p.file, "row": p.row, "column": p.column, "code": p.code, "message": p.message}
            for p in problems
        ]
        typer.echo(json.dumps({"folder": str(folder), "deep": not quick, "problems": listed}))
    else:
        for problem in problems:
            typer.echo(f"{problem.where}: {problem.message}")
        count = (
            "no problems" if not problems else f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        )
        typer.echo(f"{folder}: {count}{' (files were not opened)' if quick else ''}")
    if problems:
        raise typer.Exit(1)


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """Show what each site of a data folder holds: records, modalities, balance of classes."""
    from fedfuse_client.data.manifest import load_dataset

    dataset = load_dataset(folder)
    if as_json:
        typer.echo(json.dumps(_summary(dataset)))
    else:
        _print_tables(dataset)


def _counts(dataset: Dataset, records: Iterable[Record]) -> dict[str, Any]:
    """Return the counts of some records; ``complete`` are those with every modality the data set has."""
    records = tuple(records)
    present = {
        m.value: sum(getattr(r, m.value) is not None for r in records) for m in dataset.info.modalities
    }
    labels = Counter(record.label for record in records)
    return {
        "records": len(records),
        "train": sum(record.split == "train" for record in records),
        "test": sum(record.split == "test" for record in records),
        "with": present,
        "complete": sum(
            all(getattr(r, m.value) is not None for m in dataset.info.modalities) for r in records
        ),
        "classes": {name: labels[index] for index, name in enumerate(dataset.info.classes)},
    }


def _summary(dataset: Dataset) -> dict[str, Any]:
    return {
        "folder": str(dataset.folder),
        "name": dataset.info.name,
        "record": dataset.info.record,
        "all": _counts(dataset, dataset.records),
        "sites": {site: _counts(dataset, dataset.select(site)) for site in dataset.sites()},
    }


def _print_tables(dataset: Dataset) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    summary = _summary(dataset)
    console = Console()
    # Text, not str: what the folder's author wrote must not be read as markup.
    console.print(Text(f"{dataset.info.name}: {dataset.info.record}\n"))
    modalities = [modality.value for modality in dataset.info.modalities]
    sites = Table("site", box=None, pad_edge=False)
    for heading in ("records", "train", "test", *modalities, "complete"):
        sites.add_column(heading, justify="right")
    sites.add_column("class shares", justify="right", no_wrap=True)
    for name, counts in [*summary["sites"].items(), ("all", summary["all"])]:
        numbers = [
            counts["records"],
            counts["train"],
            counts["test"],
            *counts["with"].values(),
            counts["complete"],
        ]
        shares = sorted(count / counts["records"] for count in counts["classes"].values())
        balance = f"{shares[0]:.1%} to {shares[-1]:.1%}"
        sites.add_row(Text(name), *(f"{number:,}" for number in numbers), balance)
    console.print(sites)
    console.print()
    console.print(_class_table(summary["all"]))


def _class_table(counts: dict[str, Any]) -> Any:
    """Return a table of the commonest classes with a bar each; the rest is summed up in one row."""
    from rich.table import Table
    from rich.text import Text

    table = Table("class", box=None, pad_edge=False)
    for heading in ("records", "share"):
        table.add_column(heading, justify="right")
    table.add_column("")
    ordered = sorted(counts["classes"].items(), key=lambda item: -item[1])
    most = ordered[0][1]
    for label, count in ordered[:_MOST_CLASSES]:
        table.add_row(
            Text(label), f"{count:,}", f"{count / counts['records']:.1%}", "█" * round(30 * count / most)
        )
    if rest := ordered[_MOST_CLASSES:]:
        total = sum(count for _, count in rest)
        table.add_row(f"{len(rest)} more", f"{total:,}", f"{total / counts['records']:.1%}", "")
    return table
