"""Flower's SuperNode as Flower wrote it, but for how long it sleeps: run as ``python -m fedfuse_client.supernode``.

It looks for a message every three seconds, whatever happened before, and for the reply in hand every half second.
That was 3.5 of the 3.7 seconds of every exchange. Here it looks again soon after something happened and ever more
rarely after that, so that an exchange waits for about as long again as it would have taken, and an idle site asks as
seldom as Flower's own. Nothing else of it is changed, and the version of Flower is pinned (ADR 18).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Final

SOONEST: Final = 0.1
"""First pause after a message or a reply, doubled with every look that finds nothing (seconds)."""
REPLY: Final = 0.05
"""Longest pause between two looks for the reply in hand, which is made on this machine (seconds)."""
_IDLE: Final = 1.0
"""Flower's pauses of this and more are for messages, shorter ones for replies (seconds)."""


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


def main() -> None:
    """Run Flower's SuperNode at our pace, and end when it gives up."""
    from flwr.supernode import start_client_internal  # noqa: PLC0415 - seconds, and only this process needs it
    from flwr.supernode.cli.flower_supernode import flower_supernode  # noqa: PLC0415

    vars(start_client_internal)["time"] = Pace()
    code = 1
    try:
        flower_supernode()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:  # noqa: BLE001 - whatever it gave up over, its supervisor starts it again
        traceback.print_exc()
    finally:
        # Flower gives up where a TLS handshake is broken off, and the thread of its Runtime API then kept a process
        # alive that nobody could reach any more.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
