"""Proxies of the environment stand between this machine and others, never between two of its own processes."""

from __future__ import annotations

import os


def reach_directly(host: str) -> None:
    """Have this process and its children reach a host of this machine without any proxy."""
    named = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [named, host.strip("[]")]))
