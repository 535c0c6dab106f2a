"""How a site leaves: its last leaf, after which it takes part in nothing."""

from __future__ import annotations

from typing import Final

from fedfuse_client.home import SiteHome
from fedfuse_client.run_lock import only_one
from fedfuse_client.store import SiteStore
from fedfuse_shared.envelope import Envelope
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.ledger.records import Leave

MAX_REASON: Final = 400
"""Longest reason (characters), as the ledger takes it."""
_WAIT: Final = 1.0
"""How long the store is waited for: whoever has it longer than that is at work (seconds)."""


def leave(home: SiteHome, reason: str) -> Envelope[Leave]:
    """Sign the site's last leaf and erase the secrets of the attempt it is in; what was spent stays charged.

    From then on no offer is accepted and nothing is reserved; the leaf is handed to the server when it next asks.

    Args:
        home: The site's folder.
        reason: Why, for everyone who reads the ledger.

    Raises:
        ConfigError: no reason, one that is too long, or one of more than one line.
        PolicyError: the site left before.
        StateError: the site is running, or its folder cannot be used.
        VerificationError: the roster is not the pinned one.
    """
    reason = reason.strip()
    if not reason or len(reason) > MAX_REASON or not reason.isprintable():
        raise ConfigError(
            f"the reason has to be one line of 1 to {MAX_REASON} characters",
            advice="say it shortly: everybody who reads the ledger sees it",
        )
    policy = home.load_policy()
    me = home.load_identity(policy)
    with only_one(home), SiteStore.open(home.store, wait=_WAIT) as store, store.transaction():
        leaf = store.chain(policy.federation, policy.site).append(
            lambda seq, prev: Leave(seq=seq, prev=prev, reason=reason), me.key
        )
        for context in store.stored_contexts():
            store.erase(context)
    return leaf
