"""Answers a site's messages with the code that is installed here, whatever bundle they came with.

Under Flower's process isolation whoever takes a task decides what is run for it. Flower's own executor unpacks the
bundle and runs it: any Python, chosen by whoever submitted the run. This one

1. takes only messages to a ClientApp, with the SuperNode's secret;
2. hashes the bundle's bytes and answers only under a bundle that the site's policy lists; none is ever unpacked,
   imported or written to disk;
3. answers with :meth:`fedfuse_client.round.Site.answer`, for the folder it was started with: run settings, node
   settings and the run's context are not even looked at;
4. does nothing for a message whose time has passed: nobody waits, and training would spend privacy for nothing;
5. says why in the reply, in words made of public values alone, whatever went wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

import httpx
from flwr.app import Error, RecordDict
from flwr.common.constant import ErrorCode

from fedfuse_client.answers import Answers
from fedfuse_client.journal import Event, Journal
from fedfuse_client.tasks import Task, Tasks
from fedfuse_shared.config.base import SERVER
from fedfuse_shared.errors import FedfuseError, PolicyError, ProtocolError
from fedfuse_shared.messages import Step
from fedfuse_shared.parcel import pack, unpack

_TIDY_EVERY: Final = 60.0
"""How often attempts past their deadline are looked for when no message comes (seconds)."""
_GENERIC: Final = "cannot answer; the reason is in the site's own log"


class _InHand(NamedTuple):
    task: Task
    step: str
    began: float
    problem: str


class Executor:
    """Takes one message at a time from a SuperNode and answers it.

    Args:
        answers: The site.
        journal: Where is said what was done.
        clock: Seconds since 1970.
    """

    def __init__(self, answers: Answers, journal: Journal, clock: Callable[[], float] = time.time) -> None:
        self._answers = answers
        self._journal = journal
        self._clock = clock
        self._tasks: Tasks | None = None
        self._coming: Task | None = None
        self._in_hand: _InHand | None = None
        self._tidied = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Return whether every reply has been sent on."""
        return self._in_hand is None

    def attend(self, tasks: Tasks | None) -> None:
        """Take tasks from this SuperNode from now on; one whose reply was not sent on is lost with its SuperNode."""
        self._drop()
        if self._tasks is not None:
            self._tasks.close()
        self._tasks = tasks

    def turn(self, *, accept: bool = True) -> bool:
        """Do what there is to do, at most one message, and return whether there was anything.

        Args:
            accept: Whether a new message may be taken.
        """
        if self._in_hand is not None:
            return self._see_off(self._in_hand)
        if accept and self._coming is None and self._tasks is not None:
            self._coming = self._acquire(self._tasks)
        if accept and (task := self._arrived()) is not None:
            self._serve(task)
            return True
        self._tidy()
        return False

    def close(self) -> None:
        """Let go of the SuperNode and the site."""
        self.attend(None)
        self._answers.close()

    # --- one message ----------------------------------------------------------------------------------------
    def _acquire(self, tasks: Tasks) -> Task | None:
        try:
            return tasks.acquire()
        except httpx.TransportError:
            return None  # not up yet, or gone: its supervisor knows
        except Exception as problem:  # noqa: BLE001 - what the server made of the task must not end the site
            self._journal.say(Event.FAILED, f"a task could not be taken ({type(problem).__name__})")
            return None

    def _has_come(self, task: Task) -> bool:
        try:
            return task.is_received()
        except Exception as problem:  # noqa: BLE001 - as above
            self._journal.say(Event.FAILED, f"a message was not received ({type(problem).__name__})")
            self._drop()
            return False

    def _arrived(self) -> Task | None:
        """Return the message that is coming, once all of it is there.

        A SuperNode fetches one at a time. If there is another before this one is whole, it gave this one up, as it
        does without a word where the server was killed meanwhile.
        """
        coming = self._coming
        if coming is None or self._tasks is None:
            return None
        if not self._has_come(coming):
            newer = self._acquire(self._tasks)
            if newer is None:
                return None
            coming.drop()
            self._coming = coming = newer
            self._journal.say(Event.FAILED, "a message was never sent to its end; the next one is answered")
            if not self._has_come(coming):
                return None
        self._coming = None
        return coming

    def _serve(self, task: Task) -> None:
        began = time.monotonic()
        step = _shown(task.message.metadata.message_type)
        answer, problem = self._answer(task)
        try:
            task.reply(answer)
        except Exception as error:  # noqa: BLE001 - as above
            task.drop()
            self._journal.say(Event.FAILED, f"a reply could not be sent ({type(error).__name__})", step=step)
            return
        self._in_hand = _InHand(task, step, began, problem)
        took = time.monotonic() - began
        if isinstance(answer, Error):
            self._journal.say(Event.REFUSED, answer.reason or "", step=step, seconds=took)
        else:
            self._journal.say(Event.ANSWERED, problem, step=step, seconds=took)

    def _answer(self, task: Task) -> tuple[RecordDict | Error, str]:
        """Return the reply and, if it tells of a problem, which; never raises."""
        try:
            step = self._check(task)
            parcel = self._answers.answer(step, unpack(task.content(), who=SERVER))
            return pack(parcel), parcel.problem
        except PolicyError as problem:
            return Error(ErrorCode.INVALID_FAB, str(problem)), ""
        except ProtocolError as problem:
            return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(problem)), ""
        except FedfuseError as problem:  # of this site's files: for its operator alone
            self._journal.say(Event.FAILED, str(problem))
        except Exception:  # noqa: BLE001 - of whatever kind, it goes to the site's log and nowhere else
            self._journal.trace("a message could not be answered")
        return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _GENERIC), ""

    def _check(self, task: Task) -> Step:
        """Return what is asked for.

        Raises:
            PolicyError: under a bundle the policy does not list.
            ProtocolError: it is no step of the protocol, or came too late.
        """
        allowed = self._answers.policy().bundles
        if task.bundle not in allowed:
            raise PolicyError(
                f"bundle {task.bundle} is not one this site answers under; nothing was run",
                advice="the site's operator lists those it trusts in `bundles` of policy.toml"
                if allowed
                else "the site's policy.toml lists no `bundles`",
            )
        asked = task.message.metadata
        late = self._clock() - (asked.created_at + asked.ttl)
        if not late <= 0:  # "not a number" is late
            raise ProtocolError(
                f"sent a message whose time was over {late:.0f} s ago; nothing was done",
                who=SERVER,
                advice="if the server still waited, one of the two clocks is wrong",
            )
        try:
            return Step(asked.message_type)
        except ValueError:
            raise ProtocolError(
                f"asks for {_shown(asked.message_type)}, which no site does", who=SERVER
            ) from None

    def _see_off(self, in_hand: _InHand) -> bool:
        """End a task once its reply is on its way; before, the SuperNode takes no other message anyway."""
        try:
            if not in_hand.task.is_sent():
                return False
            in_hand.task.finish()
        except Exception as error:  # noqa: BLE001 - the SuperNode is gone, or counts the task as ended
            self._journal.say(
                Event.FAILED,
                f"whether a reply was sent is not known ({type(error).__name__})",
                step=in_hand.step,
            )
        self._drop()
        try:
            self._answers.foresee()
        except Exception:  # noqa: BLE001 - it only saves time: whatever is wrong shows when a message needs it
            self._journal.trace("the next round could not be accounted ahead")
        return True

    def _drop(self) -> None:
        if self._coming is not None:
            self._coming.drop()
            self._coming = None
        if self._in_hand is not None:
            self._in_hand.task.drop()
            self._in_hand = None

    def _tidy(self) -> None:
        if time.monotonic() - self._tidied < _TIDY_EVERY:
            return
        self._tidied = time.monotonic()
        try:
            self._answers.tidy()
        except FedfuseError as problem:
            self._journal.say(Event.FAILED, str(problem))


def _shown(text: str) -> str:
    """Return a peer's words so that they cannot steer a reader's terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:40])
