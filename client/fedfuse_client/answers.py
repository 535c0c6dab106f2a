"""Who answers a site's messages: the site kept open in this process, or a fresh process for each message.

Run as ``python -m fedfuse_client.answers FOLDER STEP``, this module answers one message from standard input.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Final, Protocol

from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Wire

from fedfuse_client.home import SiteHome
from fedfuse_client.policy import SitePolicy
from fedfuse_client.round import Site
from fedfuse_shared.config.base import SERVER
from fedfuse_shared.errors import StateError
from fedfuse_shared.messages import Step
from fedfuse_shared.parcel import Parcel, pack, unpack
from fedfuse_shared.tied import PYTHON, die_with

log = logging.getLogger(__name__)

THREADS: Final = 1
"""Threads torch has at a deployed site: the proof that lets records share a microbatch holds for one."""
_TIDY: Final = "tidy"
"""In place of a step: only erase what is past its deadline."""


class Answers(Protocol):
    """Answers messages of one site, by the code that is installed here."""

    def policy(self) -> SitePolicy:
        """Return the policy that rules now.

        Raises:
            FedfuseError: the file cannot be used.
        """

    def answer(self, step: Step, parcel: Parcel) -> Parcel:
        """Return the answer to one message.

        Raises:
            FedfuseError: the site's folder cannot be used.
        """

    def tidy(self) -> None:
        """Erase the secrets of attempts whose deadline has passed.

        Raises:
            FedfuseError: the site's folder cannot be used.
        """

    def foresee(self) -> None:
        """Do what can be done before the next message, while nobody waits; what it finds changes nothing."""

    def close(self) -> None:
        """Let go of the site's store."""


class Warm:
    """A site that is kept open; it is opened anew when its policy was edited.

    Raises:
        FedfuseError: the site's folder cannot be used.
    """

    def __init__(self, home: SiteHome) -> None:
        self._home = home
        self._written = b""
        self._site: Site | None = None
        self._policy = home.load_policy()
        self._current()

    def policy(self) -> SitePolicy:
        """Return the policy that rules now."""
        self._current()
        return self._policy

    def answer(self, step: Step, parcel: Parcel) -> Parcel:
        """Return the answer to one message."""
        return self._current().answer(step, parcel)

    def tidy(self) -> None:
        """Erase the secrets of attempts whose deadline has passed."""
        self._current().erase_expired()

    def foresee(self) -> None:
        """Account for one more round like the last."""
        self._current().foresee()

    def close(self) -> None:
        """Let go of the site's store."""
        if self._site is not None:
            self._site.close()
            self._site = None

    def _current(self) -> Site:
        """Return the site under the policy that is in its file now, never under one that was replaced."""
        try:
            written = self._home.policy.read_bytes()
        except OSError:
            written = b""  # loading it says what is wrong
        if self._site is None or written != self._written:
            if self._site is not None:
                log.info("policy.toml was edited: what it says now holds from here on")
            self.close()
            self._policy = self._home.load_policy()
            self._site = Site(self._home, threads=THREADS)
            self._written = written
        return self._site


class Fresh:
    """A new process for each message; only it opens the site's store.

    Args:
        home: The site's folder.
        log_file: What those processes write to standard error.
    """

    def __init__(self, home: SiteHome, log_file: Path) -> None:
        self._home = home
        self._log = log_file
        self._unfinished = True
        self.tidy()  # now, so that a folder that cannot be used is told of before anything is started

    def policy(self) -> SitePolicy:
        """Return the policy that rules now."""
        return self._home.load_policy()

    def answer(self, step: Step, parcel: Parcel) -> Parcel:
        """Return the answer to one message."""
        self._unfinished = True
        return _unpacked(self._ask(step.value, _packed(parcel)), who=SERVER)

    def tidy(self) -> None:
        """Erase the secrets of attempts whose deadline has passed, if any may be left."""
        if self._unfinished:
            self._unfinished = self._ask(_TIDY, b"") == b"1"

    def foresee(self) -> None:
        """Do nothing: what a process learns is gone with it."""

    def close(self) -> None:
        """Nothing is open here."""

    def _ask(self, what: str, given: bytes) -> bytes:
        command = [
            *PYTHON,
            "-m",
            "fedfuse_client.answers",
            str(os.getpid()),
            str(self._home.root),
            what,
        ]
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            # Its own session: an interrupt from the terminal is for us, who end after the message in hand.
            done = subprocess.run(  # noqa: S603 - our own module, no shell
                command,
                input=given,
                stdout=subprocess.PIPE,
                stderr=descriptor,
                start_new_session=True,
                check=False,
            )
        finally:
            os.close(descriptor)
        if done.returncode:
            raise StateError(
                f"the process that answers {what} failed ({done.returncode})",
                who=str(self._home.root),
                advice=f"see the end of {self._log}",
            )
        return done.stdout


def _packed(parcel: Parcel) -> bytes:
    raw: bytes = recorddict_to_proto(pack(parcel)).SerializeToString()
    return raw


def _unpacked(raw: bytes, *, who: str) -> Parcel:
    return unpack(recorddict_from_proto(Wire.FromString(raw)), who=who)


def main() -> None:
    """Answer one message: its parcel on standard input, the answer's on standard output."""
    parent, folder, what = sys.argv[1:]
    die_with(int(parent))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    answer_file = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that a library prints gets into the answer
    site = Site(SiteHome(Path(folder)), threads=THREADS)
    try:
        if what == _TIDY:
            answer = b"1" if site.erase_expired() else b"0"
        else:
            parcel = _unpacked(sys.stdin.buffer.read(), who=SERVER)
            answer = _packed(site.answer(Step(what), parcel))
    finally:
        site.close()
    with os.fdopen(answer_file, "wb") as file:
        file.write(answer)


if __name__ == "__main__":
    main()
