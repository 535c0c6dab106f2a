"""How a site comes to be: it makes its own keys, sends a request, and takes a kit it has checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedfuse_client.code import code_hash
from fedfuse_client.connection import Connection
from fedfuse_client.home import SiteHome
from fedfuse_client.policy import SitePolicy
from fedfuse_shared import limits
from fedfuse_shared.config.base import Label, Modality, SiteName, Trust
from fedfuse_shared.config.files import save_toml
from fedfuse_shared.enrolment import (
    MAX_KIT,
    MAX_REQUEST,
    Kit,
    SiteRequest,
    Terms,
    check_kit,
    check_request,
    read_bounded,
)
from fedfuse_shared.envelope import decode, encode, seal
from fedfuse_shared.errors import ConfigError, StateError, VerificationError
from fedfuse_shared.files import write_durably
from fedfuse_shared.keyfile import create_node_key, load_key, load_node_public
from fedfuse_shared.roster import Roster, check_roster


def initialise(home: SiteHome, site: str, federation: str) -> Path:
    """Make a site's folder, keys and empty store, and return the request to send to the operator.

    Raises:
        StateError: the folder holds a site already, or cannot be written.
        ConfigError: the folder is not empty, or a name is none.
    """
    for name, kind in ((site, SiteName), (federation, Label)):
        try:
            TypeAdapter(kind).validate_python(name)
        except ValidationError as problem:
            raise ConfigError(
                f"{name!r} is no name",
                advice="use letters, digits, dot, dash and underscore, up to 63 of them",
            ) from problem
    if home.key.exists():
        raise StateError("a site is here already; its keys are not overwritten", who=str(home.root))
    if home.root.exists() and (not home.root.is_dir() or any(home.root.iterdir())):
        raise ConfigError("is not an empty folder", who=str(home.root), advice="choose a new one")
    identity = home.initialise()
    home.root.chmod(0o700)
    node = create_node_key(home.node_key)
    body = SiteRequest(federation=federation, site=site, identity=identity, node=node)
    write_durably(home.request, encode(seal(body, site, load_key(home.key))) + b"\n")
    return home.request


def read_kit(home: SiteHome, folder: Path, roster_hash: str) -> tuple[Roster, Kit]:
    """Return the roster and the kit in a folder, checked against the pinned hash and this site's own keys.

    Raises:
        ProtocolError: a file is missing or malformed.
        VerificationError: roster or kit is not what the operator made for this site.
        StateError: this site's own files cannot be read.
        ConfigError: the run gives no guarantee at all.
    """
    asked = check_request(read_bounded(home.request, MAX_REQUEST), who=str(home.request)).body
    path = folder / "roster.json"
    envelope = decode(read_bounded(path, limits.MAX_MESSAGE), Roster, who=str(path))
    roster = check_roster(envelope, pinned=roster_hash)
    public = load_key(home.key).public_key().public_bytes_raw().hex()
    mine = (roster.federation, roster.sites.get(asked.site), roster.nodes.get(asked.site))
    if mine != (asked.federation, public, load_node_public(home.node_key)):
        raise VerificationError(
            f"does not enrol {asked.site} of {asked.federation} with the keys in {home.root}",
            who=str(path),
            advice=f"send the operator {home.request} and ask for a roster made with it",
        )
    path = folder / "kit.json"
    kit = check_kit(read_bounded(path, MAX_KIT), roster, site=asked.site, who=str(path))
    check_noise(kit.terms, roster.federation)
    return roster, kit


def check_noise(terms: Terms, federation: str) -> None:
    """Refuse a run that gives no guarantee at all: nobody agrees to that by accepting a kit.

    Raises:
        ConfigError: it is one.
    """
    if terms.trust is Trust.NONE:
        raise ConfigError(
            "the run adds no noise: no epsilon bounds what it gives away of a record",
            who=federation,
            advice='stay out; for data that need no protection write policy.toml by hand, with trust = ["none"]',
        )


def policy_for(
    terms: Terms,
    roster: Roster,
    site: str,
    *,
    data: Path,
    modalities: Sequence[Modality],
    dataset_sites: Sequence[str] = (),
    epsilon_cap: float | None = None,
) -> SitePolicy:
    """Return the tightest policy that lets a site take part in what is planned, by the code installed here."""
    return SitePolicy(
        site=site,
        federation=roster.federation,
        roster_hash=roster.hash(),
        data=data.resolve(),
        dataset_sites=tuple(dataset_sites),
        modalities=tuple(modalities),
        epsilon_cap=terms.epsilon if epsilon_cap is None else epsilon_cap,
        delta=terms.delta,
        min_participants=terms.min_participants,
        min_survivors=terms.min_survivors,
        min_threshold=terms.min_threshold,
        min_colluders=terms.min_colluders,
        trust=(terms.trust,),
        min_noise_multiplier=terms.min_noise_multiplier,
        max_sampling_rate=terms.max_sampling_rate,
        max_steps_per_round=terms.max_steps_per_round,
        max_clip=terms.max_clip,
        graphs=(terms.graph,),
        max_lifetime=terms.max_lifetime,
        schedule=terms.schedule,
        min_evaluation_noise=terms.min_evaluation_noise,
        models=(terms.model,),
        code=(code_hash(),),
        plans=(terms.plan,),
        bundles=(terms.bundle,),
    )


def join(home: SiteHome, folder: Path, roster_hash: str, policy: SitePolicy) -> None:
    """Write what a checked kit brings and the site's own policy, the policy last: with it the site is complete.

    Raises:
        StateError: the site has a policy already.
        ProtocolError: a file is missing or malformed.
        VerificationError: roster or kit is not what the operator made for this site.
        OSError: the folder cannot be written.
    """
    if home.policy.exists():
        raise StateError(
            "has a policy already, which is not overwritten",
            who=str(home.root),
            advice="edit policy.toml by hand, or move it away first",
        )
    roster, kit = read_kit(home, folder, roster_hash)
    if (policy.roster_hash, policy.site) != (roster.hash(), kit.site):
        raise VerificationError("the kit was exchanged while it was read", who=str(folder))
    write_durably(home.roster, read_bounded(folder / "roster.json", limits.MAX_MESSAGE) + b"\n")
    write_durably(home.authority, kit.authority.encode())
    save_toml(home.connection, Connection(address=kit.address))
    save_toml(home.policy, policy)
    for path in (home.roster, home.authority, home.connection, home.policy):
        path.chmod(0o600)
