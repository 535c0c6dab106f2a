"""Our pace for Flower's SuperNode: what is replaced is all that Flower uses, and pauses grow again."""

import ast
import inspect

from flwr.supernode import start_client_internal

from fedfuse_client.supernode import REPLY, SOONEST, Pace


def test_flower_uses_nothing_of_time_but_sleep():
    """Otherwise the stand-in would break it: look here when Flower is upgraded."""
    tree = ast.parse(inspect.getsource(start_client_internal))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    }
    assert used == {"sleep"}
    pauses = [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sleep"
    ]
    assert sorted(pauses) == [0.5, 0.5, 3]


def test_it_looks_soon_after_a_reply_and_ever_more_rarely_after_that():
    slept = []
    pace = Pace(slept.append)
    for _ in range(3):
        pace.sleep(3)
    assert slept == [1.0, 2.0, 3.0]  # idle: as seldom as Flower's own
    slept.clear()
    pace.sleep(0.5)
    for _ in range(8):
        pace.sleep(3)
    assert slept[0] == REPLY
    assert slept[1:] == [SOONEST, 0.2, 0.4, 0.8, 1.6, 3, 3, 3]


def test_it_never_sleeps_longer_than_flower_would():
    slept = []
    pace = Pace(slept.append)
    pace.sleep(0.01)
    assert slept == [0.01]
