"""What coordinators order: who may, what is refused in the open, and that an old command given again does nothing."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.federation import Federation
from support.ledgers import LedgerBuilder, head_of

from fedfuse_server import orders as orders_module
from fedfuse_server.books import Books
from fedfuse_server.orders import CommandRefused, Orders, leave_waiting, write_command
from fedfuse_shared.commands import Action, Command, CommandRefusal
from fedfuse_shared.config.base import OPERATOR, SERVER
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Leave
from fedfuse_shared.ledger.verification import verify_ledger

PLAN = "7" * 64


@pytest.fixture
def lab():
    return Federation.with_officers(4)


class Desk:
    """Books over a file, and the folder where commands wait."""

    def __init__(self, folder, lab):
        self.folder, self.lab = folder, lab
        self.open()
        if self.books.empty:
            self.books.append(seal(lab.roster, OPERATOR, lab.operator))

    def open(self):
        self.books = Books(self.folder / "ledger.jsonl", self.lab.roster, self.lab.server)
        self.orders = Orders(self.books, self.lab.roster, self.folder / "commands")

    def reopen(self):
        self.books.close()
        self.open()

    def raws(self):
        return [entry.raw for entry in read_ledger(self.folder / "ledger.jsonl")]

    def kinds(self):
        return [kind_of(raw) for raw in self.raws()][1:]

    def audited(self):
        raws = self.raws()
        return verify_ledger(raws, self.lab.roster, head_of(raws))


@pytest.fixture
def desk(tmp_path, lab):
    opened = Desk(tmp_path, lab)
    yield opened
    opened.books.close()


def revoke(lab, site="site01", key=None):
    return write_command(lab.roster, key or lab.coordinator, Action.REVOKE, site=site, reason="lost its disk")


def test_a_coordinators_commands_rule_and_are_known_to_the_next_process(desk, lab):
    desk.orders.give(encode(write_command(lab.roster, lab.coordinator, Action.RUN, plan_hash=PLAN)))
    desk.orders.give(encode(revoke(lab)))
    for _ in range(2):
        assert (desk.books.plan, desk.books.revoked) == (PLAN, {"site01"})
        desk.reopen()
    assert desk.kinds() == [Command.kind, Command.kind]
    assert desk.audited().ok


@pytest.mark.parametrize("who", ["auditor", "site", "server", "operator", "stranger"])
def test_whoever_is_no_coordinator_is_refused_on_the_ledger(desk, lab, who):
    key = {
        "auditor": lab.auditor,
        "site": lab.keys["site00"],
        "server": lab.server,
        "operator": lab.operator,
        "stranger": Ed25519PrivateKey.generate(),
    }[who]
    with pytest.raises(CommandRefused) as refused:
        desk.orders.give(encode(revoke(lab, key=key)))
    assert "role" in str(refused.value) or "not enrolled" in str(refused.value)
    assert desk.kinds() == [CommandRefusal.kind]
    assert not desk.books.revoked
    assert desk.audited().ok


def test_a_command_signed_by_another_than_it_names_is_refused(desk, lab):
    honest = revoke(lab)
    forged = seal(honest.body, honest.author, lab.auditor)
    with pytest.raises(CommandRefused, match="signature"):
        desk.orders.give(encode(forged))
    assert not desk.books.revoked


def test_a_command_of_another_federation_is_refused(desk, lab):
    other = Federation.with_officers(4, seed="elsewhere")
    body = revoke(other).body
    with pytest.raises(CommandRefused, match="another federation or roster"):
        desk.orders.give(encode(seal(body, "@coordinator/ada", lab.coordinator)))


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff" * 100, b"x" * 5000])
def test_what_is_no_command_is_refused_on_the_ledger(desk, raw):
    with pytest.raises(CommandRefused):
        desk.orders.give(raw)
    assert desk.kinds() == [CommandRefusal.kind]
    assert desk.audited().ok


def test_a_command_given_again_does_nothing_and_is_refused_once(desk, lab):
    command = encode(write_command(lab.roster, lab.coordinator, Action.RUN, plan_hash=PLAN))
    desk.orders.give(command)
    desk.orders.give(encode(write_command(lab.roster, lab.coordinator, Action.RUN, plan_hash="8" * 64)))
    for _ in range(5):
        with pytest.raises(CommandRefused, match="second time"):
            desk.orders.give(command)
        desk.reopen()
    assert desk.books.plan == "8" * 64, "the old plan is not back"
    assert desk.kinds() == [Command.kind, Command.kind, CommandRefusal.kind]
    assert desk.audited().ok


def test_a_nonce_used_for_something_else_is_refused(desk, lab):
    first = revoke(lab)
    desk.orders.give(encode(first))
    body = first.body.model_copy(update={"site": "site02"})
    with pytest.raises(CommandRefused, match="second time"):
        desk.orders.give(encode(seal(body, first.author, lab.coordinator)))
    assert desk.books.revoked == {"site01"}


def test_refusals_on_the_ledger_are_bounded(desk, lab, monkeypatch):
    monkeypatch.setattr(orders_module, "MAX_REFUSALS", 3)
    for _ in range(6):
        with pytest.raises(CommandRefused):
            desk.orders.give(encode(revoke(lab, key=lab.auditor)))
    assert desk.kinds() == [CommandRefusal.kind] * 3


def test_waiting_commands_are_carried_out_and_taken_away(desk, lab):
    folder = desk.folder / "commands"
    assert desk.orders.take_waiting() == []
    leave_waiting(folder, revoke(lab))
    leave_waiting(folder, revoke(lab, "site02", key=lab.auditor))
    (refused,) = desk.orders.take_waiting()
    assert refused.who == "@auditor/eve"
    assert desk.books.revoked == {"site01"}
    assert list(folder.iterdir()) == []


def test_a_crash_between_ledger_and_folder_neither_repeats_nor_loses_a_command(desk, lab, monkeypatch):
    folder = desk.folder / "commands"
    lost, done = revoke(lab, "site01"), revoke(lab, "site02")
    for command in (lost, done):
        path = leave_waiting(folder, command)
        path.replace(path.with_suffix(".taken"))  # as the process before left them
    desk.orders.give(encode(done))
    desk.reopen()
    assert desk.orders.take_waiting() == []
    assert desk.books.revoked == {"site01", "site02"}
    assert desk.kinds() == [Command.kind, Command.kind]


def test_nothing_of_a_site_is_taken_after_it_left(desk, lab):
    book = LedgerBuilder(lab).enrol()
    policy = next(leaf for leaf in book.leaves if leaf.author == "site00")
    leave = book.leave("site00")
    after = book.policy("site00")
    desk.books.take("site00", [encode(policy), encode(leave)])
    assert desk.books.out == {"site00"}
    for _ in range(2):
        assert desk.books.take("site00", [encode(policy), encode(leave)]) == []
        with pytest.raises(ProtocolError, match="after it left"):
            desk.books.take("site00", [encode(after)])
        desk.reopen()
        assert desk.books.left == {"site00"}
    policies = [leaf for leaf in book.leaves if leaf.author == "site01"]
    with pytest.raises(ProtocolError, match="after it left"):
        desk.books.take(
            "site01", [encode(policies[0]), *map(encode, (book.leave("site01"), book.policy("site01")))]
        )
    assert "site01" not in desk.books.left
    assert isinstance(leave.body, Leave)


def test_the_server_may_not_order(lab):
    assert write_command(lab.roster, lab.server, Action.RUN, plan_hash=PLAN).author == SERVER
