"""A site's folder (its kit): policy, signing key, pinned roster and durable store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedfuse_client.policy import SitePolicy, load_policy
from fedfuse_client.store import SiteStore
from fedfuse_shared import limits
from fedfuse_shared.envelope import decode
from fedfuse_shared.errors import ConfigError, StateError
from fedfuse_shared.keyfile import create_key, load_key
from fedfuse_shared.roster import Roster, check_roster
from fedfuse_shared.secagg.site import Identity


@dataclass(frozen=True)
class SiteHome:
    """The paths of one site's folder, and how to read what lies there."""

    root: Path

    @property
    def policy(self) -> Path:
        """What the site allows."""
        return self.root / "policy.toml"

    @property
    def key(self) -> Path:
        """The site's signing key; it never leaves this folder."""
        return self.root / "identity.key"

    @property
    def roster(self) -> Path:
        """The signed roster; the policy pins its hash."""
        return self.root / "roster.json"

    @property
    def store(self) -> Path:
        """The site's durable store."""
        return self.root / "store.db"

    @property
    def connection(self) -> Path:
        """Where the server is."""
        return self.root / "connection.toml"

    @property
    def node_key(self) -> Path:
        """The key that opens the connection; unlike the site's own it signs nothing that counts."""
        return self.root / "node.key"

    @property
    def request(self) -> Path:
        """What is sent to the operator, so that the site is enrolled; nothing in it is secret."""
        return self.root / "request.json"

    @property
    def authority(self) -> Path:
        """The certificate authority that the server's certificate comes from."""
        return self.root / "ca.crt"

    @property
    def logs(self) -> Path:
        """Folder of what `fedfuse site run` and its SuperNode write."""
        return self.root / "logs"

    def initialise(self) -> str:
        """Make the folder, the site's key and its empty store, and return the key's public half in hexadecimal.

        Raises:
            StateError: a key is there already.
        """
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        public = create_key(self.key).public_key().public_bytes_raw().hex()
        SiteStore.open(self.store, create=True).close()
        return public

    def load_policy(self) -> SitePolicy:
        """Return the site's policy.

        Raises:
            ConfigError: it is missing or wrong.
        """
        return load_policy(self.policy)

    def load_identity(self, policy: SitePolicy) -> Identity:
        """Return name, key and roster, checked against the policy's pin and against each other.

        Raises:
            StateError: a file cannot be read.
            VerificationError: the roster is not the pinned one.
            ConfigError: the roster lists another key for this site.
        """
        try:
            raw = self.roster.read_bytes()[: limits.MAX_MESSAGE + 1]
        except OSError as problem:
            raise StateError(f"roster cannot be read ({problem.strerror})", who=str(self.roster)) from problem
        roster = check_roster(
            decode(raw.rstrip(b"\n"), Roster, who=str(self.roster)), pinned=policy.roster_hash
        )
        key = load_key(self.key)
        if roster.sites.get(policy.site) != key.public_key().public_bytes_raw().hex():
            raise ConfigError(
                "the roster lists another key for this site, or none",
                who=policy.site,
                advice="send the operator this site's public key, or take the key the roster was made with",
            )
        return Identity(policy.site, key, roster)

    def open_store(self) -> SiteStore:
        """Return the site's store; a missing one is never replaced, because it is the memory of what was spent.

        Raises:
            StateError: it is damaged, or another process holds it.
        """
        return SiteStore.open(self.store)

    def view_store(self) -> SiteStore:
        """Return the site's store to look at, also while the site is at work.

        Raises:
            StateError: it is missing or damaged.
        """
        return SiteStore.view(self.store)
