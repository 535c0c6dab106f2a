"""Flower's own Runtime API of a SuperNode, served for real, with messages put in as the SuperNode puts them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedfuse_shared.bundle import bundle
from support.machines import free_ports

SECRET = b"between the two of us"
NODE = 7


class RunningSuperNode:
    """Everything of a SuperNode but its connection to a server: the test is that."""

    def __init__(self) -> None:
        factory = NodeStateFactory(ObjectStoreFactory())
        self.state = factory.state()
        self.state.set_node_id(NODE)
        (self.port,) = free_ports(1)
        app = create_app(state_factory=factory, superexec_auth_secret=SECRET)
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._runs = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    def begin(self, content: bytes | None = None, *, settings: dict[str, str] | None = None) -> int:
        """Make known a run with an app bundle and settings of whoever submitted it; return its number."""
        self._runs += 1
        number = self._runs
        stored = self.state.store_fab(Fab("", bundle() if content is None else content, {}))
        run = Run.create_empty(number)
        run.fab_hash, run.fab_id, run.fab_version, run.series_id = stored, "fedfuse/fedfuse", "1.0.0", number
        run.override_config = settings or {}
        self.state.store_run(run)
        context = Context(number, NODE, dict(settings or {}), RecordDict(), dict(settings or {}))
        self.state.set_run_series_context(number, context)
        return number

    def send(
        self,
        run: int,
        kind: str,
        content: RecordDict,
        *,
        task: str = TaskType.CLIENT_APP,
        ttl: float = 60.0,
        objects: dict[str, bytes] | None = None,
        held: bool = False,
    ) -> str:
        """Put in a message from the server, or leave that to whoever goes through ``stages``.

        ``objects`` replaces the bytes of some of its objects.
        """
        metadata = Metadata(
            run_id=run,
            message_id="",
            src_node_id=1,
            dst_node_id=NODE,
            reply_to_message_id="",
            group_id="",
            created_at=now().timestamp(),
            ttl=ttl,
            message_type=kind,
        )
        message = Message(content=content, metadata=metadata)
        identifier = message.object_id
        metadata.__dict__["_message_id"] = identifier
        stages = self._arrive(message, task, objects or {})
        if not held:
            for _ in stages:
                pass
        self.stages = stages
        return identifier

    def _arrive(self, message: Message, task: str, objects: dict[str, bytes]) -> Iterator[str]:
        """Do as the SuperNode does, in its order; between two stages anybody may ask."""
        run, store = message.metadata.run_id, self.state.object_store
        self.state.create_task(task_type=task, run_id=run, fab_hash=self.state.get_run(run).fab_hash)
        yield "task"
        store.preregister(run, get_object_tree(message))
        self.state.store_message(remove_content_from_message(message))
        yield "message"
        for number, part in get_all_nested_objects(message).items():
            # Not by `put`, which checks: a server that lies may have made its SuperNode accept anything.
            store.store[number].content = objects.get(number, part.deflate())
            store.store[number].is_available = True
            yield "object"

    def replies(self) -> list[Message]:
        """Take the replies and forget them, as the SuperNode does when it has sent them on."""
        found = []
        for message in self.state.get_messages_legacy(is_reply=True):
            number = message.metadata.message_id
            contents = {}
            for part in iterate_object_tree(self.state.object_store.get_object_tree(number)):
                contents[part.object_id] = self.state.object_store.get(part.object_id)
            found.append(inflate_object_from_contents(number, contents))
            found[-1].metadata.__dict__["_message_id"] = number
            self.state.object_store.delete(number)
            self.state.delete_messages(message_ids=[number, message.metadata.reply_to_message_id])
        return found

    def statuses(self) -> list[str]:
        """Return what became of each task, oldest first."""
        return [task.status.sub_status or task.status.status for task in self.state.get_tasks()]
