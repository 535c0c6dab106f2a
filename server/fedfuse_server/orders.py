"""Commands on their way to the ledger: carried out if their author may, refused in the open if not.

A command waits as a file of ``server/commands/`` until the server takes it, before its next attempt. A file is set
aside before its command is written to the ledger and removed after, so that a crash between the two neither loses nor
repeats it. One that is given a second time does nothing, and its refusal stands on the ledger once.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_server.books import Books
from fedfuse_shared.commands import (
    MAX_COMMAND,
    Action,
    Command,
    CommandRefusal,
    check_command,
    command_hash,
)
from fedfuse_shared.config.base import COORDINATOR
from fedfuse_shared.envelope import Envelope, decode, encode, seal
from fedfuse_shared.errors import FedfuseError, ProtocolError, StateError, VerificationError
from fedfuse_shared.files import write_durably
from fedfuse_shared.roster import Roster

log = logging.getLogger(__name__)

MAX_REFUSALS: Final = 1000
"""Most refused commands a ledger keeps: whoever can write into the folder must not fill it."""

_WAITING: Final = ".json"
_TAKEN: Final = ".taken"


class CommandRefused(FedfuseError):  # noqa: N818 - an answer, not a malfunction
    """A command was not carried out; the refusal is on the ledger."""


def write_command(
    roster: Roster,
    key: Ed25519PrivateKey,
    action: Action,
    *,
    plan_hash: str | None = None,
    site: str | None = None,
    reason: str = "",
) -> Envelope[Command]:
    """Return a command signed in the name that the roster gives the key, or as a stranger with a key it lacks."""
    public = key.public_key().public_bytes_raw()
    body = Command(
        federation=roster.federation,
        roster_hash=roster.hash(),
        action=action,
        plan_hash=plan_hash,
        site=site,
        reason=reason,
        nonce=secrets.token_hex(32),
    )
    return seal(body, roster.author_of(public) or COORDINATOR + public.hex()[:16], key)


def leave_waiting(folder: Path, envelope: Envelope[Command]) -> Path:
    """Put a command where the server finds it, and return its file; durable when it returns.

    Raises:
        StateError: the folder cannot be written.
    """
    raw = encode(envelope)
    path = folder / (command_hash(raw) + _WAITING)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_durably(path, raw)
    except OSError as problem:
        raise StateError(f"command cannot be written ({problem.strerror})", who=str(path)) from problem
    return path


class Orders:
    """The server's side: checks commands and writes them, or why not, on the ledger.

    Args:
        books: The ledger.
        roster: Who may order what.
        folder: Where commands wait.
    """

    def __init__(self, books: Books, roster: Roster, folder: Path) -> None:
        self._books = books
        self._roster = roster
        self._folder = folder

    def give(self, raw: bytes) -> Envelope[Command]:
        """Carry out a command: write it on the ledger, whose books then know the plan or the site that is out.

        Raises:
            CommandRefused: its author may not give it, it is malformed, or it was given before.
        """
        author, action = "unknown", "unknown"
        try:
            envelope = decode(raw, Command, who="a command", limit=MAX_COMMAND)
            author, action = envelope.author, envelope.body.action.value
            check_command(envelope, self._roster)
            if command_hash(raw) in self._books.given or (author, envelope.body.nonce) in self._books.nonces:
                raise ProtocolError("gives a command for a second time", who=author)
        except (ProtocolError, VerificationError) as problem:
            self._refuse(raw, author, action, str(problem))
            raise CommandRefused(problem.message, who=problem.who, advice=problem.advice) from problem
        self._books.append(envelope)
        self._books.checkpoint()
        log.info("command %s of %s: %s", action, author, envelope.body.site or envelope.body.plan_hash)
        return envelope

    def take_waiting(self) -> list[CommandRefused]:
        """Carry out every command that waits, and return those that were refused."""
        refused = []
        for path in sorted(self._folder.glob("*" + _TAKEN)) + sorted(self._folder.glob("*" + _WAITING)):
            taken = path.with_suffix(_TAKEN)
            again = path == taken
            path.replace(taken)
            with taken.open("rb") as file:
                raw = file.read(MAX_COMMAND + 1)
            # Set aside by a process that ended just then: what is on the ledger already needs nothing more.
            if not (again and command_hash(raw) in self._books.given | self._books.refused):
                try:
                    self.give(raw)
                except CommandRefused as problem:
                    refused.append(problem)
            taken.unlink()
        return refused

    def _refuse(self, raw: bytes, author: str, action: str, reason: str) -> None:
        name = command_hash(raw)
        log.warning("command %s of %s refused: %s", action, author, reason)
        if name in self._books.refused or len(self._books.refused) >= MAX_REFUSALS:
            return
        self._books.sign(CommandRefusal(command=name, author=author, action=action, reason=reason[:400]))
        self._books.checkpoint()
