"""Which data sets a site's store knows, and what each has spent: the same records have one budget.

A data set is known by the content digests of its records, never by a name. Data sets that share a single record
share one budget; they form a *pool*. The digests stay in the store: outside, a data set is a random identifier, and
it keeps that identifier when records come or go, or the change itself would tell neighbouring data sets apart.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, NamedTuple

from fedfuse_client.store_database import Database
from fedfuse_shared.config.base import Hex32, Label
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.envelope import decode
from fedfuse_shared.errors import DataError, StateError
from fedfuse_shared.ledger.records import Charge, Policy, Reservation

DIGEST: Final = 32
"""Length of a record's content digest, SHA-256 (bytes)."""


class Spent(NamedTuple):
    """One reservation ever made on a pool."""

    federation: Label
    dataset: Hex32
    charges: tuple[Charge, ...]
    own_charges: tuple[Charge, ...]
    """What it cost if everybody else colludes."""
    draws: int
    """Integer draws of noise on each coordinate."""
    schedule: Schedule
    """What the site's policy said of its mechanisms then."""


def counted(spent: Iterable[Spent], schedule: Schedule) -> Schedule:
    """Return how a pool's spending counts under a policy's schedule: as free, if anything on it ever was.

    Whoever charged under a free schedule might have chosen other mechanisms had results been others; fixing it
    afterwards does not make that undone.
    """
    return Schedule.FREE if any(item.schedule is Schedule.FREE for item in spent) else schedule


def register(database: Database, digests: Iterable[bytes]) -> Hex32:
    """Return the identifier of the data set made of these records, having stored those that are new.

    Records never seen make a new data set. Any record seen before puts all of them in that record's pool, and pools
    that meet become one: from then on the charges of all count.

    Args:
        database: The site's store.
        digests: Content digest of every record (32 bytes each).

    Raises:
        DataError: there is no record.
    """
    with database.transaction():
        database.rows("CREATE TEMP TABLE incoming (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        database.run_many(
            "INSERT OR IGNORE INTO incoming VALUES (?)", (_checked(digest) for digest in digests)
        )
        if database.row("SELECT 1 FROM incoming") is None:
            raise DataError(
                "data set has no records", advice="check the folder and dataset_sites in policy.toml"
            )
        pools = database.rows(
            "SELECT DISTINCT dataset.pool FROM incoming JOIN record USING (digest) "
            "JOIN dataset ON dataset.number = record.dataset ORDER BY pool"
        )
        number = pools[0][0] if pools else _add(database)
        for (pool,) in pools[1:]:
            database.rows("UPDATE dataset SET pool = ? WHERE pool = ?", number, pool)
        database.rows(
            "INSERT INTO record SELECT digest, ? FROM incoming WHERE true ON CONFLICT DO NOTHING", number
        )
        database.rows("DROP TABLE incoming")
        # A pool is numbered after its oldest data set.
        identifier: Hex32 = database.rows("SELECT id FROM dataset WHERE number = ?", number)[0][0]
    return identifier


def spent(database: Database, dataset: Hex32) -> list[Spent]:
    """Return every reservation ever made on a data set or one of its pool, over all federations.

    Raises:
        StateError: the store does not know the data set.
    """
    found = database.row("SELECT pool FROM dataset WHERE id = ?", dataset)
    if found is None:
        raise StateError(
            f"data set {dataset[:16]}… is not in the store",
            who=f"store {database.path}",
            advice="register its records first",
        )
    leaves = database.rows(
        "SELECT leaf.federation, leaf.seq, leaf.raw FROM leaf JOIN dataset ON dataset.id = leaf.dataset "
        "WHERE dataset.pool = ? AND leaf.kind = ? ORDER BY leaf.federation, leaf.seq",
        found[0],
        Reservation.kind,
    )
    schedules = _schedules(database)
    result = []
    for federation, seq, raw in leaves:
        body = decode(raw.encode(), Reservation, who="store").body
        published = schedules.get(federation, [])
        standing = bisect_left(published, (seq,)) - 1
        schedule = published[standing][1] if standing >= 0 else Schedule.FIXED
        result.append(Spent(federation, body.dataset, body.charges, body.own_charges, body.draws, schedule))
    return result


def _schedules(database: Database) -> dict[Label, list[tuple[int, Schedule]]]:
    """Return the schedules this site's policies published in each federation, by their place in its chain."""
    found: dict[Label, list[tuple[int, Schedule]]] = {}
    for federation, seq, raw in database.rows(
        "SELECT federation, seq, raw FROM leaf WHERE federation IN (SELECT federation FROM chain) AND kind = ? "
        "ORDER BY federation, seq",
        Policy.kind,
    ):
        schedule = decode(raw.encode(), Policy, who="store").body.schedule
        found.setdefault(federation, []).append((seq, schedule))
    return found


def pools(database: Database) -> list[tuple[Hex32, ...]]:
    """Return the data sets the store knows, those that share a budget together, the oldest first."""
    found: dict[int, list[Hex32]] = {}
    for pool, identifier in database.rows("SELECT pool, id FROM dataset ORDER BY pool, number"):
        found.setdefault(pool, []).append(identifier)
    return [tuple(identifiers) for identifiers in found.values()]


def _checked(digest: bytes) -> tuple[bytes]:
    if len(digest) != DIGEST:
        raise ValueError(f"a record's digest has {DIGEST} bytes, not {len(digest)}")
    return (digest,)


def _add(database: Database) -> int:
    """Store a new data set in a pool of its own and return its number."""
    number: int = database.rows("SELECT coalesce(max(number), 0) + 1 FROM dataset")[0][0]
    database.rows("INSERT INTO dataset VALUES (?, ?, ?)", number, secrets.token_hex(32), number)
    return number
