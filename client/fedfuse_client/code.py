"""Which fedfuse code runs at this site: one hash over its installed modules, for a policy to name.

It notices code that nobody approved, an upgrade for instance. It cannot stop code that was changed so as not to ask:
what may run at all has to be decided by whoever starts the process.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable

from fedfuse_shared import limits

PACKAGES = ("fedfuse_client", "fedfuse_shared")
"""What a site runs."""
_IMPORTABLE = (".py", ".pyc", ".so", ".pyd")
"""Endings of what Python imports from a folder: of two modules of one name it takes the compiled one."""


def code_hash() -> str:
    """Return the hash of every module of the packages a site runs (SHA-256, hexadecimal).

    Read anew each time: what trains is imported late, by a process that may be older than an upgrade.
    """
    digest = hashlib.sha256(limits.LABEL_CODE)
    for package in PACKAGES:
        for name, module in sorted(_modules(files(package), package)):
            content = module.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _modules(folder: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found = []
    for entry in folder.iterdir():
        name = f"{prefix}/{entry.name}"
        if entry.is_dir():
            # Python's own cache of the modules beside it says nothing new, and is another on every machine.
            found += _modules(entry, name) if entry.name != "__pycache__" else []
        elif entry.name.endswith(_IMPORTABLE):
            found.append((name, entry))
    return found
