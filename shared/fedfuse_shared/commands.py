"""What people order a federation to do, and the server's word that it refused; both stand on the ledger.

A command is the signed envelope of its body, under a key to which the roster gives the role that the action needs.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Any, ClassVar, Final

from fedfuse_shared import limits
from fedfuse_shared.config.base import COORDINATOR, Hex32, Label, ShortText, SiteName
from fedfuse_shared.envelope import Body, Envelope, encode, verify
from fedfuse_shared.errors import ProtocolError, VerificationError
from fedfuse_shared.roster import Roster


class Action(StrEnum):
    """What can be ordered."""

    RUN = "run"
    REVOKE = "revoke"


class Command(Body):
    """An order to a federation's server."""

    kind: ClassVar[str] = "command"

    federation: Label
    roster_hash: Hex32
    action: Action
    plan_hash: Hex32 | None
    """``run``: the plan that offers have to follow from here on (``fedfuse_shared.offer.plan_hash``)."""
    site: SiteName | None
    """``revoke``: the site that takes part in nothing any more."""
    reason: ShortText
    nonce: Hex32
    """Random, so that no command can be given a second time by showing it again."""


class CommandRefusal(Body):
    """The server's word that it did not do what it was told, and why."""

    kind: ClassVar[str] = "command-refusal"

    command: Hex32
    """Hash of the command as it came (:func:`command_hash`)."""
    author: ShortText
    """Who it claimed to come from."""
    action: ShortText
    reason: ShortText


MAX_COMMAND: Final = 4096
"""Longest command (bytes)."""


def command_hash(raw: bytes) -> str:
    """Return the hash by which a refusal names a command, whatever its bytes (SHA-256, hexadecimal)."""
    return hashlib.sha256(limits.LABEL_COMMAND + raw).hexdigest()


def check_command(envelope: Envelope[Command], roster: Roster) -> None:
    """Check that a command is for this federation, whole, and signed under a key whose role allows it.

    Raises:
        ProtocolError: it names another federation or roster, or lacks what its action needs.
        VerificationError: its author has not the role, or did not sign it.
    """
    body, author = envelope.body, envelope.author
    if body.federation != roster.federation or body.roster_hash != roster.hash():
        raise ProtocolError("gives a command for another federation or roster", who=author)
    if (body.action is Action.RUN) != (body.plan_hash is not None):
        raise ProtocolError("gives a command whose plan and action do not fit", who=author)
    if (body.action is Action.REVOKE) != (body.site is not None):
        raise ProtocolError("gives a command whose site and action do not fit", who=author)
    if body.site is not None and body.site not in roster.sites:
        raise ProtocolError(f"revokes {body.site}, which is not enrolled", who=author)
    if not author.startswith(COORDINATOR):
        raise VerificationError(
            f"has not the role that {body.action.value} needs",
            who=author,
            advice="sign it with the key of a coordinator in the roster",
        )
    verify(envelope, roster.key_of(author))


def hash_of(envelope: Envelope[Any]) -> str:
    """Return a command's hash (:func:`command_hash`)."""
    return command_hash(encode(envelope))
