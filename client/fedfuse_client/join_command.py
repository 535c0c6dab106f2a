"""``fedfuse site init`` and ``fedfuse site join``: from an empty folder to a site that may run; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedfuse_shared.errors import ConfigError

if TYPE_CHECKING:
    from fedfuse_client.policy import SitePolicy
    from fedfuse_shared.enrolment import Kit


def init(
    folder: Annotated[Path, typer.Argument(help="The site's folder; made here.")],
    site: Annotated[str, typer.Option("--site", help="The site's name in the federation.", metavar="NAME")],
    federation: Annotated[str, typer.Option("--federation", help="The federation's name.", metavar="NAME")],
) -> None:
    """Make a site's folder with its own keys, and the request to send to the federation's operator.

    The keys never leave the folder; nothing in the request is secret.
    """
    from rich.console import Console

    from fedfuse_client.home import SiteHome
    from fedfuse_client.joining import initialise
    from fedfuse_shared.crypto.keys import identity_public
    from fedfuse_shared.keyfile import load_key

    home = SiteHome(folder)
    request = initialise(home, site, federation)
    console = Console()
    console.print(f"Keys are in {folder}. Send {request} to the operator of {federation}.", soft_wrap=True)
    # A request proves that its sender holds a key, not who that is.
    console.print("And tell the operator this key by another way (telephone, in person):")
    console.print(identity_public(load_key(home.key)), highlight=False, soft_wrap=True)
    console.print(
        "With the kit that comes back: fedfuse site join FOLDER KIT --roster-hash HASH --data DATA",
        highlight=False,
        soft_wrap=True,
    )


def join(
    folder: Annotated[Path, typer.Argument(help="The site's folder, from `fedfuse site init`.")],
    kit: Annotated[Path, typer.Argument(help="The kit, a folder with roster.json and kit.json.")],
    roster_hash: Annotated[
        str, typer.Option(help="Hash of the roster, as the operator told you by another way than the kit.")
    ],
    data: Annotated[Path, typer.Option(help="The data folder, with manifest and dataset.toml.")],
    dataset_site: Annotated[
        list[str] | None,
        typer.Option(
            help="Value of the manifest's site column to train on; repeat it for more. Default: own name."
        ),
    ] = None,
    epsilon_cap: Annotated[
        float | None,
        typer.Option(help="Most privacy ever spent on the data; default: what the run asks for."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Accept the terms without being asked.")] = False,
) -> None:
    """Check a kit, show what its run asks for, and write policy.toml: the bounds this site keeps to."""
    from rich.console import Console

    from fedfuse_client.data.info import DatasetInfo, read_info
    from fedfuse_client.home import SiteHome
    from fedfuse_client.joining import join as write
    from fedfuse_client.joining import policy_for, read_kit

    if epsilon_cap is not None and not 0 < epsilon_cap < float("inf"):
        raise ConfigError("--epsilon-cap has to be a positive number")
    home = SiteHome(folder)
    roster, found = read_kit(home, kit, roster_hash)
    info = read_info(data)
    if not isinstance(info, DatasetInfo):
        raise ConfigError(
            info[0].message if info else "has no dataset.toml",
            who=str(data),
            advice=f"`fedfuse data check {data}` lists every problem",
        )
    policy = policy_for(
        found.terms,
        roster,
        found.site,
        data=data,
        modalities=info.modalities,
        dataset_sites=dataset_site or (),
        epsilon_cap=epsilon_cap,
    )
    _show(found, policy)
    if not yes and not typer.confirm("Write these bounds to policy.toml?"):
        Console().print("Nothing was written.")
        raise typer.Exit(1)
    write(home, kit, roster_hash, policy)
    console = Console()
    console.print(
        f"{home.policy} is written; only you change it. Next: fedfuse site preflight {folder}", soft_wrap=True
    )


def _show(kit: Kit, policy: SitePolicy) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text: nothing of an address, a name or a path is read as markup, which would hide it.
    title = Text(f"{kit.site} in {policy.federation}, server {kit.address}")
    table = Table(title=title, title_justify="left")
    for heading in ("what", "bound", "meaning"):
        table.add_column(heading, overflow="fold")
    for row in _rows(kit, policy):
        table.add_row(*map(Text, row))
    Console().print(table)


def _rows(kit: Kit, policy: SitePolicy) -> Iterator[tuple[str, str, str]]:
    """Every key of the policy, with what it means: what is not shown, nobody agreed to."""
    terms = kit.terms
    less = (
        ""
        if policy.epsilon_cap >= terms.epsilon
        else f"; the run would spend {terms.epsilon:g} and be cut short"
    )
    yield "epsilon_cap", f"{policy.epsilon_cap:g}", f"most ever spent per record{less}"
    yield "delta", f"{policy.delta:g}", "chance that epsilon does not hold"
    if policy.max_epsilon_all_collude is not None:
        yield "max_epsilon_all_collude", f"{policy.max_epsilon_all_collude:g}", "if all other sites collude"
    yield "trust", ", ".join(policy.trust), "site: all noise is added here; aggregate: sites share it"
    yield "min_noise_multiplier", f"{policy.min_noise_multiplier:.4g}", "least noise over the clip norm"
    yield "max_clip", f"{policy.max_clip:g}", "most that one record moves a step, before the noise"
    yield "max_sampling_rate", f"{policy.max_sampling_rate:g}", "share of the records in a step"
    yield "max_steps_per_round", str(policy.max_steps_per_round), f"in each of {terms.rounds} rounds"
    yield "min_participants", str(policy.min_participants), "fewest sites in a round"
    yield "min_survivors", str(policy.min_survivors), "fewest sites over which a sum is opened"
    yield "min_threshold", str(policy.min_threshold), "fewest shares that open a sum"
    yield "min_colluders", str(policy.min_colluders), "sites helping the server that a round must withstand"
    sparse = "sparse" in {graph.value for graph in policy.graphs}
    trusting = (
        "SPARSE: YOU TRUST THE SERVER to keep to the protocol" if sparse else "holds against a lying server"
    )
    yield "graphs", ", ".join(policy.graphs), trusting
    free = (
        "any mechanism within these bounds" if policy.schedule.value == "free" else "one mechanism for good"
    )
    yield "schedule", policy.schedule.value, free
    noise = policy.min_evaluation_noise
    counts = (
        ("none", "no counts of test rows leave")
        if noise is None
        else (f"{noise:.4g}", "COUNTS OF TEST ROWS LEAVE, with at least this noise on each")
    )
    yield "min_evaluation_noise", *counts
    yield "max_lifetime", f"{policy.max_lifetime} s", "longest that an attempt's secrets are kept"
    yield "modalities", ", ".join(policy.modalities), "fed by this site; from dataset.toml"
    yield "data", str(policy.data), "rows of " + ", ".join(policy.record_sites)
    yield (
        "plans, models, code, bundles",
        "pinned",
        f"{terms.rounds} rounds of plan {terms.plan[:16]}…, this software",
    )
