"""Where a site's server is, and what the connection to it needs."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from fedfuse_shared.config.base import Frozen
from fedfuse_shared.config.files import load_toml
from fedfuse_shared.enrolment import Address


class Connection(Frozen):
    """The content of ``connection.toml``."""

    address: Address
    """Of the server, as in ``"fl.example.org:8000"``."""

    @property
    def is_loopback(self) -> bool:
        """Return whether the server is on this machine."""
        host = self.address.rpartition(":")[0].strip("[]")
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def load_connection(path: Path) -> Connection:
    """Return where the server is.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    return load_toml(path, Connection)
