"""The auditor's checks, in one pass over a ledger, trusting nobody but the operator who signed the roster.

1. Every leaf is canonical, of a known kind, by an enrolled author who may write that kind, and signed by it; the tree
   over all leaves has the size and root that the server signed.
2. Each site's chain is whole (``verification_chain``).
3. Each attempt is consistent from offer to close (``verification_rounds``).
4. Each site's epsilon stays under its cap at every prefix (``verification_budget``).
5. What was done was ordered by those who may, and sites that are out were asked nothing (``verification_commands``).

It cannot show that noise and sampling were really drawn, that data sets of two sites do not overlap, or that the
model is the sum: those leave no trace in a ledger. Nor that there is no second ledger: every verdict holds "up to
this head". There is no I/O here and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from fedfuse_shared import limits
from fedfuse_shared.commands import Command, CommandRefusal
from fedfuse_shared.config.base import COORDINATOR, OPERATOR, SERVER
from fedfuse_shared.envelope import Envelope, decode, verify
from fedfuse_shared.errors import ProtocolError, VerificationError
from fedfuse_shared.ledger.checkpoint import Head
from fedfuse_shared.ledger.log import kind_of
from fedfuse_shared.ledger.merkle import Tree
from fedfuse_shared.ledger.records import LEAF_TYPES, Close, Policy, Receipt, Refusal, Reservation, SiteLeaf
from fedfuse_shared.ledger.verification_budget import Budget, idle
from fedfuse_shared.ledger.verification_chain import Chain
from fedfuse_shared.ledger.verification_commands import Commands
from fedfuse_shared.ledger.verification_report import Code, Findings, Report
from fedfuse_shared.ledger.verification_rounds import Rounds
from fedfuse_shared.offer import Offer
from fedfuse_shared.roster import Roster

_AUTHORS: Final = {
    Roster.kind: OPERATOR,
    Offer.kind: SERVER,
    Close.kind: SERVER,
    CommandRefusal.kind: SERVER,
}
"""Who writes what; a command is a coordinator's, every other kind a site's."""


MAX_DATASETS: Final = 8
"""Most data sets of one site that are accounted apart."""


def verify_ledger(lines: Iterable[bytes], roster: Roster, head: Head) -> Report:
    """Return everything a ledger shows up to a signed head.

    Memory grows by about a kilobyte an attempt; a line is let go of once it is checked.

    Args:
        lines: The ledger's lines in order, without their newlines.
        roster: The roster, its signature and pin already checked.
        head: What the server signed, its signature already checked.
    """
    auditor = _Auditor(roster)
    tree = Tree()
    root_at_head = tree.root() if head.size == 0 else None
    for index, raw in enumerate(lines):
        tree.append(raw)
        if tree.size == head.size:
            root_at_head = tree.root()
        auditor.read(index, raw)
    auditor.compare(tree, head, root_at_head)
    return auditor.report(tree)


class _Auditor:
    """The state of one pass."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._findings = Findings()
        self._rounds = Rounds(roster, self._findings)
        self._commands = Commands(roster, self._findings)
        self._chains = {site: Chain(site) for site in roster.sites}
        self._budgets: dict[tuple[str, str], Budget] = {}
        self._account: dict[tuple[str, str], Budget] = {}
        """The account of every data set a site named; several may share one."""

    def read(self, index: int, raw: bytes) -> None:
        """Check one leaf; what does not hold by itself has no further effect."""
        envelope = self._open(index, raw)
        if (index == 0) != (envelope is not None and envelope.kind == Roster.kind):
            self._findings.add(Code.ENROLMENT, index, None, "exactly the first leaf has to be the enrolment")
        if envelope is None:
            return
        body = envelope.body
        if isinstance(body, SiteLeaf):
            self._site_leaf(index, envelope.author, body, raw)
        elif isinstance(body, Offer):
            self._rounds.offer(index, body)
            self._commands.offer(index, body)
        elif isinstance(body, Command):
            self._commands.command(index, envelope)
        elif isinstance(body, CommandRefusal):
            self._commands.refusal(index, body)
        elif isinstance(body, Close):
            for site, dataset in self._rounds.close(index, body):
                self._budgets[site, dataset].rounds += 1
        elif isinstance(body, Roster) and body != self._roster:
            detail = (
                f"enrols under roster {body.hash()[:16]}…, the audit was given {self._roster.hash()[:16]}…"
            )
            self._findings.add(Code.ENROLMENT, index, None, detail)

    def _open(self, index: int, raw: bytes) -> Envelope[Any] | None:
        """Return a leaf whose form, author and signature hold."""
        try:
            kind = kind_of(raw)
            envelope: Envelope[Any] = decode(
                raw, LEAF_TYPES[kind], who=f"leaf {index}", limit=limits.MAX_LEDGER_LINE
            )
        except ProtocolError as problem:
            self._findings.add(Code.MALFORMED, index, None, problem.message)
            return None
        except KeyError:
            self._findings.add(Code.MALFORMED, index, None, "is of a kind that this version does not know")
            return None
        author = envelope.author
        site = author if author in self._roster.sites else None
        try:
            key = self._roster.key_of(author)
        except ProtocolError:
            self._findings.add(Code.UNKNOWN_AUTHOR, index, author, "is not in the roster")
            return None
        may = author.startswith(COORDINATOR) if kind == Command.kind else author == _AUTHORS.get(kind, site)
        if not may:
            detail = f"{kind} leaf by {author}, who may not write one"
            self._findings.add(Code.WRONG_AUTHOR, index, site, detail)
            return None
        try:
            verify(envelope, key)
        except VerificationError:
            self._findings.add(Code.BAD_SIGNATURE, index, site, f"signature of a {kind} leaf does not hold")
            return None
        return envelope

    def _budget(self, site: str, body: Reservation) -> Budget:
        """Return the account a reservation is charged to.

        A site names its data sets itself. Beyond ``MAX_DATASETS`` all further ones share the last account: that
        counts too much, never too little, and one site cannot keep an auditor busy for days.
        """
        found = self._account.get((site, body.dataset))
        if found is None:
            mine = [budget for (name, _), budget in self._budgets.items() if name == site]
            if len(mine) < MAX_DATASETS:
                found = self._budgets[site, body.dataset] = Budget(site, body.dataset, body.trust)
            else:
                found = mine[-1]
            self._account[site, body.dataset] = found
        return found

    def _site_leaf(self, index: int, site: str, body: SiteLeaf, raw: bytes) -> None:
        chain = self._chains[site]
        chain.follow(index, body, raw, self._findings)
        self._commands.site_leaf(index, site, body)
        if isinstance(body, Reservation):
            self._rounds.reservation(index, site, body, chain.policy)
            budget = self._budget(site, body)
            budget.reserve(index, body, chain.policy, self._findings)
        elif isinstance(body, Receipt):
            dataset = self._rounds.receipt(index, site, body)
            if dataset is not None:
                self._account[site, dataset].matched += 1
        elif isinstance(body, Refusal):
            self._rounds.refusal(index, site, body)
        elif isinstance(body, Policy) and body.roster_hash != self._roster.hash():
            detail = f"publishes a policy that pins another roster, {body.roster_hash[:16]}…"
            self._findings.add(Code.OUTSIDE_POLICY, index, site, detail)

    def compare(self, tree: Tree, head: Head, root_at_head: bytes | None) -> None:
        """Compare the whole ledger with what the server signed."""
        if tree.size == 0:
            self._findings.add(Code.ENROLMENT, None, None, "the ledger is empty")
        if root_at_head is None:
            detail = f"the ledger has {tree.size} leaves, the server signed {head.size}"
            self._findings.add(Code.CUT_OFF, None, None, detail)
        elif root_at_head != head.root:
            detail = (
                f"root over the first {head.size} leaves is {root_at_head.hex()[:16]}…, the server signed "
            )
            self._findings.add(Code.ROOT_MISMATCH, None, None, detail + f"{head.root.hex()[:16]}…")
        if tree.size > head.size:
            detail = f"{tree.size - head.size} leaves come after the {head.size} that the server signed"
            self._findings.add(Code.BEYOND_CHECKPOINT, head.size, None, detail)

    def report(self, tree: Tree) -> Report:
        """Return the verdict."""
        for budget in self._budgets.values():
            budget.check(self._findings)
        spent = {site for site, _ in self._budgets}
        sites = [budget.report(self._chains[site].policy) for (site, _), budget in self._budgets.items()]
        sites += [idle(site, chain.policy) for site, chain in self._chains.items() if site not in spent]
        findings = self._findings.all()
        return Report(
            ok=not findings,
            leaves=tree.size,
            root=tree.root().hex(),
            sites=tuple(sorted(sites, key=lambda row: (row.site, row.dataset or ""))),
            findings=findings,
        )
