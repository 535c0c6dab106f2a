"""Flower's Grid in this process: a message is a function call, a site is a folder.

The ServerApp and ClientApp run unmodified. Messages are Flower's own; only their transport is missing. Sites run
one after another in one thread, so a simulation is as deterministic as its apps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from flwr.app import DEFAULT_TTL, Context, Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

log = logging.getLogger(__name__)

_SERVER_NODE = 1
_UNKNOWN_ERROR = 0

Loses = Callable[[int, str], bool]
"""Whether a message of a type to a node is lost: given the node and the message type."""


class InlineGrid(Grid):
    """A Grid whose nodes live in this process.

    Args:
        app: The ClientApp every node runs.
        nodes: Each node's configuration, by its identifier.
        loses: Which replies get lost, to simulate dropouts; none by default.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: Mapping[int, dict[str, str]],
        loses: Loses = lambda _node, _type: False,
    ) -> None:
        self._app = app
        self._run = Run.create_empty(run_id=1)
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})
            for node, config in nodes.items()
        }
        self._loses = loses
        self._created = 0
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a node."""
        self._created += 1
        metadata = Metadata(
            run_id=self._run.run_id,
            message_id=f"inline-{self._created}",
            src_node_id=_SERVER_NODE,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=DEFAULT_TTL if ttl is None else ttl,
            message_type=message_type,
        )
        return make_message(metadata=metadata, content=content)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages; their replies can be pulled at once."""
        identifiers = []
        for message in messages:
            identifiers.append(message.metadata.message_id)
            reply = self._deliver(message)
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that were not lost, once each."""
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver messages and return the replies that were not lost."""
        del timeout  # a call returns when it is done
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        try:
            reply = self._app(message, self._contexts[node])
        except Exception as problem:  # as at a SuperNode: any failure of the app is an error reply
            log.warning("node %s failed: %s", node, problem, exc_info=True)
            return Message(Error(_UNKNOWN_ERROR, type(problem).__name__), reply_to=message)
        if self._loses(node, message.metadata.message_type):
            return None
        return reply


def run_inline(
    apps: tuple[ServerApp, ClientApp],
    home: Path,
    folders: Sequence[Path],
    *,
    threads: int,
    loses: Loses = lambda _node, _type: False,
) -> None:
    """Run a federation in this process until its server is done.

    Args:
        apps: The ServerApp and the ClientApp.
        home: The run's folder.
        folders: The sites' folders.
        threads: Threads of torch.
        loses: Which replies get lost, given node and message type.

    Raises:
        FedfuseError: whatever the server raises.
    """
    import torch  # noqa: PLC0415

    from fedfuse_client.round import close_sites  # noqa: PLC0415

    torch.set_num_threads(threads)
    server_app, client_app = apps
    nodes = {node: {"home": str(folder)} for node, folder in enumerate(folders, start=2)}
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"home": str(home.resolve())}
    )
    try:
        server_app(InlineGrid(client_app, nodes, loses), context)
    finally:
        close_sites()
