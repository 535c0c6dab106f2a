"""A server that is killed at one of its durable writes, as a power cut at that moment would end it.

``python dying_server.py AT WHEN fedfuse WORDS...`` is the ``fedfuse`` command, ``python dying_server.py AT WHEN
inline RUN SITES`` a run's server with its sites in the same process. The process kills itself just before or just
after its AT-th write to disk. With sites in the same process, if it comes as far as the second attempt after a round
was opened, it says how many writes it counted and ends as suddenly.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

WHEN = ("before", "after")


def die_at(write, when):
    """Kill this process at a durable write, counted from 1; return the count so far as it goes on."""
    real, counted = os.fsync, []

    def fsync(file):
        counted.append(file)
        if len(counted) == write and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(file)
        if len(counted) == write and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    return counted


def end_after_a_round(counted):
    """Return an observer that ends this process once a round was opened and the next was begun."""
    from fedfuse_server.events import RoundOpened, RoundStarted

    began, opened = [], []

    def watch(event):
        if isinstance(event, RoundStarted):
            if opened:
                sys.stdout.write(f"writes {len(counted)}\n")
                sys.stdout.flush()
                os._exit(0)
            began.append(event)
        # One that a server before has opened is told again, before anything is begun.
        if isinstance(event, RoundOpened) and began:
            opened.append(event)

    return watch


def play(run, sites, counted):
    """Run the server's rounds with sites that live in this process."""
    from flwr.app import Context, RecordDict

    from fedfuse_client.app import app as client_app
    from fedfuse_server.app import app as server_app
    from fedfuse_server.events import observing
    from fedfuse_simulations.engines.inline import InlineGrid

    nodes = {node: {"home": folder} for node, folder in zip(itertools.count(2), sites)}
    with observing(end_after_a_round(counted)):
        server_app(InlineGrid(client_app, nodes), Context(1, 1, {}, RecordDict(), {"home": run}))


def main():
    """Be one of the two."""
    write, when, what, *words = sys.argv[1:]
    counted = die_at(int(write), when)
    if what == "inline":
        run, sites = words
        play(run, json.loads(sites), counted)
        return
    from fedfuse_shared.cli import main as command

    sys.argv = [what, *words]
    command()


if __name__ == "__main__":
    main()
