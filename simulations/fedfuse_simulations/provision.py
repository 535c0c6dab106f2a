"""The folders of a simulated federation: one for the run, one per site, each with the keys only it may hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedfuse_client.home import SiteHome
from fedfuse_client.joining import policy_for
from fedfuse_server.home import RunHome
from fedfuse_server.provisioning import terms
from fedfuse_shared.config.base import OPERATOR, Modality
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.files import save_toml
from fedfuse_shared.crypto.keys import identity_public
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.files import write_durably
from fedfuse_shared.keyfile import create_key
from fedfuse_shared.roster import Roster


def provision(
    home: RunHome, config: RunConfig, data: Path, sites: Sequence[str], modalities: tuple[Modality, ...]
) -> None:
    """Write a run's folder and its sites' folders; ``config.toml`` last, so that it marks them complete.

    Every site's policy allows exactly the planned schedule: its cap is the run's epsilon and its plan is pinned.

    Args:
        home: The run's folder; it must be new.
        config: Settings with the noise multiplier filled in.
        data: The data folder all sites of the simulation read their own rows from.
        sites: Names of the sites.
        modalities: What every site declares to feed.

    Raises:
        ConfigError: the bounds of secure aggregation do not fit the number of sites.
    """
    asked = terms(config, len(sites))
    home.server_key.parent.mkdir(parents=True, mode=0o700)
    server = create_key(home.server_key)
    operator = create_key(home.server_key.parent / "operator.key")
    folders = {name: SiteHome(home.root / "sites" / name) for name in sites}
    roster = Roster(
        federation=config.federation,
        operator=identity_public(operator),
        server=identity_public(server),
        sites={name: folder.initialise() for name, folder in folders.items()},
    )
    enrolment = encode(seal(roster, OPERATOR, operator)) + b"\n"
    write_durably(home.roster, enrolment)
    for name, folder in folders.items():
        write_durably(folder.roster, enrolment)
        policy = policy_for(asked, roster, name, data=data, modalities=modalities)
        # One machine, one installation: it may be upgraded between two halves of a run.
        policy = policy.model_copy(update={"models": (), "code": (), "bundles": ()})
        save_toml(folder.policy, policy)
    save_toml(home.config, config)


def site_folders(home: RunHome) -> dict[str, Path]:
    """Return the sites' folders of a provisioned run, by name."""
    return {folder.name: folder for folder in sorted((home.root / "sites").iterdir())}
