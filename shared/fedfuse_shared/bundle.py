"""The app bundle that a run is submitted with: Flower asks for one; ours carries no code.

What runs at a site is what the site installed. The bundle's bytes are the same on every machine, so that a site's
policy can name its hash: an archive without compression, whose files have Flower's fixed date.
"""

from __future__ import annotations

import hashlib
import zipfile
from functools import cache
from io import BytesIO
from typing import Final

_DATE: Final = (1980, 1, 1, 0, 0, 0)
_CONFIG: Final = b"""[project]
name = "fedfuse"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedfuse"

[tool.flwr.app.components]
serverapp = "fedfuse_server.app:app"
clientapp = "fedfuse_client.app:app"
"""


@cache
def bundle() -> bytes:
    """Return the bundle (a Flower App Bundle, format of Flower 1.41)."""
    content = f"pyproject.toml,{hashlib.sha256(_CONFIG).hexdigest()},{8 * len(_CONFIG)}"
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("pyproject.toml", _CONFIG), (".info/CONTENT", content.encode())):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = 3  # written into the archive; otherwise it tells Windows from Unix
            archive.writestr(entry, data)
    return buffer.getvalue()


def bundle_hash() -> str:
    """Return the bundle's hash, as Flower names it and policies list it (SHA-256, hexadecimal)."""
    return hashlib.sha256(bundle()).hexdigest()
