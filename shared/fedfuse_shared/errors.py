"""The one tree of errors: what happened, to whom, and what to do about it."""

from __future__ import annotations


class FedfuseError(Exception):
    """Base of every error fedfuse raises on purpose.

    Args:
        message: What happened, in one sentence without a final full stop.
        who: The site, file or peer concerned, if there is one.
        advice: What the reader can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, who: str | None = None, advice: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.who = who
        self.advice = advice

    def __str__(self) -> str:
        """Return the whole sentence an operator reads: ``who: message; advice``."""
        text = f"{self.who}: {self.message}" if self.who else self.message
        return f"{text}; {self.advice}" if self.advice else text


class ConfigError(FedfuseError):
    """A setting is wrong, missing, or contradicts another; nothing was started."""

    exit_code = 2


class DataError(FedfuseError):
    """A data folder or one of its files cannot be used."""

    exit_code = 2


class ProtocolError(FedfuseError):
    """A peer sent something the protocol forbids; no state was changed by it."""


class PolicyError(FedfuseError):
    """An offer lies outside what the site's own policy allows; no data was read."""


class BudgetError(FedfuseError):
    """The work would spend more privacy than the cap allows; nothing was trained."""


class VerificationError(FedfuseError):
    """Something that was signed, hashed or logged does not hold."""


class StateError(FedfuseError):
    """Durable state is missing, corrupted, or was rolled back."""


class RoundAborted(FedfuseError):  # noqa: N818 - an outcome of a round, not a malfunction
    """Too few sites were left for the round to be opened."""


class WrongDealer(RoundAborted):
    """A site's own signatures prove that it dealt shares of something else than it announced; ``who`` names it."""
