"""What an audit reads: the ledger's lines, the signed roster and the signed checkpoint; nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedfuse_shared import limits
from fedfuse_shared.envelope import decode
from fedfuse_shared.errors import DataError, ProtocolError
from fedfuse_shared.ledger.checkpoint import MAX_CHECKPOINT, Head, verify_checkpoint
from fedfuse_shared.ledger.log import checkpoint_path, read_ledger
from fedfuse_shared.roster import Roster, check_roster


@dataclass(frozen=True)
class Sources:
    """The three files an audit rests on."""

    ledger: Path
    roster: Path
    checkpoint: Path

    @classmethod
    def beside(cls, ledger: Path, roster: Path | None, checkpoint: Path | None) -> Sources:
        """Return the files that were named, and for the others those that lie beside the ledger."""
        return cls(ledger, roster or ledger.with_name("roster.json"), checkpoint or checkpoint_path(ledger))

    def load_roster(self, pin: str | None) -> Roster:
        """Return the roster, its signature and, where one is given, its pin checked.

        Raises:
            DataError: the file cannot be read or is not a roster.
            VerificationError: its signature or the pin does not hold.
        """
        raw = _read(self.roster, limits.MAX_MESSAGE, "--roster")
        try:
            envelope = decode(raw.removesuffix(b"\n"), Roster, who=str(self.roster))
        except ProtocolError as problem:
            raise DataError(
                f"is not a signed roster ({problem.message})",
                who=str(self.roster),
                advice="ask the operator for roster.json",
            ) from problem
        return check_roster(envelope, pinned=pin)

    def load_head(self, roster: Roster) -> Head:
        """Return what the server signed.

        Raises:
            DataError: the file cannot be read or is not a checkpoint.
            VerificationError: the server's signature does not hold, or it is another ledger's.
        """
        raw = _read(self.checkpoint, MAX_CHECKPOINT, "--checkpoint")
        return verify_checkpoint(raw, roster.federation, bytes.fromhex(roster.server))

    def lines(self) -> Iterator[bytes]:
        """Yield the ledger's lines.

        Raises:
            DataError: the file cannot be read, or a line is torn or too long.
        """
        return (entry.raw for entry in read_ledger(self.ledger))


def _read(path: Path, limit: int, option: str) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as problem:
        raise DataError(
            f"cannot be read ({problem.strerror})", who=str(path), advice=f"name the file with {option}"
        ) from problem
    if len(raw) > limit:
        raise DataError(f"is over the limit of {limit} bytes", who=str(path), advice="check the path")
    return raw
