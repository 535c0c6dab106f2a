"""The ledger's file: one canonical envelope a line, appended and on disk before anybody is told.

A crash may leave the last line torn; opening the file for writing heals it by cutting what follows the last newline.
Whole lines are never cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_shared import limits
from fedfuse_shared.envelope import Envelope, encode
from fedfuse_shared.errors import DataError, ProtocolError, StateError
from fedfuse_shared.files import write_durably
from fedfuse_shared.ledger.checkpoint import Head, origin_of, sign_head
from fedfuse_shared.ledger.merkle import Tree

_CHUNK = 2**20


@dataclass(frozen=True)
class Entry:
    """One leaf as it stands in the file."""

    index: int
    raw: bytes


def checkpoint_path(ledger: Path) -> Path:
    """Return where a ledger's checkpoint lies: beside it."""
    return ledger.with_suffix(".checkpoint")


def kind_of(raw: bytes) -> str:
    """Return the kind an envelope says it has; nothing else of it is checked.

    Raises:
        ProtocolError: it says none.
    """
    try:
        kind = json.loads(raw)["kind"]
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise ProtocolError("leaf is no JSON object with a kind") from problem
    if not isinstance(kind, str):
        raise ProtocolError("leaf's kind is no text")
    return kind


def read_ledger(path: Path) -> Iterator[Entry]:
    """Yield a ledger's whole lines in order, in bounded memory.

    Raises:
        DataError: unreadable, a line over the limit, or a last line without its newline.
    """
    try:
        with path.open("rb") as file:
            index = 0
            while line := file.readline(limits.MAX_LEDGER_LINE + 2):
                if not line.endswith(b"\n"):
                    torn = len(line) <= limits.MAX_LEDGER_LINE
                    what = "is torn: it has no end" if torn else f"is over {limits.MAX_LEDGER_LINE} bytes"
                    raise DataError(f"line {index + 1} {what}", who=str(path), advice="get the whole ledger")
                yield Entry(index, line[:-1])
                index += 1
    except OSError as problem:
        raise DataError(f"cannot be read ({problem.strerror})", who=str(path)) from problem


class LedgerWriter:
    """A ledger open for appending.

    Args:
        path: The file; it is made if it is missing.

    Attributes:
        healed: Bytes of a torn last line that were cut when the file was opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tree = Tree()
        self.healed = self._heal()
        if path.exists():
            for entry in read_ledger(path):
                self._tree.append(entry.raw)
        try:
            self._file = path.open("ab")
        except OSError as problem:
            raise StateError(f"ledger cannot be written ({problem.strerror})", who=str(path)) from problem

    def _heal(self) -> int:
        if not self._path.exists():
            return 0
        with self._path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end:
                start = max(0, end - _CHUNK)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    end = start + found + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())
        return size - end

    def append(self, envelopes: Iterable[Envelope[Any]]) -> range:
        """Append leaves and return their indices; durable when it returns.

        Raises:
            StateError: the disk is full or fails; what was written of it is cut off again.
        """
        lines = [encode(envelope) for envelope in envelopes]
        before = self._file.tell()
        try:
            self._file.write(b"".join(line + b"\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as problem:
            os.truncate(self._path, before)
            raise StateError(
                f"ledger cannot be written ({problem.strerror})", who=str(self._path), advice="free some room"
            ) from problem
        first = self._tree.size
        for line in lines:
            self._tree.append(line)
        return range(first, self._tree.size)

    def checkpoint(self, federation: str, key: Ed25519PrivateKey) -> Head:
        """Sign the ledger's size and root, write them beside it, and return them."""
        head = Head(origin_of(federation), self._tree.size, self._tree.root())
        write_durably(checkpoint_path(self._path), sign_head(head, key))
        return head

    def close(self) -> None:
        """Close the file."""
        self._file.close()
