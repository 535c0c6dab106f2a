"""A site that hears nothing says why, once, and that it is over."""

import io
import json

import pytest
from support.deployed_site import write_site
from support.lone_site import Around
from support.machines import free_ports

from fedfuse_client.journal import Journal
from fedfuse_client.server_probe import Reached, check_clock
from fedfuse_client.server_watch import QUIET, ServerWatch, trouble
from fedfuse_shared.errors import StateError


class Watched:
    """A watch whose clock is turned by hand and which looks at what it is told."""

    def __init__(self, folder):
        self.now, self.state, self.looks = 0.0, "", 0
        self.shown = io.StringIO()
        journal = Journal("lyon", folder, json_lines=True, shown=self.shown)
        self.watch = ServerWatch(self.look, journal, lambda: self.now)

    def look(self):
        self.looks += 1
        return self.state

    def turn(self, *, busy=False):
        self.watch.turn(busy=busy)
        if self.watch._thread is not None:
            self.watch._thread.join()
        self.watch.turn(busy=False)

    def said(self):
        return [json.loads(line)["text"] for line in self.shown.getvalue().splitlines()]


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path)


def test_it_looks_at_once_and_says_nothing_where_nothing_is_wrong(watched):
    watched.turn()
    assert (watched.looks, watched.said()) == (1, [])


def test_trouble_is_said_once_and_its_end_as_well(watched):
    watched.state = "the clock is off"
    for _ in range(3):
        watched.turn()
        watched.now += QUIET
    assert watched.looks == 3
    watched.state = ""
    watched.turn()
    assert watched.said() == ["no message can come: the clock is off", "the server is there"]


def test_a_site_with_messages_to_answer_does_not_look(watched):
    watched.turn()
    for _ in range(10):
        watched.turn(busy=True)
        watched.now += QUIET - 1
        watched.turn()
    assert watched.looks == 1


def test_a_server_that_is_not_there(tmp_path):
    home = write_site(tmp_path / "lyon", Around())
    (port,) = free_ports(1)
    home.connection.write_text(f'address = "127.0.0.1:{port}"\n')
    assert "ca.crt" in trouble(home)  # it has none yet


@pytest.mark.parametrize(("ahead", "word"), [(3600.0, "ahead of"), (-3600.0, "behind")])
def test_an_hour_is_too_much(tmp_path, ahead, word):
    server = Reached("TLSv1.3", ("localhost",), None, ahead, None)
    with pytest.raises(StateError, match=f"this machine's clock is 3600 s {word} the server's"):
        check_clock(server)
