"""The tasks of Flower's SuperNode, as its Runtime API hands them out under process isolation (Flower 1.41).

The SuperNode fetched whatever the server sent: every answer of this API is taken for the server's own words. Nothing
is executed or unpacked here but records of numbers, text and bytes, within limits checked before they are built.
"""

from __future__ import annotations

import hashlib
from typing import Final

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import push_objects
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient

from fedfuse_shared.arrival import Arrival
from fedfuse_shared.config.base import SERVER
from fedfuse_shared.errors import ProtocolError

_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"


class _Token:
    """Adds the token of the task in hand to every request but the one that asks for a task."""

    def __init__(self) -> None:
        self.token = ""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        if self.token and context.rpc_method != _ACQUIRE:
            context.request.headers[TASK_TOKEN_HEADER] = self.token
        return call_next(context)


class Tasks:
    """The queue of one running SuperNode.

    Args:
        address: Where its Runtime API listens, on this machine.
        secret: What it shares with whoever may take tasks.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self._token = _Token()
        signing = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=(_ACQUIRE,))
        self._client = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,
            root_certificates=None,
            interceptors=[signing, self._token],
        )

    def acquire(self) -> Task | None:
        """Return the oldest task that is a message to a ClientApp; no other kind is ever taken.

        Raises:
            httpx.HTTPError: the SuperNode is not there, or refuses.
        """
        answer = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not answer.HasField("task") or not answer.token or answer.task.type != TaskType.CLIENT_APP:
            return None
        self._token.token = answer.token
        given = self._client.PullTaskInput(PullTaskInputRequest())
        return Task(self._client, hashlib.sha256(given.fab.content).hexdigest())

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()


class Task:
    """One message to answer; the SuperNode waits until there is a reply.

    It makes a task before it has the message, and fetches the message's objects after that: until
    :meth:`is_received` nothing else may be asked for.

    Attributes:
        bundle: Hash of the app bundle the message was sent with (SHA-256, hexadecimal), computed here.
    """

    def __init__(self, client: RuntimeHttpClient, bundle: str) -> None:
        self.bundle = bundle
        self._client = client
        self._message: Message | None = None
        self._root = ""
        self._arrival: Arrival | None = None
        self._reply = ""
        self._heartbeat = HeartbeatSender(self._beat)
        self._heartbeat.start()

    @property
    def message(self) -> Message:
        """The message's metadata, as the server wrote them."""
        assert self._message is not None
        return self._message

    def is_received(self) -> bool:
        """Take what has come of the message, and return whether that is all of it.

        What is over a limit is waited for but not kept: a reply before the SuperNode has everything would be lost.

        Raises:
            httpx.HTTPError: the SuperNode is gone, or gave the message up.
            ValueError: what the server wrote about the message is nothing Flower knows.
        """
        if self._arrival is None:
            pulled = self._client.PullMessages(PullAppMessagesRequest())
            if not pulled.messages_list or not pulled.message_object_trees:
                return False
            tree = pulled.message_object_trees[0]
            self._root = tree.object_id
            self._message = message_from_proto(pulled.messages_list[0])
            self._message.metadata.__dict__["_message_id"] = self._root
            self._arrival = Arrival(tree, who=SERVER)
        return self._arrival.is_complete(self._pull)

    def content(self) -> RecordDict:
        """Return the message's records.

        Raises:
            ProtocolError: they are too many, too large, or malformed.
        """
        assert self._arrival is not None
        message = self._arrival.message()
        if not message.has_content():
            raise ProtocolError("sent a message without content", who=SERVER)
        return message.content

    def reply(self, answer: RecordDict | Error) -> None:
        """Hand the reply to the SuperNode.

        Raises:
            httpx.HTTPError: the SuperNode is gone.
        """
        # The message is dropped from the SuperNode's memory whether or not its content was looked at.
        run, node = self.message.metadata.run_id, Node(node_id=self.message.metadata.dst_node_id)
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=self._root)
        )
        reply = Message(answer, reply_to=self.message)
        reply.metadata.__dict__["_message_id"] = self._reply = reply.object_id
        with no_object_id_recompute():
            pushed = self._client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                )
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(
                    self._client.PushObject, node, run_id=run, session_id=pushed.session_id
                ),
                object_ids_to_push=set(pushed.objects_to_push),
            )

    def is_sent(self) -> bool:
        """Return whether the SuperNode has sent the reply on, or given it up.

        Raises:
            httpx.HTTPError: the SuperNode is gone.
        """
        return not self._pull(self._reply).object_found

    def finish(self) -> None:
        """End the task; nothing of it is kept, so the run's context stays as the SuperNode made it.

        Raises:
            httpx.HTTPError: the SuperNode is gone.
        """
        self.drop()
        self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))

    def drop(self) -> None:
        """Stop saying that the task is worked on; the SuperNode then replies itself, after a while."""
        if self._heartbeat.is_running:
            self._heartbeat.stop()

    def _beat(self) -> bool:
        try:
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False  # tried again; whether the SuperNode is gone for good shows when the reply is handed over
        except httpx.HTTPStatusError:
            return True  # it counts the task as ended: nothing to be kept alive
        return True

    def _pull(self, identifier: str) -> PullObjectResponse:
        asked = self.message.metadata
        return self._client.PullObject(
            PullObjectRequest(node=Node(node_id=asked.dst_node_id), run_id=asked.run_id, object_id=identifier)
        )
