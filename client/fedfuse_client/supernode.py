"""Flower's SuperNode as Flower wrote it, but for six things: run as ``python -m fedfuse_client.supernode``.

1. It goes nowhere but to its server: Flower follows a redirect to any address, also one in the site's own network.
2. What it logs is short and printable: names and types of messages are whatever the server writes, of any length.
3. How long it sleeps.
4. It ends when it gives up, so that its supervisor starts it again.
5. It says twice as often that it is there. Of a site that was killed the server knows after half a minute, not a
   whole one; until then it asks it, waits for it, and lets nobody in with the same key: not even that site again.
6. It sends no reply but that to the message it fetched last. If a run ends while a message of it is fetched, Flower
   forgets the message but not its task: the reply to it would be sent in place of the next one's, and so on for good,
   each reply one message too late.

It looks for a message every three seconds, whatever happened before, and for the reply in hand every half second.
That was 3.5 of the 3.7 seconds of every exchange. Here it looks again soon after something happened and ever more
rarely after that, so that an exchange waits for about as long again as it would have taken, and an idle site asks as
seldom as Flower's own. Nothing else is changed, and the version of Flower is pinned (ADR 18).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

SOONEST: Final = 0.1
"""First pause after a message or a reply, doubled with every look that finds nothing (seconds)."""
REPLY: Final = 0.05
"""Longest pause between two looks for the reply in hand, which is made on this machine (seconds)."""
BEAT: Final = 15
"""Of two of these without a word the server takes it for gone (seconds); Flower's own is 30."""
_IDLE: Final = 1.0
"""Flower's pauses of this and more are for messages, shorter ones for replies (seconds)."""
_MAX_LINE: Final = 500
"""Longest message of the log (characters)."""


class Pace:
    """Stands in for the module ``time`` where Flower's loop sleeps.

    Args:
        sleep: Sleeps for some seconds.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._next = _IDLE

    def sleep(self, seconds: float) -> None:
        """Sleep for at most as long as was asked for."""
        if seconds < _IDLE:
            self._next = SOONEST
            self._sleep(min(seconds, REPLY))
        else:
            self._sleep(min(seconds, self._next))
            self._next = min(2 * self._next, seconds)


def go_nowhere_else() -> None:
    """Have Flower's clients take a redirect for the failure that it is."""
    from flwr.supercore.protobuf.client import ProtobufClient  # noqa: PLC0415 - only this process needs it

    made = ProtobufClient.__init__

    def make(self: ProtobufClient, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        self._client.follow_redirects = False

    ProtobufClient.__init__ = make  # type: ignore[method-assign]


class Fitting:
    """A SuperNode's state with no replies in it but those to one message; all others are removed as they are found.

    Args:
        state: The state.
        store: Where the objects of messages are.
        asked: Identifier of that message.
    """

    def __init__(self, state: Any, store: Any, asked: str) -> None:
        self._state = state
        self._store = store
        self._asked = asked

    def get_messages_legacy(self, **filters: Any) -> list[Any]:
        """Return what the state does, without replies that nobody waits for."""
        fitting = []
        for message in self._state.get_messages_legacy(**filters):
            if message.metadata.reply_to_message_id == self._asked:
                fitting.append(message)
                continue
            self._state.delete_messages(
                message_ids=[message.metadata.message_id, message.metadata.reply_to_message_id]
            )
            self._store.delete(message.metadata.message_id)
        return fitting

    def __getattr__(self, name: str) -> Any:
        """Be the state in all else."""
        return getattr(self._state, name)


def send_only_what_was_asked(loop: Any) -> None:
    """Have Flower's loop, a module, send only the reply to the message that it fetched last."""
    fetch, send = loop._pull_and_store_message, loop._push_messages  # noqa: SLF001 - Flower's two halves of a turn
    asked = ""

    def fetch_and_note(*, receive: Callable[[], Any], **more: Any) -> Any:
        def noted() -> Any:
            nonlocal asked
            received = receive()
            if received is not None:
                asked = received[0].metadata.message_id
            return received

        return fetch(receive=noted, **more)

    def send_fitting(*, state: Any, object_store: Any, **more: Any) -> None:
        send(state=Fitting(state, object_store, asked), object_store=object_store, **more)

    vars(loop).update(_pull_and_store_message=fetch_and_note, _push_messages=send_fitting)


def shorten(record: logging.LogRecord) -> bool:
    """Cut what is logged, and take out what could steer a reader's terminal."""
    text = record.getMessage()[:_MAX_LINE]
    record.msg, record.args = "".join(char if char.isprintable() else "?" for char in text), ()
    return True


def main() -> None:
    """Run Flower's SuperNode, within these bounds and at our pace, and end when it gives up."""
    from flwr.supercore import heartbeat  # noqa: PLC0415 - seconds, and only this process needs it
    from flwr.supernode import fleet_http_connection, start_client_internal  # noqa: PLC0415
    from flwr.supernode.cli.flower_supernode import flower_supernode  # noqa: PLC0415

    go_nowhere_else()
    logging.getLogger("flwr").addFilter(shorten)
    vars(start_client_internal)["time"] = Pace()
    send_only_what_was_asked(start_client_internal)
    for module in (heartbeat, fleet_http_connection):
        vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = BEAT
    threading.excepthook = _thread_failed
    try:
        flower_supernode()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 1)
    except Exception as problem:  # noqa: BLE001 - whatever it gave up over, its supervisor starts it again
        _give_up(problem)
    _leave(1)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """End with a thread of it: without the one that sends heartbeats nothing would be asked of this site any more."""
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _give_up(args.exc_value)


def _give_up(problem: BaseException) -> NoReturn:
    logging.getLogger("flwr").error("gave up: %s: %s", type(problem).__name__, problem)
    _leave(1)


def _leave(code: int) -> NoReturn:
    """End whatever still runs here: the thread of Flower's Runtime API kept a process alive that served nobody."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
