"""Taking a site out: a coordinator's command, carried out at once, or by the server that runs."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfuse_server.books import Books
from fedfuse_server.home import RunHome
from fedfuse_server.orders import CommandRefused, Orders, leave_waiting, write_command
from fedfuse_server.standing import holding, runs
from fedfuse_shared.commands import Action, check_command
from fedfuse_shared.errors import ConfigError, ProtocolError, StateError, VerificationError


def revoke_site(home: RunHome, site: str, key: Ed25519PrivateKey, reason: str) -> bool:
    """Revoke a site; return whether it is done, and not left to the server that runs.

    Raises:
        ConfigError: no such site is enrolled.
        CommandRefused: the key's owner may not revoke; the refusal is or will be on the ledger.
        StateError: a file of the run cannot be used.
    """
    enrolment = home.load_roster()
    roster = enrolment.body
    if site not in roster.sites:
        raise ConfigError(
            f"{site} is not enrolled",
            who=roster.federation,
            advice=f"enrolled are {', '.join(sorted(roster.sites))}",
        )
    command = write_command(roster, key, Action.REVOKE, site=site, reason=reason)
    leave_waiting(home.commands, command)
    done = False
    if not runs(home):
        done = _carry_out(home)
    try:
        check_command(command, roster)
    except (ProtocolError, VerificationError) as problem:
        raise CommandRefused(problem.message, who=problem.who, advice=problem.advice) from problem
    return done


def _carry_out(home: RunHome) -> bool:
    """Carry out what waits; return False where a server took the folder meanwhile: then it does."""
    enrolment = home.load_roster()
    try:
        with holding(home):
            books = Books(home.ledger, enrolment.body, home.load_key())
            try:
                if books.empty:
                    books.append(enrolment)
                Orders(books, enrolment.body, home.commands).take_waiting()
            finally:
                books.close()
    except StateError:
        if runs(home):
            return False
        raise
    return True
