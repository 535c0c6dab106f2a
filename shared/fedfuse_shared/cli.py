"""The root command: subcommands come from the entry-point group "fedfuse.commands", each loaded when it is called."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click
import typer
from typer.core import TyperGroup
from typer.main import get_command

GROUP = "fedfuse.commands"

# What `fedfuse --help` says of each command; loading them all to ask would cost seconds. A test compares the two.
SUMMARIES = {
    "simulate": "Run a whole federation on this machine: sites, privacy, secure aggregation, ledger.",
    "audit": "Check a ledger and recompute every site's spent privacy, trusting nobody.",
    "predict": "Classify one record with a run's global model.",
    "evaluate": "Score a run's global model on test rows.",
    "report": "Write a run's report.html again: scores, privacy, who took part, how to reproduce.",
    "plan": "Predict the noise of a schedule and find a better one, before any privacy is spent.",
    "graph": "Choose the neighbours and the threshold of a sparse graph, and show why.",
    "data": "Check and describe a folder of data.",
    "server": "Run a federation's server, take a site out of it, see where it stands.",
    "provision": "Make a federation: certificate authority, signed roster, the server's folder and one kit per site.",
    "site": "Set up, check, run and look after a site.",
}

EPILOG = (
    "Start with [bold]fedfuse simulate[/bold] (no data needed), then [bold]fedfuse audit RUN/ledger.jsonl[/bold]. "
    "Exit codes: 0 fine, 1 findings or failed work, 2 bad usage or input."
)


_ROOM = "free some room and try again; a run that was stopped goes on with `fedfuse simulate --resume RUN`"


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are called, so that help stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands that installed packages contribute."""
        del ctx
        known = {point.name for point in entry_points(group=GROUP)}
        return [name for name in SUMMARIES if name in known] + sorted(known - SUMMARIES.keys())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return what help needs to know of a command; it is not imported for that."""
        del ctx
        if not entry_points(group=GROUP, name=cmd_name):
            return None
        summary = SUMMARIES.get(cmd_name, "")
        return click.Command(cmd_name, short_help=summary, help=summary)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is called, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and name is not None:
            command = _load(next(iter(entry_points(group=GROUP, name=name))))
        return name, command, rest


def _load(point: EntryPoint) -> click.Command:
    target: Any = point.load()
    if isinstance(target, typer.Typer):
        command = get_command(target)
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(point.name)(target)
        command = get_command(single)
    command.name = point.name
    return command


app = typer.Typer(
    cls=LazyGroup,
    name="fedfuse",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415

        typer.echo(f"fedfuse {version('fedfuse')}")
        raise typer.Exit


@app.callback()
def root(
    *,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Federated learning on text, image and audio that keeps its privacy promises when attacked.

    Sites train under differential privacy, their updates leave masked, only the securely aggregated sum is opened,
    and anyone can recompute every site's spent budget from the log.
    """
    del version


def main() -> None:
    """Run the command line; what a user can mend becomes one line on standard error and an exit code."""
    try:
        app()
    except ModuleNotFoundError as problem:
        # Commands import what they need when they run; a role that is not installed ends here.
        if problem.name is None or problem.name.startswith("fedfuse"):
            raise
        typer.echo(
            f"error: this command needs {problem.name}, which is not installed; "
            "pip install 'fedfuse[simulation]' brings everything",
            err=True,
        )
        sys.exit(2)
    except Exception as problem:
        # Imported late: on the good path nobody needs it.
        from fedfuse_shared.errors import FedfuseError  # noqa: PLC0415
        from fedfuse_shared.files import is_disk_full  # noqa: PLC0415

        if is_disk_full(problem):
            where = f"{problem.who}: " if isinstance(problem, FedfuseError) and problem.who else ""
            said = problem.message if isinstance(problem, FedfuseError) else problem
            typer.echo(f"error: disk full: {where}{said}; {_ROOM}", err=True)
            sys.exit(2)
        if not isinstance(problem, FedfuseError):
            raise
        typer.echo(f"error: {problem}", err=True)
        sys.exit(problem.exit_code)
