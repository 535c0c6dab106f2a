"""Who is there: which of Flower's nodes is which enrolled site, asked anew whenever nodes come or go."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.serverapp import Grid

from fedfuse_server.books import Books
from fedfuse_server.events import SiteLeftOut, SitesAwaited, tell
from fedfuse_server.exchange import Exchange
from fedfuse_shared.config.base import SERVER
from fedfuse_shared.envelope import decode, encode, seal, verify
from fedfuse_shared.errors import ProtocolError, RoundAborted, VerificationError
from fedfuse_shared.messages import Hello, Introduction, Step
from fedfuse_shared.parcel import Parcel
from fedfuse_shared.roster import Roster

log = logging.getLogger(__name__)

MAX_PAGES: Final = 100
"""Most pages of leaves collected from a site at once: a hostile one could write on for ever; the rest comes later."""

GREETING: Final = 30.0
"""Longest wait for a node to say which site it is: one that hangs must not hold up every attempt (seconds)."""

AGAIN: Final = 30.0
"""Time after which a node that did not introduce itself is asked again (seconds)."""

MAX_LOSSES: Final = 10
"""Times in a row that the SuperLink may be lost while sites are awaited."""

PAUSE: Final = 0.5
"""Between two looks for sites that are awaited (seconds)."""


class Attendance:
    """The sites of a run that can be asked, and Flower's node of each.

    Args:
        grid: Flower's Grid.
        exchange: How nodes are asked.
        roster: Who is enrolled.
        books: The ledger, which knows who is out.
        key: The server's signing key.
        run: The run's name.

    Attributes:
        nodes: Node of each site that introduced itself and is still there.
    """

    def __init__(
        self, grid: Grid, exchange: Exchange, roster: Roster, books: Books, key: Ed25519PrivateKey, run: str
    ) -> None:
        self._grid = grid
        self._exchange = exchange
        self._roster = roster
        self._books = books
        self._key = key
        self._run = run
        self.nodes: dict[str, int] = {}
        self._failed: dict[int, float] = {}
        """When each node failed to introduce itself."""

    def gather(self, wait: float | None, least: int, also_out: Callable[[], set[str]]) -> None:
        """Meet all who are there; with a time to wait, until nobody is missing or it has passed.

        It goes on waiting after that while fewer than ``least`` are there and enough are enrolled.

        Args:
            wait: Seconds; None: whoever is there now is all there will be.
            least: Fewest sites a round needs.
            also_out: Sites that are not waited for besides those the ledger says are out.

        Raises:
            RoundAborted: the SuperLink was lost, again and again.
        """
        began, told = time.monotonic(), None
        while True:
            try:
                self.greet()
            except (
                RoundAborted
            ) as problem:  # the SuperLink went away just then; it is up again at the next look
                if wait is None:
                    raise
                log.warning("%s", problem)
            awaited = self._roster.sites.keys() - self._books.out - also_out()
            missing = tuple(sorted(awaited - self.nodes.keys()))
            if not missing or wait is None:
                return
            enough = len(awaited) - len(missing) >= least
            if (enough and time.monotonic() - began >= wait) or len(awaited) < least:
                return
            if missing != told:
                tell(SitesAwaited(missing))
                told = missing
            time.sleep(PAUSE)

    def greet(self) -> None:
        """Drop nodes that are gone, ask new ones which site they are, and collect what those have for the ledger.

        Only a site's own signature over a fresh nonce is believed.

        Raises:
            RoundAborted: the SuperLink cannot be reached.
        """
        present = set(self._grid.get_node_ids())
        self.nodes = {site: node for site, node in self.nodes.items() if node in present}
        now = time.monotonic()
        self._failed = {node: at for node, at in self._failed.items() if node in present and now - at < AGAIN}
        strangers = present - set(self.nodes.values()) - self._failed.keys()
        if not strangers:
            return
        hello = Hello(federation=self._roster.federation, run=self._run, nonce=secrets.token_hex(32))
        asked = dict.fromkeys(strangers, Parcel(body=encode(seal(hello, SERVER, self._key))))
        met = []
        exchange = replace(self._exchange, timeout=min(self._exchange.timeout, GREETING))
        for node, answer in exchange.ask(Step.HELLO, asked, "hello").items():
            try:
                met.append(self._meet(node, answer, hello))
            except (ProtocolError, VerificationError) as problem:
                self._failed[node] = now
                tell(SiteLeftOut(0, problem.who or f"node {node}", Step.HELLO.value, problem.message))
        self.settle(met)

    def _meet(self, node: int, answer: Parcel | ProtocolError, hello: Hello) -> str:
        if isinstance(answer, ProtocolError):
            raise answer
        if answer.problem:
            raise ProtocolError(answer.problem, who=f"node {node}")
        reply = decode(answer.body, Introduction, who=f"node {node}")
        if reply.author in self.nodes or reply.body.model_dump() != hello.model_dump():
            raise ProtocolError("introduced itself wrongly or twice", who=reply.author)
        if reply.author not in self._roster.sites:
            raise ProtocolError("is no enrolled site", who=reply.author)
        verify(reply, self._roster.key_of(reply.author))
        self.nodes[reply.author] = node
        return reply.author

    def settle(self, sites: list[str] | None = None) -> None:
        """Collect leaves whose reply was lost, page by page, so that no charge is missing in the log.

        Args:
            sites: Which sites; None: all that are there.
        """
        names = {node: site for site, node in self.nodes.items() if sites is None or site in sites}
        for _ in range(MAX_PAGES):
            names = {node: site for node, site in names.items() if site not in self._books.left}
            if not names:
                break
            asked = {node: Parcel(known=self._books.head(site)[0]) for node, site in names.items()}
            try:
                answers = self._exchange.ask(Step.SETTLE, asked, "settle")
            except RoundAborted as problem:
                log.warning("leaves were not collected: %s", problem)
                return
            for node, answer in answers.items():
                site = names[node]
                try:
                    if isinstance(answer, ProtocolError):
                        raise answer
                    if self._books.take(site, answer.leaves):
                        continue  # there may be more
                except (ProtocolError, VerificationError) as problem:
                    tell(SiteLeftOut(0, site, Step.SETTLE.value, problem.message))
                del names[node]
