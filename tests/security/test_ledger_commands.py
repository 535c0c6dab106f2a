"""A server that does what nobody ordered, or works with who is out, is found; an honest one is not blamed."""

from __future__ import annotations

import pytest
from support.federation import Federation
from support.ledgers import LedgerBuilder, codes, digest

from fedfuse_shared.config.base import SERVER
from fedfuse_shared.envelope import seal


@pytest.fixture
def book() -> LedgerBuilder:
    return LedgerBuilder(Federation.with_officers(5)).enrol()


def test_commands_revocations_and_leaving_leave_no_findings(book):
    command = book.command()
    book.round()
    book.refuse_command(seal(command.body, "@auditor/eve", book.federation.auditor))
    book.revoke("site04")
    book.round(participants=book.federation.names[:4])
    book.leave("site03")
    book.command()
    book.round(participants=book.federation.names[:3])
    assert book.audit().findings == ()


def test_a_roster_without_coordinators_needs_no_command():
    book = LedgerBuilder().enrol()
    book.round()
    assert book.audit().findings == ()


def test_a_command_under_a_roster_without_coordinators_is_by_nobody():
    book = LedgerBuilder().enrol()
    book.command(key=book.federation.server)
    assert codes(book.audit()) == {"unknown-author"}


def test_an_offer_before_any_command_is_found(book):
    book.round()
    book.command()
    assert codes(book.audit()) == {"not-commanded"}


def test_an_offer_under_another_plan_than_the_last_ordered_is_found(book):
    book.command()
    book.round()
    book.command(plan_hash=digest("another plan"))
    book.round()
    (finding,) = book.audit().findings
    assert finding.code == "not-commanded"
    assert "run1/2.1" in finding.detail


def test_an_offer_to_a_revoked_site_is_found(book):
    book.command()
    book.revoke("site02")
    book.round()
    (finding,) = book.audit().findings
    assert (finding.code, finding.site) == ("offered-out", "site02")


def test_an_offer_to_a_site_that_left_is_found(book):
    book.command()
    book.leave("site02")
    book.offer()
    (finding,) = book.audit().findings
    assert (finding.code, finding.site) == ("offered-out", "site02")


def test_what_a_site_writes_after_it_left_is_found(book):
    book.command()
    offer = book.offer()
    book.reserve("site02", offer)
    book.leave("site02")
    assert book.audit().ok, "what it was charged for before stands"
    book.receipt("site02", offer)
    (finding,) = book.audit().findings
    assert (finding.code, finding.site) == ("after-leave", "site02")


def test_what_a_revoked_site_still_owes_the_ledger_is_taken(book):
    book.command()
    offer = book.offer()
    book.revoke("site02")
    book.reserve("site02", offer)
    book.receipt("site02", offer)
    assert book.audit().ok


@pytest.mark.parametrize(
    "changes",
    [
        {"roster_hash": digest("another roster")},
        {"federation": "elsewhere"},
        {"plan_hash": None},
        {"site": "site01"},
        {"action": "revoke", "plan_hash": None, "site": "nobody"},
        {"action": "revoke", "plan_hash": None, "site": None},
    ],
)
def test_a_command_that_should_have_been_refused_is_found_and_rules_nothing(book, changes):
    from fedfuse_shared.commands import Action

    if "action" in changes:
        changes = {**changes, "action": Action(changes["action"])}
    book.command(**changes)
    assert codes(book.audit()) == {"bad-command"}
    book.round()
    assert codes(book.audit()) == {"bad-command", "not-commanded"}


@pytest.mark.parametrize("author", ["@auditor/eve", "@server", "@operator", "site01"])
def test_a_command_by_who_is_no_coordinator_is_found(book, author):
    lab = book.federation
    keys = {"@auditor/eve": lab.auditor, "@server": lab.server, "@operator": lab.operator, **lab.keys}
    book.command(author=author, key=keys[author])
    assert codes(book.audit()) == {"wrong-author"}


def test_a_command_in_a_coordinators_name_by_another_key_is_found(book):
    book.command(key=book.federation.server)
    assert codes(book.audit()) == {"bad-signature"}


def test_an_offer_by_a_coordinator_is_found(book):
    book.command()
    book.leaves.append(seal(book.federation.offer(), "@coordinator/ada", book.federation.coordinator))
    assert codes(book.audit()) == {"wrong-author"}


def test_a_refusal_by_another_than_the_server_is_found(book):
    refusal = book.refuse_command(book.command())
    book.leaves[-1] = seal(refusal.body, "@coordinator/ada", book.federation.coordinator)
    assert codes(book.audit()) == {"wrong-author"}
    book.leaves[-1] = seal(refusal.body, SERVER, book.federation.server)
    assert book.audit().ok


def test_a_command_logged_twice_and_a_nonce_used_twice_are_found(book):
    first = book.command()
    book.leaves.append(first)
    assert codes(book.audit()) == {"duplicate-command"}
    book.leaves.pop()
    book.command(nonce=first.body.nonce, plan_hash=digest("another plan"))
    assert codes(book.audit()) == {"duplicate-command"}
    book.leaves.pop()
    book.refuse_command(first)
    assert book.audit().ok, "refused as given again"
    book.refuse_command(first)
    assert codes(book.audit()) == {"duplicate-command"}
