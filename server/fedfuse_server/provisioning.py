"""A federation's folders before its first round: keys and roster, the server's folder, one kit for every site.

Sites made their own private keys and sent requests; here are only public halves of them. The folder appears whole,
under its name, once everything in it is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from fedfuse_server.certificates import Certified, make_authority, make_server
from fedfuse_server.home import RunHome
from fedfuse_server.plan import bounds_for, cohort, evaluation, plan_hash, resolve, scale_for
from fedfuse_shared import limits
from fedfuse_shared.bundle import bundle_hash
from fedfuse_shared.config.base import OPERATOR, Frozen, Hex32, Label, SiteName
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.files import check, read_toml, save_toml
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.crypto.keys import identity_public
from fedfuse_shared.enrolment import (
    MAX_REQUEST,
    Address,
    Kit,
    SiteRequest,
    Terms,
    check_request,
    read_bounded,
)
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.errors import ConfigError, FedfuseError
from fedfuse_shared.files import write_durably
from fedfuse_shared.keyfile import create_key, write_secret
from fedfuse_shared.offer import architecture_hash
from fedfuse_shared.roster import Roster, check_roster

_MAX_FILES: Final = 10 * limits.MAX_SPARSE_SITES
Officers = dict[SiteName, Hex32 | None]
Days = Annotated[int, Field(ge=1, le=36_500)]

WELCOME: Final = """\
Kit of site {site} for federation {federation}

1. Ask the operator for the roster hash by another way than this kit came (telephone, in person). It should be
   {roster_hash}
2. fedfuse site join FOLDER THIS-FOLDER --roster-hash HASH --data DATA
   shows what the run asks for and writes policy.toml: your bounds, which only you change.
3. fedfuse site preflight FOLDER
4. fedfuse site run FOLDER

Nothing in this folder is secret. Your private keys never left FOLDER.
"""


class CertificateConfig(Frozen):
    """What the certificates say."""

    names: tuple[str, ...] = ()
    """Further host names and addresses of the server."""
    server_days: Days = 397
    authority_days: Days = 3650


class FederationConfig(Frozen):
    """The content of ``federation.toml``."""

    federation: Label
    address: Address
    """Where sites reach the server: host and port."""
    requests: Path = Path("requests")
    """Folder of the sites' requests, every file of it; a relative one is meant from the file's folder."""
    coordinators: Annotated[dict[SiteName, str], Field(min_length=1, max_length=limits.MAX_OFFICERS)]
    """Public keys by name; an empty one is made here."""
    auditors: Annotated[dict[SiteName, str], Field(max_length=limits.MAX_OFFICERS)] = {}  # noqa: RUF012 - pydantic copies it
    certificate: CertificateConfig = CertificateConfig()
    run: RunConfig
    """Settings of the run; ``federation`` is filled in."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names and addresses of the server, the one that sites use first."""
        return (self.address.rpartition(":")[0].strip("[]"), *self.certificate.names)


def load_federation(path: Path) -> FederationConfig:
    """Return the settings of a federation to be made.

    Raises:
        ConfigError: unreadable, or a key is unknown, missing or out of bounds.
    """
    values = read_toml(path)
    run = values.get("run")
    if isinstance(run, dict):
        values = {**values, "run": {"federation": values.get("federation"), **run}}
    config = check(values, FederationConfig, who=str(path))
    if config.run.federation != config.federation:
        raise ConfigError(
            "run.federation differs from federation", who=str(path), advice="leave it out of [run]"
        )
    return config.model_copy(update={"requests": path.absolute().parent / config.requests})


def read_requests(folder: Path, federation: str) -> dict[str, SiteRequest]:
    """Return the requests in a folder by site.

    Raises:
        ConfigError: no folder, too few requests, or two that do not go together.
        ProtocolError: one is malformed.
        VerificationError: one is not signed by the key in it.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as problem:
        raise ConfigError(
            f"cannot be read ({problem.strerror})",
            who=str(folder),
            advice="put the sites' request.json there",
        ) from problem
    if len(paths) > _MAX_FILES:
        raise ConfigError(
            f"holds {len(paths)} files", who=str(folder), advice="leave only the requests there"
        )
    found: dict[str, SiteRequest] = {}
    holders: dict[str, str] = {}
    for path in paths:
        body = check_request(read_bounded(path, MAX_REQUEST), who=str(path)).body
        if body.federation != federation:
            raise ConfigError(f"asks to join {body.federation}, not {federation}", who=str(path))
        if body.site in found:
            raise ConfigError(
                f"is a second request of {body.site}", who=str(path), advice="keep the right one"
            )
        for key in (body.identity, body.node):
            if key in holders:
                raise ConfigError(
                    f"has a key of {holders[key]}",
                    who=str(path),
                    advice="have the site make its own: fedfuse site init",
                )
            holders[key] = body.site
        found[body.site] = body
    if len(found) < limits.MIN_SITES:
        raise ConfigError(
            f"{len(found)} request{'' if len(found) == 1 else 's'}, secure aggregation needs at least "
            f"{limits.MIN_SITES} sites",
            who=str(folder),
            advice="ask the sites for the request.json that `fedfuse site init` writes",
        )
    return found


def terms(config: RunConfig, sites: int) -> Terms:
    """Return what a run among enrolled sites asks of each; the noise multiplier has to be filled in.

    Raises:
        ConfigError: the bounds of secure aggregation do not fit the number of sites.
    """
    full = bounds_for(config, sites, cohort(config, sites))
    least = bounds_for(config, sites, full.min_survivors)
    privacy = config.privacy
    if privacy.noise_multiplier is None:
        raise ConfigError("the noise multiplier is not set", advice="resolve the settings before")
    evaluated = evaluation(config, sites)
    return Terms(
        rounds=config.rounds,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        # A round may go on with as many sites as may be opened over, under bounds no weaker than those.
        min_participants=least.participants,
        min_survivors=least.min_survivors,
        min_threshold=least.threshold,
        min_colluders=least.colluders,
        trust=privacy.trust,
        min_noise_multiplier=privacy.noise_multiplier,
        max_sampling_rate=privacy.sampling_rate,
        max_steps_per_round=privacy.steps_per_round,
        max_clip=privacy.clip,
        graph=config.secure_aggregation.graph,
        max_lifetime=config.secure_aggregation.lifetime,
        schedule=Schedule.FREE if evaluated else Schedule.FIXED,
        min_evaluation_noise=evaluated.noise if evaluated else None,
        model=architecture_hash(config.model),
        plan=plan_hash(config, sites),
        bundle=bundle_hash(),
    )


def provision(config: FederationConfig, out: Path) -> Roster:
    """Write a federation's folders and return its roster.

    Raises:
        ConfigError: the folder exists, or settings and requests do not go together.
        FedfuseError: a request cannot be used.
        OSError: the folder cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(
            "exists and is not overwritten", who=str(out), advice="choose another folder with --out"
        )
    requests = read_requests(config.requests, config.federation)
    run = resolve(config.run)
    asked = terms(run, len(requests))
    _check_model(run, len(requests))
    if not out.parent.is_dir():
        raise ConfigError("is in no folder that exists", who=str(out), advice=f"mkdir -p {out.parent}")
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # mode 0700
    try:
        roster = _write(made, config, run, requests, asked)
        made.rename(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return roster


def _check_model(run: RunConfig, sites: int) -> None:
    """Refuse a model that no site could build, and a ring that its sum does not fit, before anybody has a kit.

    Raises:
        ConfigError: an unknown encoder, or a ring that is too narrow.
    """
    from fedfuse_shared.models import outline  # noqa: PLC0415 - imports torch

    segments, _ = outline(run.model)
    scale_for(run, bounds_for(run, sites, cohort(run, sites)), sum(segment.size for segment in segments))


def _write(
    made: Path, config: FederationConfig, run: RunConfig, requests: Mapping[str, SiteRequest], asked: Terms
) -> Roster:
    home = RunHome(made / "server")
    for folder in (made / "operator", home.root, home.server_key.parent, made / "sites"):
        folder.mkdir(mode=0o700)
    operator = create_key(made / "operator" / "operator.key")
    roster = Roster(
        federation=config.federation,
        operator=identity_public(operator),
        server=identity_public(create_key(home.server_key)),
        sites={site: request.identity for site, request in requests.items()},
        coordinators=_officers(config.coordinators, made / "coordinator", "coordinator"),
        auditors=_officers(config.auditors, made / "auditor", "auditor"),
        nodes={site: request.node for site, request in requests.items()},
    )
    envelope = seal(roster, OPERATOR, operator)
    check_roster(envelope)  # two roles under one key, say
    enrolment = encode(envelope) + b"\n"
    authority = make_authority(config.federation, config.certificate.authority_days)
    server = make_server(authority, config.hosts, config.certificate.server_days)
    write_secret(made / "operator" / "ca.key", authority.key)
    write_secret(home.certificate_key, server.key)
    for path, content in (
        (made / "operator" / "ca.crt", authority.certificate),
        (made / "operator" / "roster.json", enrolment),
        (home.authority, authority.certificate),
        (home.certificate, server.certificate),
        (home.roster, enrolment),
    ):
        write_durably(path, content)
    for site in requests:
        _write_kit(
            made / "sites" / site,
            config,
            roster,
            enrolment,
            _kit(site, config, roster, authority, asked, operator),
        )
    save_toml(home.config, run)
    return roster


def _kit(
    site: str,
    config: FederationConfig,
    roster: Roster,
    authority: Certified,
    asked: Terms,
    operator: Ed25519PrivateKey,
) -> bytes:
    kit = Kit(
        roster_hash=roster.hash(),
        site=site,
        address=config.address,
        authority=authority.certificate.decode(),
        terms=asked,
    )
    return encode(seal(kit, OPERATOR, operator)) + b"\n"


def _write_kit(folder: Path, config: FederationConfig, roster: Roster, enrolment: bytes, kit: bytes) -> None:
    folder.mkdir(mode=0o700)
    welcome = WELCOME.format(site=folder.name, federation=config.federation, roster_hash=roster.hash())
    for name, content in (("roster.json", enrolment), ("kit.json", kit), ("README.txt", welcome.encode())):
        write_durably(folder / name, content)


def _officers(given: Mapping[str, str], folder: Path, role: str) -> dict[str, str]:
    """Return public keys by name, new keys made for those who gave none."""
    keys = {}
    for name, public in given.items():
        if public:
            try:
                check({"keys": {name: public}}, _Given, who="federation.toml")
            except FedfuseError as problem:
                raise ConfigError(
                    f"the key of {role} {name} is no public key",
                    who="federation.toml",
                    advice='give 64 hexadecimal digits, or "" to have one made',
                ) from problem
            keys[name] = public
            continue
        folder.mkdir(mode=0o700, exist_ok=True)
        keys[name] = identity_public(create_key(folder / f"{name}.key"))
    return keys


class _Given(Frozen):
    keys: dict[SiteName, Hex32]
