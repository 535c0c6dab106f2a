"""A site's folder as it lies on a site's machine once it has joined: every file, closed to other users."""

from __future__ import annotations

from pathlib import Path

from fedfuse_client.code import code_hash
from fedfuse_client.home import SiteHome
from fedfuse_shared.bundle import bundle_hash
from fedfuse_shared.keyfile import create_node_key
from support.data_folder import rows, write_folder
from support.federation import Federation
from support.lone_site import NAME, write_home


def write_site(root: Path, federation: Federation, authority: bytes, **changes: object) -> SiteHome:
    """Write the folder of site ``lyon`` and its data beside it; the roster lists its node key."""
    data = root.with_name(f"{root.name}-data")
    if not data.exists():
        write_folder(data, rows(12))
    home = SiteHome(root)
    spare = root.with_name(f"{root.name}.node.key")
    node = create_node_key(spare)
    federation.roster = federation.roster.model_copy(update={"nodes": {NAME: node}})
    values = {"code": (code_hash(),), "bundles": (bundle_hash(),), **changes}
    write_home(root, federation, data, **values)
    spare.replace(home.node_key)
    home.authority.write_bytes(authority)
    connect(home, "127.0.0.1:1")
    root.chmod(0o700)
    for path in root.iterdir():
        path.chmod(0o600)
    return home


def connect(home: SiteHome, address: str) -> None:
    """Say where the server is."""
    home.connection.write_text(f'address = "{address}"\n')
    home.connection.chmod(0o600)
