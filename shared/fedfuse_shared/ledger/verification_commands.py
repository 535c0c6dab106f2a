"""Who ordered what: offers need a coordinator's command, and sites that are out are offered nothing.

1. A command is one that ``check_command`` passes, and no command is there twice, by its hash or its author's nonce.
2. Where the roster names coordinators, an offer follows the plan of the last command to run.
3. No offer names a site that was revoked or that left before it.
4. A site that left writes nothing more: its ``Leave`` is the last leaf of its chain. What it was charged for before
   comes before it, by the chain's own numbers.
5. The server refuses a command once.

It cannot show a revocation or a refusal that the server keeps off the ledger: whoever gave the command has it. A
ledger of a roster without coordinators has no commands, and nothing here changes what is found in it.
"""

from __future__ import annotations

from fedfuse_shared.commands import Action, Command, CommandRefusal, check_command, hash_of
from fedfuse_shared.envelope import Envelope
from fedfuse_shared.errors import ProtocolError, VerificationError
from fedfuse_shared.ledger.records import Leave, SiteLeaf
from fedfuse_shared.ledger.verification_report import Code, Findings
from fedfuse_shared.offer import Offer
from fedfuse_shared.roster import Roster


class Commands:
    """What was ordered so far on a ledger, followed leaf by leaf."""

    def __init__(self, roster: Roster, findings: Findings) -> None:
        self._roster = roster
        self._findings = findings
        self._plan: str | None = None
        """The plan that offers have to follow."""
        self._out: dict[str, str] = {}
        """How each site that is out went."""
        self._left: set[str] = set()
        self._given: set[str] = set()
        self._nonces: set[tuple[str, str]] = set()
        self._refused: set[str] = set()

    def command(self, leaf: int, envelope: Envelope[Command]) -> None:
        """Follow a command whose signature holds."""
        body, author, name = envelope.body, envelope.author, hash_of(envelope)
        try:
            check_command(envelope, self._roster)
        except (ProtocolError, VerificationError) as problem:
            self._findings.add(Code.BAD_COMMAND, leaf, None, f"command of {author} {problem.message}")
            return
        if name in self._given or (author, body.nonce) in self._nonces:
            detail = f"command {name[:16]}… of {author} was given before"
            self._findings.add(Code.DUPLICATE_COMMAND, leaf, None, detail)
            return
        self._given.add(name)
        self._nonces.add((author, body.nonce))
        if body.action is Action.RUN:
            self._plan = body.plan_hash
        elif body.site is not None:
            self._out.setdefault(body.site, f"was revoked by {author}")

    def refusal(self, leaf: int, body: CommandRefusal) -> None:
        """Follow the server's refusal of a command."""
        if body.command in self._refused:
            detail = f"refusal of command {body.command[:16]}… is on the ledger twice"
            self._findings.add(Code.DUPLICATE_COMMAND, leaf, None, detail)
        self._refused.add(body.command)

    def site_leaf(self, leaf: int, site: str, body: SiteLeaf) -> None:
        """Follow a leaf of a site."""
        if site in self._left:
            detail = f"writes leaf {body.seq} of its chain after it left"
            self._findings.add(Code.AFTER_LEAVE, leaf, site, detail)
        if isinstance(body, Leave):
            self._left.add(site)
            self._out.setdefault(site, "left")

    def offer(self, leaf: int, offer: Offer) -> None:
        """Follow an offer."""
        name = f"offer {offer.run}/{offer.round}.{offer.attempt}"
        if self._roster.coordinators and offer.plan_hash != self._plan:
            said = f"the last command says {self._plan[:16]}…" if self._plan else "no command was given"
            detail = f"{name} follows plan {offer.plan_hash[:16]}…, {said}"
            self._findings.add(Code.NOT_COMMANDED, leaf, None, detail)
        for site in sorted(set(offer.participants) & self._out.keys()):
            detail = f"{name} names this site, which {self._out[site]}"
            self._findings.add(Code.OFFERED_OUT, leaf, site, detail)
