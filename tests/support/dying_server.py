"""A server that is killed at one of its durable writes.

``python dying_server.py AT WHEN fedfuse WORDS...`` is the ``fedfuse`` command, ``python dying_server.py AT WHEN
inline RUN SITES`` a run's server with its sites in the same process. The process kills itself at its AT-th write to
disk: just before it, just after it, or just before it with everything lost that was not on disk yet, as a power cut
loses it (that a file was renamed is kept). With sites in the same process, if it comes as far as the second attempt
after a round was opened, it says how many writes it counted and ends as suddenly.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

WHEN = ("before", "after", "power-cut")


class Disk:
    """What of a run's folder is on disk: what lay there before, and what this process synced.

    Logs are left alone, and so are databases, which SQLite syncs by itself: the SuperLink's and those of sites.

    Args:
        root: The folder.
    """

    def __init__(self, root):
        self._root = root
        self._sizes = {_identity(found): found.st_size for _, found in self._files()}

    def sync(self, descriptor, real):
        """Sync a file, and remember how much of it is on disk now."""
        real(descriptor)
        found = os.fstat(descriptor)
        self._sizes[_identity(found)] = found.st_size

    def lose(self):
        """Cut every file back to what is on disk; of one that was never synced that is nothing."""
        for path, found in self._files():
            size = self._sizes.get(_identity(found), 0)
            if found.st_size > size:
                os.truncate(path, size)

    def _files(self):
        for path in self._root.rglob("*"):
            found = path.lstat()
            passed = "logs" in path.parts or path.name.startswith(("superlink.db", "store.db"))
            if stat.S_ISREG(found.st_mode) and not passed:
                yield path, found


def _identity(found):
    return found.st_dev, found.st_ino


def die_at(write, when, root):
    """Kill this process at a durable write, counted from 1; return the count so far as it goes on."""
    real, counted, disk = os.fsync, [], Disk(root)

    def fsync(descriptor):
        counted.append(descriptor)
        now = len(counted) == write
        if now and when == "power-cut":
            disk.lose()
        if now and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        disk.sync(descriptor, real)
        if now:
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
    root = words[0] if what == "inline" else words[2]  # server run HOME
    counted = die_at(int(write), when, Path(root))
    if what == "inline":
        run, sites = words
        play(run, json.loads(sites), counted)
        return
    from fedfuse_shared.cli import main as command

    sys.argv = [what, *words]
    command()


if __name__ == "__main__":
    main()
