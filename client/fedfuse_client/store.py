"""A site's durable store: its chain of leaves, what its data sets have spent, and the round it is in.

Under Flower every message may be served by a fresh process, and any of them may be killed at any point. So whatever
a site sends is stored first: after a restart it sends the identical bytes again, or refuses. Per context there is
one reply to each phase, and a context that is finished is never begun again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from fedfuse_client import datasets
from fedfuse_client.chain import Chain
from fedfuse_client.store_database import WAIT, Database
from fedfuse_shared import limits
from fedfuse_shared.config.base import Hex32, Label, SiteName
from fedfuse_shared.errors import StateError
from fedfuse_shared.ledger.records import Charge


class SiteStore:
    """An open store; one process has it at a time, from ``open`` to the end of its ``with`` block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path, *, create: bool = False, wait: float = WAIT) -> Self:
        """Open a site's store.

        Args:
            path: The SQLite file; a lock and, while open, a write-ahead log lie beside it.
            create: Make a store where there is none. A lost store is then noticed only by comparing with the
                ledger (``Chain.check_head``): it was the site's memory of what it spent.
            wait: How long to wait for another process to close it (seconds).

        Raises:
            StateError: missing, in use, or damaged.
        """
        if create and not path.exists():
            Database.create(path)
        return cls(Database.open(path, wait=wait))

    @classmethod
    def view(cls, path: Path) -> Self:
        """Open a site's store to look at, also while the site is at work; every write is refused.

        Raises:
            StateError: missing or damaged.
        """
        return cls(Database.view(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store and let the next process have it."""
        self._database.close()

    def transaction(self) -> AbstractContextManager[None]:
        """Return a block whose writes become durable together when it ends, or not at all."""
        return self._database.transaction()

    def chain(self, federation: Label, site: SiteName) -> Chain:
        """Return the site's chain of leaves in a federation.

        Raises:
            StateError: the chain in this store is another site's.
        """
        return Chain(self._database, federation, site)

    def register_dataset(self, digests: Iterable[bytes]) -> Hex32:
        """Return the identifier of the data set made of these records; records seen before bring what they spent.

        Args:
            digests: Content digest of every record (32 bytes each), in any order.

        Raises:
            DataError: there is no record.
        """
        return datasets.register(self._database, digests)

    def spent(self, dataset: Hex32) -> list[Charge]:
        """Return every charge that counts against a data set, over all federations.

        Raises:
            StateError: the store does not know the data set.
        """
        return [charge for item in datasets.spent(self._database, dataset) for charge in item.charges]

    def pools(self) -> list[tuple[Hex32, ...]]:
        """Return the data sets the store knows, those that share a budget together."""
        return datasets.pools(self._database)

    def reservations(self, dataset: Hex32) -> list[datasets.Spent]:
        """Return every reservation that counts against a data set, in the order of each federation's chain.

        Raises:
            StateError: the store does not know the data set.
        """
        return datasets.spent(self._database, dataset)

    def backup(self, target: Path) -> None:
        """Write a copy of the store that only its owner can read and that holds no secrets of a round.

        A site restored from it refuses to train as soon as the ledger shows a leaf that it lacks.

        Raises:
            StateError: a file of that name exists, or it cannot be written.
        """
        self._database.backup(target)

    def save_step(
        self, context: Hex32, phase: str, state: bytes, reply: bytes, *, expires: float | None = None
    ) -> None:
        """Store the state after a phase and the reply to it, before that reply is sent.

        Args:
            context: The attempt.
            phase: The exchange that was answered.
            state: What the next phase needs; it replaces the state before, which is overwritten.
            reply: Exactly the bytes that will be sent.
            expires: When all that is stored for the context has to be erased (seconds since 1970); said in the
                first phase.

        Raises:
            StateError: the phase was answered before, or the context is finished.
        """
        with self.transaction():
            self._refuse_finished(context)
            if self._database.row("SELECT 1 FROM reply WHERE context = ? AND phase = ?", context, phase):
                raise StateError(
                    f"phase {phase} of context {context[:16]}… was answered before",
                    advice="send the stored reply again: a second, different one could be combined with it",
                )
            self._database.rows(
                "INSERT INTO session VALUES (?, ?, ?, ?, ?) ON CONFLICT (context) DO UPDATE "
                "SET phase = excluded.phase, state = excluded.state, checksum = excluded.checksum",
                context,
                phase,
                state,
                _checksum(phase, state),
                expires,
            )
            self._save_reply(context, phase, reply)

    def load_state(self, context: Hex32) -> tuple[str, bytes] | None:
        """Return the last phase answered in a context and the state after it; None if there is none.

        Raises:
            StateError: it is damaged.
        """
        found = self._database.row(
            "SELECT phase, state, checksum FROM session WHERE context = ? AND state IS NOT NULL", context
        )
        return (found[0], self._whole(*found)) if found else None

    def load_reply(self, context: Hex32, phase: str) -> bytes | None:
        """Return the bytes that answered a phase, to be sent again; None if it was not answered or was erased.

        Raises:
            StateError: they are damaged.
        """
        found = self._database.row(
            "SELECT reply, checksum FROM reply WHERE context = ? AND phase = ?", context, phase
        )
        return self._whole(phase, *found) if found else None

    def finish(self, context: Hex32, phase: str, reply: bytes) -> None:
        """Store the reply to a context's last phase and erase all else; only that reply can be sent again.

        Raises:
            StateError: the context is finished already.
        """
        with self.transaction():
            self._refuse_finished(context)
            self.erase(context)
            self._save_reply(context, phase, reply)

    def erase(self, context: Hex32) -> None:
        """Overwrite everything stored for a context and remember it as finished; it is never begun again."""
        with self.transaction():
            self._database.rows("DELETE FROM reply WHERE context = ?", context)
            self._database.rows(
                "INSERT INTO session VALUES (?, NULL, NULL, NULL, NULL) ON CONFLICT (context) DO UPDATE "
                "SET phase = NULL, state = NULL, checksum = NULL",
                context,
            )
            self._database.scrub()

    def erase_expired(self, now: float, *, longest: float = limits.MAX_ROUND_SECONDS) -> list[Hex32]:
        """Erase what is stored for attempts whose deadline has passed, and return their contexts.

        Args:
            now: Seconds since 1970.
            longest: Longest time an attempt may last (seconds). Of a clock that was set back by days no deadline
                would ever be reached: one that lies further ahead than this has passed too.
        """
        late = [
            context
            for (context,) in self._database.rows(
                "SELECT context FROM session WHERE (expires <= ? OR expires > ?) "
                "AND (state IS NOT NULL OR context IN (SELECT context FROM reply))",
                now,
                now + longest,
            )
        ]
        for context in late:
            self.erase(context)
        return late

    def is_finished(self, context: Hex32) -> bool:
        """Return whether a context was finished or erased."""
        return (
            self._database.row("SELECT 1 FROM session WHERE context = ? AND state IS NULL", context)
            is not None
        )

    def stored_contexts(self) -> list[Hex32]:
        """Return the contexts that still hold a state or a reply, oldest first."""
        found = self._database.rows(
            "SELECT context FROM session WHERE state IS NOT NULL OR context IN (SELECT context FROM reply) "
            "ORDER BY rowid"
        )
        return [context for (context,) in found]

    def _save_reply(self, context: Hex32, phase: str, reply: bytes) -> None:
        self._database.rows(
            "INSERT INTO reply VALUES (?, ?, ?, ?)", context, phase, reply, _checksum(phase, reply)
        )

    def _refuse_finished(self, context: Hex32) -> None:
        if self.is_finished(context):
            raise StateError(
                f"context {context[:16]}… is finished here",
                advice="the coordinator has to offer a new attempt",
            )

    def _whole(self, phase: str, stored: bytes, checksum: bytes) -> bytes:
        if _checksum(phase, stored) != checksum:
            raise StateError(
                "holds a damaged step of a round",
                who=f"store {self._database.path}",
                advice="check the disk; this attempt cannot be continued",
            )
        return stored


def _checksum(phase: str, stored: bytes) -> bytes:
    return hashlib.sha256(phase.encode() + b"\0" + stored).digest()
