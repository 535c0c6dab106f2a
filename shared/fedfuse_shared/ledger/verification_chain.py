"""Each site's own chain of leaves: contiguous numbers from 1, each linked to the leaf before, none twice."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse_shared.ledger.records import FIRST_LINK, Policy, SiteLeaf, link_of
from fedfuse_shared.ledger.verification_report import Code, Findings


@dataclass
class Chain:
    """How far one site's chain was followed, and the policy that stands there."""

    site: str
    seq: int = 0
    last: str = FIRST_LINK
    policy: Policy | None = None

    def follow(self, leaf: int, body: SiteLeaf, raw: bytes, findings: Findings) -> None:
        """Check that a leaf continues the chain, and go on from it."""
        if body.seq <= self.seq:
            detail = (
                f"second leaf with sequence number {body.seq}, the chain is at {self.seq}: the site was cloned or "
                "rolled back, or the server logged a leaf twice"
            )
            findings.add(Code.DUPLICATE_SEQ, leaf, self.site, detail)
            return
        if body.seq > self.seq + 1:
            detail = (
                f"leaf has sequence number {body.seq} after {self.seq}: {body.seq - self.seq - 1} are missing"
            )
            findings.add(Code.CHAIN_GAP, leaf, self.site, detail)
        elif body.prev != self.last:
            detail = f"leaf {body.seq} of the chain is not linked to the one before it"
            findings.add(Code.CHAIN_BROKEN, leaf, self.site, detail)
        self.seq, self.last = body.seq, link_of(raw)
        if isinstance(body, Policy):
            self.policy = body
