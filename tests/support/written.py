"""What stands on a run's ledger, of which the last line may be torn, and in a site's store; read from outside."""

from __future__ import annotations

from fedfuse_client.store import SiteStore
from fedfuse_shared.envelope import decode
from fedfuse_shared.ledger.checkpoint import Head, origin_of, verify_checkpoint
from fedfuse_shared.ledger.log import checkpoint_path, kind_of
from fedfuse_shared.ledger.merkle import Tree
from fedfuse_shared.ledger.records import Close, Outcome, Reservation
from fedfuse_shared.ledger.verification import verify_ledger
from fedfuse_shared.ledger.verification_report import Code


def whole_lines(ledger):
    """Return a ledger's whole lines: its server may be in the middle of the last, or have been killed there."""
    return ledger.read_bytes().split(b"\n")[:-1] if ledger.exists() else []


def leaves_of(lines, kind):
    """Return the envelopes of one kind of leaf."""
    return [decode(raw, kind, who="ledger") for raw in lines if kind_of(raw) == kind.kind]


def charged(lines, site):
    """Return the attempts that a site is charged for."""
    return {leaf.body.context for leaf in leaves_of(lines, Reservation) if leaf.author == site}


def stored(store, federation, site):
    """Return the attempts that a site charged itself for in its own store."""
    with SiteStore.view(store) as opened:
        return charged(opened.chain(federation, site).leaves_after(0), site)


def closes(lines, outcome):
    """Return the closes of attempts that ended so."""
    return [leaf.body for leaf in leaves_of(lines, Close) if leaf.body.outcome is Outcome(outcome)]


def audited(home):
    """Return what an auditor says of a run in progress, nothing of which may be a finding.

    What was written since the last checkpoint has none yet; the ledger must reach the one that is there.
    """
    roster = home.load_roster().body
    signed = checkpoint_path(home.ledger)
    head = (
        verify_checkpoint(signed.read_bytes(), roster.federation, bytes.fromhex(roster.server))
        if signed.exists()
        else Head(origin_of(roster.federation), 0, Tree().root())
    )
    # The checkpoint is read first: meanwhile the ledger only grows.
    report = verify_ledger(iter(whole_lines(home.ledger)), roster, head)
    findings = [one for one in report.findings if one.code is not Code.BEYOND_CHECKPOINT]
    assert not findings, findings
    return report
