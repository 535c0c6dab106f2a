"""The ClientApp, the same in every engine; wiring only."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfuse_client.round import Site, site_in
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.messages import Step
from fedfuse_shared.parcel import pack, unpack

app = ClientApp()


def _site(context: Context) -> Site:
    folder = context.node_config.get("home")
    if not isinstance(folder, str):
        raise ConfigError(
            "the node configuration names no site folder", advice='start the node with home="/path"'
        )
    return site_in(folder)


def _answer(message: Message, context: Context) -> Message:
    step = Step(message.metadata.message_type)
    answer = _site(context).answer(step, unpack(message.content, who="server"))
    return Message(pack(answer), reply_to=message)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say which site this is."""
    return _answer(message, context)


@app.train("keys")
def keys(message: Message, context: Context) -> Message:
    """Check an offer and advertise this attempt's keys."""
    return _answer(message, context)


@app.train("shares")
def shares(message: Message, context: Context) -> Message:
    """Deal shares of this attempt's secrets."""
    return _answer(message, context)


@app.train("update")
def update(message: Message, context: Context) -> Message:
    """Train, and send the masked update."""
    return _answer(message, context)


@app.train("agree")
def agree(message: Message, context: Context) -> Message:
    """Sign who survived."""
    return _answer(message, context)


@app.train("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Reveal the shares that open the survivors' sum."""
    return _answer(message, context)


@app.query("settle")
def settle(message: Message, context: Context) -> Message:
    """Hand over ledger leaves whose reply was lost."""
    return _answer(message, context)
