"""The ledger's file: one canonical envelope a line, appended and on disk before anybody is told.

A crash may leave the last line torn; opening the file for writing heals it by cutting what follows the last newline.
Whole lines are never cut: a ledger that is shorter than its own checkpoint is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_shared import limits
from fedfuse_shared.envelope import Envelope, encode
from fedfuse_shared.errors import DataError, ProtocolError, StateError
from fedfuse_shared.files import write_durably
from fedfuse_shared.ledger.checkpoint import (
    MAX_CHECKPOINT,
    Head,
    origin_of,
    parse_checkpoint,
    sign_checkpoint,
)
from fedfuse_shared.ledger.merkle import Tree

_CHUNK: Final = 2**20


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
            while line := file.readline(limits.MAX_LEDGER_LINE + 1):
                if not line.endswith(b"\n"):
                    torn = len(line) <= limits.MAX_LEDGER_LINE
                    what = (
                        "has no end: the file is torn" if torn else f"is over {limits.MAX_LEDGER_LINE} bytes"
                    )
                    raise DataError(
                        f"line {index + 1} {what}",
                        who=str(path),
                        advice="get the whole ledger from the server",
                    )
                yield Entry(index, line[:-1])
                index += 1
    except OSError as problem:
        raise DataError(
            f"cannot be read ({problem.strerror})", who=str(path), advice="check the path"
        ) from problem


class LedgerWriter:
    """A ledger open for appending, by one process at a time.

    Args:
        path: The file; it is made if it is missing.

    Attributes:
        healed: Bytes of a torn last line that were cut when the file was opened.

    Raises:
        StateError: it cannot be written, another process has it open, or it does not reach its own checkpoint.
        DataError: a line is over the limit.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tree = Tree()
        self._broken = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as problem:
            raise self._unwritable(problem) from problem
        try:
            self._lock()
            self.healed = self._heal()
            self._replay()
        except BaseException:
            os.close(self._file)
            raise

    @property
    def size(self) -> int:
        """Leaves on the ledger."""
        return self._tree.size

    def append(self, envelopes: Iterable[Envelope[Any]]) -> range:
        """Append leaves and return their indices; durable when it returns.

        Raises:
            StateError: the disk is full or fails; what was written of it is cut off again.
        """
        lines = [encode(envelope) for envelope in envelopes]
        if self._broken:
            raise StateError(
                "ledger failed while it was written", who=str(self._path), advice="restart the server"
            )
        before = os.fstat(self._file).st_size
        try:
            self._write(b"".join(line + b"\n" for line in lines))
            os.fsync(self._file)
        except OSError as problem:
            self._cut_back(before)
            raise self._unwritable(problem) from problem
        first = self._tree.size
        for line in lines:
            self._tree.append(line)
        return range(first, self._tree.size)

    def checkpoint(self, federation: str, key: Ed25519PrivateKey) -> Head:
        """Sign the ledger's size and root, write them beside it, and return them.

        Raises:
            StateError: the disk is full or fails; the old checkpoint stands.
        """
        head = Head(origin_of(federation), self._tree.size, self._tree.root())
        try:
            write_durably(checkpoint_path(self._path), sign_checkpoint(head, key))
        except OSError as problem:
            raise self._unwritable(problem) from problem
        return head

    def close(self) -> None:
        """Close the file and let others have it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    # --- opening --------------------------------------------------------------------------------------------
    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise StateError(
                "ledger is open in another process", who=str(self._path), advice="stop the other server first"
            ) from problem

    def _heal(self) -> int:
        """Cut what follows the last newline, and return how many bytes that was."""
        size = end = os.fstat(self._file).st_size
        while end:
            start = max(0, end - _CHUNK)
            found = os.pread(self._file, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        try:
            if end < size:
                os.ftruncate(self._file, end)
            os.fsync(self._file)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the file itself may be new
            finally:
                os.close(folder)
        except OSError as problem:
            raise self._unwritable(problem) from problem
        return size - end

    def _replay(self) -> None:
        """Rebuild the tree and compare it with what was last signed, on the way."""
        signed = self._last_signed()
        reached = signed is None or signed.size == 0
        for entry in read_ledger(self._path):
            self._tree.append(entry.raw)
            if signed is not None and self._tree.size == signed.size:
                reached = self._tree.root() == signed.root
        if signed is not None and not reached:
            raise StateError(
                f"ledger of {self._tree.size} leaves does not contain its own checkpoint of {signed.size}: leaves "
                "were lost or changed",
                who=str(self._path),
                advice="restore the newest copy of the ledger; sites refuse one that forgets what they signed",
            )

    def _last_signed(self) -> Head | None:
        path = checkpoint_path(self._path)
        try:
            with path.open("rb") as file:
                return parse_checkpoint(file.read(MAX_CHECKPOINT + 1)).head
        except FileNotFoundError:
            return None
        except (OSError, DataError) as problem:
            raise StateError(f"checkpoint cannot be read ({problem})", who=str(path)) from problem

    # --- writing --------------------------------------------------------------------------------------------
    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            view = view[os.write(self._file, view) :]

    def _cut_back(self, size: int) -> None:
        """After a failure nothing of it may stand; where even that fails, nothing more is written."""
        try:
            os.ftruncate(self._file, size)
            os.fsync(self._file)
        except OSError:
            self._broken = True

    def _unwritable(self, problem: OSError) -> StateError:
        return StateError(
            f"ledger cannot be written ({problem.strerror})",
            who=str(self._path),
            advice="free some room or check the folder's permissions",
        )
