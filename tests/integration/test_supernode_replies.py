"""Flower's own fetching and sending, around a real SuperNode's state: replies that nobody waits for any more."""

import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal
from support.supernode import NODE, RunningSuperNode

from fedfuse_client.supernode import Pace, send_only_what_was_asked


@pytest.fixture
def node(monkeypatch):
    """A SuperNode's state, and Flower's loop, put back in the end."""
    for name in ("_pull_and_store_message", "_push_messages"):
        monkeypatch.setattr(start_client_internal, name, getattr(start_client_internal, name))
    monkeypatch.setattr(start_client_internal, "time", Pace(lambda _seconds: None))
    return RunningSuperNode()  # not entered: nobody asks over HTTP here


def message_of(run, kind):
    metadata = Metadata(
        run_id=run,
        message_id="",
        src_node_id=1,
        dst_node_id=NODE,
        reply_to_message_id="",
        group_id="",
        created_at=now().timestamp(),
        ttl=60.0,
        message_type=kind,
    )
    message = Message(content=RecordDict(), metadata=metadata)
    metadata.__dict__["_message_id"] = message.object_id
    return message


def fetch(node, message, *, over=False):
    """Do one half of a turn; ``over``: the run ends before the last of the message is confirmed."""
    parts = get_all_nested_objects(message)

    def confirm(_run, _name):
        if over:
            raise RunNotRunningException

    return start_client_internal._pull_and_store_message(
        state=node.state,
        object_store=node.state.object_store,
        node_config={},
        receive=lambda: (remove_content_from_message(message), get_object_tree(message)),
        get_run=None,
        get_fab=None,
        pull_object=lambda _run, name: parts[name].deflate(),
        confirm_message_received=confirm,
        trusted_entities=None,
    )


def answer(node, message):
    """Hand over a reply as whoever runs the app does."""
    reply = Message(RecordDict(), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    node.state.object_store.preregister(message.metadata.run_id, get_object_tree(reply))
    node.state.store_message(remove_content_from_message(reply))


def send(node):
    """Do the other half, and return which messages were replied to."""
    sent = []

    def push(message, _tree, _took):
        sent.append(message.metadata.reply_to_message_id)
        return set(), ""

    start_client_internal._push_messages(
        state=node.state, object_store=node.state.object_store, send=push, push_object=None
    )
    return sent


def test_without_our_change_every_reply_comes_one_message_too_late(node):
    first, second = message_of(node.begin(), "train.shares"), message_of(node.begin(), "query.hello")
    assert fetch(node, first, over=True) is None
    answer(node, first)  # its task stayed, so it was answered
    assert fetch(node, second) is not None
    assert send(node) == [first.object_id]


def test_a_reply_to_a_forgotten_message_is_removed_and_the_next_one_sent(node):
    send_only_what_was_asked(start_client_internal)
    first, second = message_of(node.begin(), "train.shares"), message_of(node.begin(), "query.hello")
    assert fetch(node, first, over=True) is None
    answer(node, first)
    assert fetch(node, second) is not None
    answer(node, second)
    assert send(node) == [second.object_id]
    assert list(node.state.get_messages_legacy(is_reply=True)) == []


def test_a_reply_is_sent_as_ever_where_nothing_was_forgotten(node):
    send_only_what_was_asked(start_client_internal)
    run = node.begin()
    for kind in ("query.hello", "train.keys"):
        message = message_of(run, kind)
        assert fetch(node, message) is not None
        answer(node, message)
        assert send(node) == [message.object_id]
