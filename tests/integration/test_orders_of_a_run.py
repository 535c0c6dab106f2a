"""A run under orders, every part real but the wire: who may start it, sites that are revoked, leave, come and go."""

from __future__ import annotations

import json

import pytest
from flwr.app import Context, RecordDict
from rich.console import Console
from support.served import free_port, with_officers
from support.small_federation import SmallFederation

from fedfuse_client.app import app as client_app
from fedfuse_client.round import close_sites, site_in
from fedfuse_server.coordinator import Coordinator
from fedfuse_server.events import RoundOpened, RoundStarted, SiteLeftOut, SitesOut, observing
from fedfuse_server.orders import CommandRefused, leave_waiting, write_command
from fedfuse_server.plan import plan_hash
from fedfuse_server.revocation import revoke_site
from fedfuse_server.serving import serve
from fedfuse_server.standing import Standing, holding
from fedfuse_server.status import SiteState, status_of
from fedfuse_server.supervisor import Listening
from fedfuse_shared.commands import Action, Command, CommandRefusal
from fedfuse_shared.envelope import encode
from fedfuse_shared.errors import ConfigError, StateError
from fedfuse_shared.keyfile import load_key
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.records import Leave
from fedfuse_simulations.engines.inline import InlineGrid
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Ordered:
    """A small federation whose roster names a coordinator, ada, and an auditor, eve."""

    def __init__(self, root, rounds=2):
        self.federation = SmallFederation(root, {"rounds": rounds})
        self.home, self.keys = self.federation.home, with_officers(self.federation)
        self.roster = self.home.load_roster().body
        nodes = {node: {"home": str(f)} for node, f in enumerate(self.federation.folders.values(), start=2)}
        self.grid = InlineGrid(client_app, nodes)
        self.excluded = set()

    def command(self, key="ada"):
        planned = plan_hash(self.federation.config, len(self.roster.sites))
        return encode(write_command(self.roster, load_key(self.keys[key]), Action.RUN, plan_hash=planned))

    def run(self, when_opened=lambda number: None, command=None):
        def told(event):
            self.federation.events.append(event)
            if isinstance(event, RoundOpened):
                when_opened(event.round)

        try:
            with observing(told):
                Coordinator(self.grid, self.home, command=command, excluded=self.excluded.update).run()
        finally:
            close_sites()

    def asked(self):
        return [event.participants for event in self.federation.told(RoundStarted)]

    def kinds(self):
        return [kind_of(entry.raw) for entry in read_ledger(self.home.ledger)]


@pytest.fixture
def ordered(tmp_path):
    return Ordered(tmp_path)


ALL = ("bern", "lyon", "oslo", "rome")


def test_a_run_that_no_coordinator_ordered_does_not_begin(ordered):
    with pytest.raises(ConfigError, match="no coordinator ordered"):
        ordered.run()
    with pytest.raises(CommandRefused, match="role"):
        ordered.run(command=ordered.command("eve"))
    assert ordered.kinds() == ["enrolment", CommandRefusal.kind]
    assert not ordered.home.state.exists()
    assert audit(ordered.home).ok


def test_a_site_that_is_revoked_while_the_server_runs_is_asked_no_more(ordered):
    def revoke(number):
        if number == 1:
            order = write_command(
                ordered.roster,
                load_key(ordered.keys["ada"]),
                Action.REVOKE,
                site="rome",
                reason="lost its disk",
            )
            leave_waiting(ordered.home.commands, order)

    ordered.run(revoke, ordered.command())
    assert ordered.asked() == [ALL, ALL[:3]]
    assert ordered.excluded == {"rome"}
    assert ordered.federation.told(SitesOut) == [SitesOut(("rome",))]
    assert audit(ordered.home).ok
    status = status_of(ordered.home)
    assert (status.round, status.rounds, status.running) == (2, 2, False)
    assert {row.site: row.state for row in status.sites} == {
        **dict.fromkeys(ALL, SiteState.UNKNOWN),
        "rome": SiteState.REVOKED,
    }
    assert [row.rounds for row in status.sites] == [2, 2, 2, 1]
    assert {row.site: row.epsilon for row in status.sites} == {
        row.site: row.epsilon for row in audit(ordered.home).sites
    }
    assert [each.outcome for each in status.attempts] == ["opened", "opened"]


def test_a_site_is_revoked_at_once_where_no_server_runs(ordered):
    eve, ada = (load_key(ordered.keys[name]) for name in ("eve", "ada"))
    with pytest.raises(CommandRefused, match="role"):
        revoke_site(ordered.home, "rome", eve, "I say so")
    with pytest.raises(ConfigError, match="not enrolled"):
        revoke_site(ordered.home, "atlantis", ada, "sunk")
    assert revoke_site(ordered.home, "rome", ada, "lost its disk")
    assert ordered.kinds() == ["enrolment", CommandRefusal.kind, Command.kind]
    assert list(ordered.home.commands.iterdir()) == []
    early = []
    ordered.grid.get_node_ids = lambda: early.append(set(ordered.excluded)) or list(ordered.grid._contexts)
    ordered.run(command=ordered.command())
    assert early[0] == {"rome"}, "it must not connect in the first place"
    assert ordered.asked() == [ALL[:3]] * 2
    assert audit(ordered.home).ok


def test_a_revocation_waits_for_the_server_that_runs_and_status_shows_it(ordered):
    with holding(ordered.home):
        with pytest.raises(StateError, match="runs on this folder"), holding(ordered.home):
            pass
        assert not revoke_site(ordered.home, "rome", load_key(ordered.keys["ada"]), "lost its disk")
        assert len(list(ordered.home.commands.iterdir())) == 1
        Standing(pid=7, superlink=None, there=("bern",), awaited=()).save(ordered.home)
        status = status_of(ordered.home)
    assert (status.running, status.pid) == (True, 7)
    assert [row.state.value for row in status.sites] == ["online", "away", "away", "away"]
    assert not status_of(ordered.home).running


def test_status_reads_a_ledger_whose_last_line_is_still_being_written(ordered):
    ordered.run(command=ordered.command())
    with ordered.home.ledger.open("ab") as file:
        file.write(b'{"author":"@ser')
    assert status_of(ordered.home).round == 2


def test_a_site_that_leaves_is_asked_no_more_and_what_it_spent_stays(ordered):
    def leave(number):
        if number == 1:
            site = site_in(str(ordered.federation.folders["rome"]))
            site._chain.append(
                lambda seq, prev: Leave(seq=seq, prev=prev, reason="our grant ends"), site._me.key
            )

    ordered.run(leave, ordered.command())
    assert ordered.asked()[0] == ALL
    assert ordered.kinds().count(Leave.kind) == 1
    report = audit(ordered.home)
    assert report.ok, report.findings
    rome = next(row for row in report.sites if row.site == "rome")
    assert (rome.rounds, rome.reservations) == (1, 1)
    assert {row.site: row.state for row in status_of(ordered.home).sites}["rome"] is SiteState.LEFT


def test_a_site_that_comes_back_under_another_node_and_one_that_comes_late_take_part(ordered):
    contexts = ordered.grid._contexts
    late = contexts.pop(5)

    def move(number):
        contexts[33] = contexts.pop(3)
        contexts[55] = late

    ordered.run(lambda number: move(number) if number == 1 else None, ordered.command())
    assert ordered.asked() == [ALL[:3], ALL]
    assert audit(ordered.home).ok


def test_a_node_that_does_not_say_which_site_it_is_is_not_asked_before_every_attempt(ordered):
    ordered.grid._contexts[6] = Context(1, 6, {"home": "/nowhere"}, RecordDict(), {})
    ordered.run(command=ordered.command())
    assert [event.step for event in ordered.federation.told(SiteLeftOut)] == ["query.hello"]
    assert ordered.asked() == [ALL, ALL]


def test_what_serve_refuses_before_anything_is_started(ordered, tmp_path):
    here = Listening("127.0.0.1", free_port(), insecure=True)
    out = Console(file=(tmp_path / "shown").open("w"))

    def served(key, *, resume=False):
        serve(ordered.home, here, key, resume=resume, wait=0, console=out)

    with pytest.raises(ConfigError, match="names coordinators"):
        served(None)
    with pytest.raises(StateError, match="no run was begun"):
        served(ordered.keys["ada"], resume=True)
    with pytest.raises(CommandRefused, match="role"):
        served(ordered.keys["eve"])
    assert ordered.kinds() == ["enrolment", CommandRefusal.kind]
    ordered.run(command=ordered.command())
    with pytest.raises(StateError, match="--resume"):
        served(ordered.keys["ada"])
    with pytest.raises(ConfigError, match="--insecure"):
        Listening("0.0.0.0", 8000, insecure=True)
    lines = (ordered.home.logs / "server.jsonl").read_text().splitlines()
    assert "refused" in json.loads(lines[0])["message"]
    assert not (ordered.home.logs / "superlink.log").exists()
