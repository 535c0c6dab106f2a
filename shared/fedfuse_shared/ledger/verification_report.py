"""What an audit answers: findings, each site's budget, whether the ledger holds; the JSON of ``fedfuse audit``."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fedfuse_shared.config.base import Frozen, Trust
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.offer import Adjacency

MAX_FINDINGS: Final = 1000
"""Most findings a report lists; one more line says how many were left out."""


class Code(StrEnum):
    """Everything an audit can find; published, so a value is never given another meaning."""

    MALFORMED = "malformed"
    UNKNOWN_AUTHOR = "unknown-author"
    WRONG_AUTHOR = "wrong-author"
    BAD_SIGNATURE = "bad-signature"
    CUT_OFF = "cut-off"
    BEYOND_CHECKPOINT = "beyond-checkpoint"
    ROOT_MISMATCH = "root-mismatch"
    ENROLMENT = "enrolment"
    DUPLICATE_SEQ = "duplicate-seq"
    CHAIN_GAP = "chain-gap"
    CHAIN_BROKEN = "chain-broken"
    OFFER_ROSTER = "offer-roster"
    OFFER_PARTICIPANTS = "offer-participants"
    OFFER_BOUNDS = "offer-bounds"
    OFFER_NOISE = "offer-noise"
    OFFER_ORDER = "offer-order"
    DUPLICATE_OFFER = "duplicate-offer"
    MODEL_CHAIN = "model-chain"
    NO_OFFER = "no-offer"
    NOT_PARTICIPANT = "not-participant"
    PARAMETERS = "parameters"
    NO_POLICY = "no-policy"
    OUTSIDE_POLICY = "outside-policy"
    ELSEWHERE_SHRANK = "elsewhere-shrank"
    DUPLICATE_RESERVATION = "duplicate-reservation"
    NO_RESERVATION = "no-reservation"
    STEPS = "steps"
    DUPLICATE_RECEIPT = "duplicate-receipt"
    DUPLICATE_CLOSE = "duplicate-close"
    CLOSE_MALFORMED = "close-malformed"
    SURVIVORS = "survivors"
    NO_RECEIPT = "no-receipt"
    VECTOR = "vector"
    AGREEMENTS = "agreements"
    OVER_CAP = "over-cap"
    SCHEDULE = "schedule"
    BAD_COMMAND = "bad-command"
    DUPLICATE_COMMAND = "duplicate-command"
    NOT_COMMANDED = "not-commanded"
    OFFERED_OUT = "offered-out"
    AFTER_LEAVE = "after-leave"
    LEFT_OUT = "left-out"


_LOG: Final = (
    "ask the server for its ledger again and compare with another site's copy; keep both if they differ"
)
_SERVER: Final = "stop taking part until the coordinator explains it: the server signed it"
_SITE: Final = "stop the site, and look for a second copy of it or a restored disk"
_FORGED: Final = "do not trust the server's log: it holds what the author did not sign"

ADVICE: Final[dict[Code, str]] = {
    Code.MALFORMED: _LOG,
    Code.UNKNOWN_AUTHOR: "check that this roster belongs to this ledger",
    Code.WRONG_AUTHOR: _FORGED,
    Code.BAD_SIGNATURE: _FORGED,
    Code.CUT_OFF: "get the whole ledger; if the server has no more, it withdrew what it had signed",
    Code.BEYOND_CHECKPOINT: "get the newest checkpoint: leaves after it are not committed to",
    Code.ROOT_MISMATCH: _LOG,
    Code.ENROLMENT: "compare the roster with the one the operator published",
    Code.DUPLICATE_SEQ: _SITE,
    Code.CHAIN_GAP: "get the missing leaves from the site's own store: the server kept them back",
    Code.CHAIN_BROKEN: _SITE,
    Code.OFFER_ROSTER: _SERVER,
    Code.OFFER_PARTICIPANTS: _SERVER,
    Code.OFFER_BOUNDS: "count this round as open to the server: its bounds do not protect single updates",
    Code.OFFER_NOISE: "count the epsilon if all others collude: the shared noise does not add up",
    Code.OFFER_ORDER: _SERVER,
    Code.DUPLICATE_OFFER: _SERVER,
    Code.MODEL_CHAIN: "ask which model the round started from: it is not the one last opened",
    Code.NO_OFFER: "ask the server for the offer: it kept one off the ledger",
    Code.NOT_PARTICIPANT: "look at the site's log: it worked for an offer that was not made to it",
    Code.PARAMETERS: "ask the site's operator: it charged something else than it was asked for",
    Code.NO_POLICY: "ask the site to publish its policy before it takes part",
    Code.OUTSIDE_POLICY: "ask the site's operator: it went beyond its own published policy",
    Code.ELSEWHERE_SHRANK: "ask the site's operator: what was spent cannot become less",
    Code.DUPLICATE_RESERVATION: _SITE,
    Code.NO_RESERVATION: "ask the site's operator: it trained without charging for it first",
    Code.STEPS: "ask the site's operator: it trained longer than it charged for",
    Code.DUPLICATE_RECEIPT: "count the site's update of that attempt as exposed, and look for a second copy of it",
    Code.DUPLICATE_CLOSE: _SERVER,
    Code.CLOSE_MALFORMED: _SERVER,
    Code.SURVIVORS: "count this round as open to the server: it summed over fewer or other sites than agreed",
    Code.NO_RECEIPT: "ask that site whether it took part: the server names it without its receipt",
    Code.VECTOR: "do not use the model: the server summed something else than the site sent",
    Code.AGREEMENTS: "count this round as open to the server: too few sites agreed to open it",
    Code.OVER_CAP: "stop training on this data set; the spent privacy cannot be taken back",
    Code.SCHEDULE: "ask the site's operator: the tighter bound of a fixed schedule no longer holds",
    Code.BAD_COMMAND: "do not trust the server's log: it should have refused this command",
    Code.DUPLICATE_COMMAND: "ask the coordinator: an old command was given again",
    Code.NOT_COMMANDED: "stop taking part: the server ran a plan that no coordinator ordered",
    Code.OFFERED_OUT: "ask the coordinator why a site that is out was asked; do not use what it sent since",
    Code.AFTER_LEAVE: "stop the site: it works on after it left, or a copy of it does",
    Code.LEFT_OUT: "repair the first ones and audit again",
}
"""What a reader can do about each finding."""


class Finding(Frozen):
    """One thing that does not hold."""

    code: Code
    leaf: int | None
    """Index of the leaf, from 0; None where it concerns the ledger as a whole."""
    site: str | None
    """The site it concerns; None for the server."""
    detail: str


class SiteReport(Frozen):
    """What one site spent on one data set, by this ledger."""

    site: str
    dataset: str | None
    """Random identifier; None for a site that never reserved anything."""
    trust: Trust | None
    """``aggregate`` as soon as any round relied on other sites' noise."""
    colluders: int | None
    """Colluding sites, besides the server, that ``epsilon`` withstands; None: any number of them."""
    epsilon: float | None
    """Spent, by the bound the cap is compared with: of the privacy loss distribution while the schedule is fixed, of
    Renyi accounting from the first charge under a free one on; None: unbounded."""
    schedule: Schedule | None
    """What the site's latest policy says of its mechanisms; None without a policy."""
    epsilon_rdp: float | None
    """The same by Renyi accounting, never below."""
    epsilon_all_collude: float | None
    """Spent if everybody else colludes with the server: the site's own noise alone; None: unbounded."""
    delta: float | None
    cap: float | None
    """Epsilon cap of the site's latest policy."""
    adjacency: Adjacency
    rounds: int
    """Opened rounds with this site's update in them."""
    reservations: int
    """Attempts it was charged for."""
    unmatched: int
    """Reservations without a receipt: charged all the same."""
    mechanisms: int
    """Different pairs of sampling rate and noise multiplier among the charges."""


class Report(Frozen):
    """The verdict up to one head of the ledger."""

    ok: bool
    leaves: int
    root: str
    """Root over all leaves that were read (hexadecimal)."""
    sites: tuple[SiteReport, ...]
    findings: tuple[Finding, ...]


class Findings:
    """Findings as they come up, bounded: a hostile ledger must not fill the memory."""

    def __init__(self) -> None:
        self._kept: list[Finding] = []
        self._left_out = 0

    def add(self, code: Code, leaf: int | None, site: str | None, detail: str) -> None:
        """Note that something does not hold."""
        if len(self._kept) < MAX_FINDINGS:
            self._kept.append(Finding(code=code, leaf=leaf, site=site, detail=detail))
        else:
            self._left_out += 1

    def all(self) -> tuple[Finding, ...]:
        """Return them in the ledger's order, those about the whole ledger first."""
        found = sorted(self._kept, key=lambda finding: -1 if finding.leaf is None else finding.leaf)
        if self._left_out:
            detail = f"{self._left_out} further findings are not listed"
            found.append(Finding(code=Code.LEFT_OUT, leaf=None, site=None, detail=detail))
        return tuple(found)
