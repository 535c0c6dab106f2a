"""The SQLite file under a site's store: its schema, one process at a time, every commit on disk, damage noticed.

Rules kept here, whatever is stored:

1. One process has the store open; a second waits a bounded time and is then refused, unless it only looks.
2. What a transaction wrote is on disk when it ends (WAL, ``synchronous=FULL``), whole or not at all.
3. Nobody but the owner reads the file, and what is deleted is overwritten.
4. A file whose structure, or whose chain of leaves, does not hold is refused before anything is read from it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from fedfuse_shared import limits
from fedfuse_shared.errors import StateError
from fedfuse_shared.files import is_disk_full
from fedfuse_shared.ledger.records import FIRST_LINK

APPLICATION: Final = 0x66656466
"""SQLite's application id of a site store: "fedf" in ASCII."""
VERSION: Final = 2
"""Version of the schema below."""
WAIT: Final = 10.0
"""Longest wait for another process to close the store (seconds): longer than one message is served."""
_PAUSE: Final = 0.02
"""Between two looks at the lock (seconds)."""

# A leaf's columns are computed from its text, so that no second copy of a fact can disagree with what was signed.
# A session without a state is finished. Every key also stands in an index, which the integrity check compares.
_SCHEMA: Final = f"""
CREATE TABLE chain (
    federation TEXT PRIMARY KEY,
    site TEXT NOT NULL
) STRICT;
CREATE TABLE leaf (
    federation TEXT NOT NULL REFERENCES chain (federation),
    seq INTEGER NOT NULL,
    raw TEXT NOT NULL,
    link TEXT NOT NULL,
    kind TEXT NOT NULL GENERATED ALWAYS AS (json_extract(raw, '$.kind')),
    context TEXT GENERATED ALWAYS AS (json_extract(raw, '$.body.context')),
    dataset TEXT GENERATED ALWAYS AS (json_extract(raw, '$.body.dataset')),
    PRIMARY KEY (federation, seq)
) STRICT;
CREATE UNIQUE INDEX one_leaf_per_context ON leaf (federation, kind, context);
CREATE INDEX leaf_dataset ON leaf (dataset) WHERE dataset IS NOT NULL;
CREATE TABLE dataset (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    pool INTEGER NOT NULL REFERENCES dataset (number)
) STRICT;
CREATE INDEX dataset_pool ON dataset (pool);
CREATE TABLE record (
    digest BLOB PRIMARY KEY CHECK (length(digest) = 32),
    dataset INTEGER NOT NULL REFERENCES dataset (number)
) STRICT;
CREATE TABLE session (
    context TEXT PRIMARY KEY,
    phase TEXT,
    state BLOB,
    checksum BLOB,
    expires REAL,
    CHECK ((phase IS NULL) = (state IS NULL) AND (state IS NULL) = (checksum IS NULL))
) STRICT;
CREATE TABLE reply (
    context TEXT NOT NULL REFERENCES session (context),
    phase TEXT NOT NULL,
    reply BLOB NOT NULL,
    checksum BLOB NOT NULL,
    PRIMARY KEY (context, phase)
) STRICT;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""

_MIGRATIONS: Final = {
    1: (
        "ALTER TABLE session ADD COLUMN expires REAL",
        "DELETE FROM reply",
        "UPDATE session SET phase = NULL, state = NULL, checksum = NULL",
    )
}
"""What makes a store of one version one of the next. An attempt begun under version 1 has no deadline and its offer
cannot be read any more: it is over, and its secrets are overwritten."""


class Database:
    """An open site store, locked until it is closed; every SQLite error leaves it as a StateError."""

    def __init__(self, path: Path, lock: int | None, connection: sqlite3.Connection) -> None:
        self.path = path
        self._lock = lock
        self._connection = connection
        self._scrub = False

    @classmethod
    def create(cls, path: Path) -> None:
        """Make an empty store that only its owner can read, unless one is there.

        Raises:
            StateError: the folder cannot be written.
        """
        # Built aside and then linked into place: a crash leaves no half store, and no store is ever overwritten.
        try:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fedfuse-store-") as folder:
                fresh = Path(folder) / "store"
                fresh.touch(mode=0o600)
                with _named(path), closing(_connect(fresh)) as connection:
                    # The log comes last: on a full disk, closing would leave the schema in it without a word.
                    connection.executescript(f"BEGIN; {_SCHEMA} COMMIT")
                    connection.execute("PRAGMA journal_mode = WAL")
                with suppress(FileExistsError):
                    os.link(fresh, path)
                _sync_folder(path.parent)
        except OSError as problem:
            raise StateError(
                f"cannot be made ({problem.strerror})",
                who=f"store {path}",
                advice="check the folder and its owner",
            ) from problem

    @classmethod
    def open(cls, path: Path, *, wait: float = WAIT) -> Database:
        """Lock and check an existing store.

        Args:
            path: The SQLite file.
            wait: How long to wait for another process to close it (seconds).

        Raises:
            StateError: missing, in use, of another version, or damaged.
        """
        path = _existing(path)
        try:
            path.chmod(0o600)
            lock = _take_lock(path, wait)
        except OSError as problem:
            raise StateError(
                f"cannot be opened ({problem.strerror})",
                who=f"store {path}",
                advice="run as the store's owner",
            ) from problem
        try:
            with _named(path):
                database = cls(path, lock, _connect(path))
                try:
                    database._check()
                except BaseException:
                    database._connection.close()
                    raise
        except BaseException:
            os.close(lock)
            raise
        return database

    @classmethod
    def view(cls, path: Path) -> Database:
        """Open and check an existing store to look at, also while another process has it.

        It takes no lock, and SQLite refuses every write. Each statement sees what was committed before it.

        Raises:
            StateError: missing, of another version, or damaged.
        """
        path = _existing(path)
        with _named(path):
            database = cls(path, None, _connect(path, mode="ro"))
            try:
                database._check_whole()
            except BaseException:
                database._connection.close()
                raise
        return database

    def close(self) -> None:
        """Close the store and let the next process have it."""
        try:
            with _named(self.path):
                self._connection.close()
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return all its rows."""
        with _named(self.path):
            return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        """Run one statement and return its first row, if there is one."""
        found = self.rows(sql, *values)
        return found[0] if found else None

    def run_many(self, sql: str, values: Iterable[tuple[Any, ...]]) -> None:
        """Run one statement for each tuple of values."""
        with _named(self.path):
            self._connection.executemany(sql, values)

    @property
    def in_transaction(self) -> bool:
        """Whether what was written last still waits for its commit."""
        return self._connection.in_transaction

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make what is written inside durable as a whole when the outermost block ends, or undo it."""
        nested = self.in_transaction
        self.rows("SAVEPOINT nested" if nested else "BEGIN IMMEDIATE")
        try:
            yield
            self.rows("RELEASE nested" if nested else "COMMIT")
        except BaseException:
            if self.in_transaction:
                self.rows("ROLLBACK TO nested" if nested else "ROLLBACK")
            raise
        if not nested and self._scrub:
            self._truncate_log()

    def backup(self, target: Path) -> None:
        """Write a copy without any round's secrets; nothing is overwritten, and a copy is whole or not there.

        Raises:
            StateError: a file of that name exists, or it cannot be written.
        """
        try:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fedfuse-backup-") as folder:
                copy = Path(folder) / "store"
                copy.touch(mode=0o600)
                with _named(target), closing(_connect(copy)) as connection:
                    self._connection.backup(connection)
                    connection.execute("DELETE FROM reply")
                    connection.execute("UPDATE session SET phase = NULL, state = NULL, checksum = NULL")
                    connection.execute("PRAGMA journal_mode = DELETE")
                    connection.execute("VACUUM")
                with copy.open("rb") as file:
                    os.fsync(file.fileno())
                os.link(copy, target)
                _sync_folder(target.parent)
        except FileExistsError as problem:
            raise StateError(
                "exists and is not overwritten", who=str(target), advice="choose another name"
            ) from problem
        except OSError as problem:
            raise StateError(
                f"backup cannot be written ({problem.strerror})",
                who=str(target),
                advice="check the folder and the space on its disk",
            ) from problem

    def scrub(self) -> None:
        """Leave no older copy of deleted bytes in the write-ahead log once this transaction ends."""
        self._scrub = True

    def _truncate_log(self) -> None:
        """Empty the write-ahead log, or remember to do so while another program reads the store."""
        busy, _, _ = self.rows("PRAGMA wal_checkpoint(TRUNCATE)")[0]
        self._scrub = bool(busy)

    def _check(self) -> None:
        """Refuse a file that is not a whole site store of this version, once an older one is brought to it."""
        if self.rows("PRAGMA application_id") == [(APPLICATION,)]:
            self._migrate()
        self._check_whole()
        # After a crash the log may still hold what was deleted.
        self._truncate_log()

    def _check_whole(self) -> None:
        found = self.rows("PRAGMA application_id"), self.rows("PRAGMA user_version")
        if found != ([(APPLICATION,)], [(VERSION,)]):
            raise StateError(
                f"is not a site store of version {VERSION}",
                who=f"store {self.path}",
                advice="check the path; a newer store needs a newer fedfuse",
            )
        if self.rows("PRAGMA integrity_check(1)") != [("ok",)] or self.rows("PRAGMA foreign_key_check"):
            raise _damaged(self.path, "its structure does not hold")
        self._check_leaves()

    def _migrate(self) -> None:
        """Bring an older store to this version, each step whole or not at all."""
        while (version := self.rows("PRAGMA user_version")[0][0]) in _MIGRATIONS:
            with self.transaction():
                for statement in _MIGRATIONS[version]:
                    self.rows(statement)
                self.rows(f"PRAGMA user_version = {version + 1}")

    def _check_leaves(self) -> None:
        """Check that every chain is contiguous, linked, and byte for byte what was written."""
        last: tuple[str | None, int, str] = (None, 0, FIRST_LINK)
        for federation, seq, raw, link, said_seq, prev in self._connection.execute(
            "SELECT federation, seq, raw, link, json_extract(raw, '$.body.seq'), json_extract(raw, '$.body.prev') "
            "FROM leaf ORDER BY federation, seq"
        ):
            _, last_seq, last_link = last if federation == last[0] else (None, 0, FIRST_LINK)
            hashed = hashlib.sha256(limits.LABEL_LEAF_LINK + raw.encode()).hexdigest()
            if (seq, said_seq, prev, link) != (last_seq + 1, seq, last_link, hashed):
                raise _damaged(self.path, f"leaf {seq} of federation {federation} does not hold")
            last = federation, seq, link


def _existing(path: Path) -> Path:
    """Return a store's own path: one lock, whichever way it was reached."""
    if not path.is_file():
        advice = "make it once per site, or restore the site's disk"
        raise StateError("does not exist", who=f"store {path}", advice=advice)
    return path.resolve()


def _connect(path: Path, *, mode: str = "rw") -> sqlite3.Connection:
    """Open a file and set what SQLite sets per connection."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA cell_size_check = ON")
        # Digests of records pass through a temporary table: they are not to land in the machine's /tmp.
        connection.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        connection.close()
        raise
    return connection


def _take_lock(path: Path, wait: float) -> int:
    """Return a descriptor that holds the store's lock until closed; a killed process lets go of it too.

    SQLite's own locks do not serve: they are taken per transaction, and a clone of a running site would slip in
    between two of them.
    """
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_PAUSE)
                continue
            os.close(lock)
            raise StateError(
                "is in use by another process",
                who=f"store {path}",
                advice="one site runs once: stop the other process that was started from this kit",
            ) from None
        except BaseException:
            os.close(lock)
            raise
        return lock


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what SQLite reports into an error an operator can act on."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # a rule of the schema or a mistake of the caller: not the file's condition
    except UnicodeDecodeError as problem:
        raise _damaged(path, "it holds text that is none") from problem
    except sqlite3.Error as problem:
        code = getattr(problem, "sqlite_errorcode", 0) & 0xFF
        if is_disk_full(problem):
            raise StateError(
                "disk is full", who=f"store {path}", advice="free space and start again"
            ) from problem
        if code == sqlite3.SQLITE_BUSY:
            raise StateError(
                "is being used by another program",
                who=f"store {path}",
                advice="close that program and start again",
            ) from problem
        raise _damaged(path, str(problem)) from problem


def _damaged(path: Path, why: str) -> StateError:
    return StateError(
        f"is damaged or unreadable ({why})",
        who=f"store {path}",
        advice="check the disk; do not start afresh without telling the operator, for what was spent stays spent",
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
