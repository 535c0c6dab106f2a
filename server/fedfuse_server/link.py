"""The coordinator's own end of its SuperLink: it is the operator, the submitter and the ServerApp of every run there.

A Flower run is only a channel: where the SuperLink was lost, the next look for nodes starts it again, registers the
roster's nodes, submits a new run with the thin bundle and takes that run's task. Tasks of any other run are taken as
well and ended as failed, so that nothing of them is ever executed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable
from typing import Final

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import fab_to_proto, message_from_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.message_pb2 import Message as WireMessage
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, constant
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedfuse_server.supervisor import SuperLink
from fedfuse_shared.arrival import Arrival, Pull
from fedfuse_shared.bundle import bundle, bundle_hash
from fedfuse_shared.errors import ConfigError, ProtocolError, RoundAborted
from fedfuse_shared.roster import Roster

log = logging.getLogger(__name__)

POLL: Final = 0.2
"""Between two looks for replies (seconds); Flower's own takes 3."""

RETRY: Final = 5.0
"""Longest time a call is repeated while the SuperLink runs and does not answer (seconds)."""

MAX_FAILURES: Final = 3
"""Times in a row that a running SuperLink may fail before it is stopped and started again."""

_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
_FAILURES: Final = (httpx.HTTPError, RunNotRunningException, ObjectPushError, ValueError)
"""What Flower's calls raise where the other end is gone, refuses or answers nonsense."""


class LinkLost(RoundAborted):
    """The SuperLink cannot be reached, or knows the coordinator's run no more."""


class _Bearer:
    """Adds the token that opens the SuperLink's closed paths."""

    def __init__(self, token: str) -> None:
        self._value = f"Bearer {token}"

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add it to a request."""
        context.request.headers["authorization"] = self._value
        return call_next(context)


class LinkGrid(HttpGrid):
    """Flower's Grid over the coordinator's own SuperLink, which comes back after it was lost.

    Args:
        superlink: The child process.
        roster: Whose nodes may connect.
    """

    def __init__(self, superlink: SuperLink, roster: Roster) -> None:
        super().__init__(superlink.listening.own_address, token="none before a run is there")  # noqa: S106
        self._superlink = superlink
        self._keys = {_key_bytes(line): site for site, line in roster.nodes.items() if site in roster.sites}
        if not self._keys and not superlink.listening.insecure:
            raise ConfigError(
                "the roster has no keys of connections: no site could connect",
                who=roster.federation,
                advice="provision the federation anew with the sites' requests",
            )
        self._excluded: set[str] = set()
        self._coming: dict[str, _Reply] = {}
        """Replies that are announced and not here yet, by the message they answer."""
        self._failures = 0
        """Times in a row that it was lost."""
        self._lost = threading.Event()
        self._lost.set()
        self._heartbeat: HeartbeatSender | None = None
        self._retry_invoker = RetryInvoker(
            lambda: constant(POLL),
            httpx.TransportError,
            max_tries=None,
            max_time=RETRY,
            jitter=None,
            should_giveup=lambda _problem: not superlink.alive,
        )

    # --- what the coordinator uses --------------------------------------------------------------------------
    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are connected, after the SuperLink was started and a run is there, if need be.

        Raises:
            LinkLost: it went away meanwhile.
            StateError: it does not start.
        """
        try:
            self._ensure()
            self._fail_others()
            nodes = [node.node_id for node in self.get_nodes()]
        except _FAILURES as problem:
            raise self._gone(problem) from problem
        self._failures = 0
        return nodes

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies that come in time.

        Raises:
            LinkLost: the SuperLink went away.
        """
        asked = list(messages)
        end = time.monotonic() + (timeout or 0.0)
        replies: list[Message] = []
        if not asked:
            return replies
        if self._lost.is_set():
            raise self._gone(None)
        self._coming.clear()
        try:
            waiting = {name for name in self.push_messages(asked) if name}
            while waiting:
                found = list(self.pull_messages(waiting))
                replies += found
                waiting -= {each.metadata.reply_to_message_id for each in found}
                if not waiting or (timeout is not None and time.monotonic() >= end):
                    break
                if self._lost.wait(POLL):
                    raise self._gone(None)
        except _FAILURES as problem:
            raise self._gone(problem) from problem
        return replies

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages that have come since; what is wrong with one is its sender's alone.

        Flower's own waits for minutes for a reply's parts, builds whatever they say, and fails for all where one
        cannot be built. Of a reply nothing is believed here but its records: who sent it, and to what, is as the
        SuperLink checked it.
        """
        waited = set(message_ids) - self._coming.keys()
        if waited:
            found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=waited))
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                self._coming[message.metadata.reply_to_message_id] = _Reply(message, tree)
        replies = []
        for name, coming in list(self._coming.items()):
            if coming.is_complete(self._pull):
                del self._coming[name]
                replies.append(coming.take())
                self._runtime_client.ConfirmMessageReceived(
                    ConfirmMessageReceivedRequest(
                        node=self.node, run_id=self.run.run_id, message_object_id=coming.identifier
                    )
                )
        return replies

    def _pull(self, identifier: str) -> PullObjectResponse:
        return self._runtime_client.PullObject(
            PullObjectRequest(node=self.node, run_id=self.run.run_id, object_id=identifier)
        )

    def exclude(self, sites: Collection[str]) -> None:
        """Let the nodes of sites connect no more, now or later."""
        self._excluded |= set(sites)
        try:
            if not self._lost.is_set():
                self._register()
        except _FAILURES as problem:
            # Whatever the next run begins with registers without them.
            log.warning("nodes of %s are still registered: %s", ", ".join(sites), problem)
            self._lost.set()

    def finish(self, *, completed: bool) -> None:
        """End the Flower run and let go of it."""
        if not self._lost.is_set():
            status = SubStatus.COMPLETED if completed else SubStatus.FAILED
            try:
                self._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
            except _FAILURES as problem:
                log.warning("the end of the run could not be told: %s", problem)
        self._lost.set()
        self._drop()

    # --- a run of one's own ---------------------------------------------------------------------------------
    def _ensure(self) -> None:
        started = self._superlink.ensure()
        if not started and not self._lost.is_set():
            return
        self._drop()
        self._register()
        with self._control() as control:
            fab = Fab(bundle_hash(), bundle(), {})
            run = control.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id
        if not run:
            raise LinkLost("the SuperLink refused the run", advice="see logs/superlink.log")
        token = self._acquire(run)
        if token is None:
            raise LinkLost("the SuperLink gave no task for the run", advice="see logs/superlink.log")
        self._token = token
        self._connect()
        given = self._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        self.set_run(run_from_proto(given.run))
        self._lost.clear()
        self._heartbeat = HeartbeatSender(self._beat)
        self._heartbeat.start()
        log.info("Flower run %s is open", run)

    def _drop(self) -> None:
        if self._heartbeat is not None and self._heartbeat.is_running:
            self._heartbeat.stop()
        self._heartbeat = None
        self.close()

    def _beat(self) -> bool:
        """Tell the SuperLink that the coordinator lives; False where it should be told again soon."""
        client = self._client
        if self._lost.is_set() or client is None:
            return True
        try:
            if not client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                self._lost.set()
        except httpx.TransportError:
            return False
        except _FAILURES as problem:
            log.warning("the run is gone: %s", problem)
            self._lost.set()
        return True

    def _register(self) -> None:
        """Register the nodes of the roster's sites that are not out, and no others."""
        if self._superlink.listening.insecure:
            return
        wanted = {key for key, site in self._keys.items() if site not in self._excluded}
        with self._control() as control:
            there = {
                bytes(node.public_key): node.node_id
                for node in control.ListNodes(ListNodesRequest()).nodes_info
                if node.status != NodeStatus.UNREGISTERED
            }
            for key in there.keys() - wanted:
                control.UnregisterNode(UnregisterNodeRequest(node_id=there[key]))
            for key in sorted(wanted - there.keys()):
                try:
                    control.RegisterNode(RegisterNodeRequest(public_key=key, name=self._keys[key]))
                except httpx.HTTPStatusError as problem:
                    # Flower registers no key twice: this one was out under an earlier roster.
                    log.warning(
                        "%s cannot connect (%s); move server/superlink.db away if it should",
                        self._keys[key],
                        problem,
                    )

    def _acquire(self, run: int | None) -> str | None:
        """Take every task that waits; return the token of the run's own, and end all others as failed."""
        mine = None
        with self._runtime(
            "SuperExec",
            SuperExecAuthHttpInterceptor(
                master_secret=self._superlink.superexec.encode(), protected_methods={_ACQUIRE}
            ),
        ) as client:
            everything = AcquireTaskRequest(supported_task_types=list(TaskType))
            while (found := client.AcquireTask(everything)).HasField("task") and found.token:
                if run is not None and found.task.run_id == run and found.task.type == TaskType.SERVER_APP:
                    mine = found.token
                else:
                    self._fail(found.token, found.task.run_id)
        return mine

    def _fail_others(self) -> None:
        self._acquire(None)

    def _fail(self, token: str, run: int) -> None:
        log.warning("run %s is not the coordinator's: it is ended as failed and was not executed", run)
        with self._runtime("flwr-serverapp", RuntimeTokenHttpInterceptor(token)) as client:
            client.PullTaskInput(PullTaskInputRequest())  # Flower ends only tasks that began
            client.PushTaskOutput(
                PushTaskOutputRequest(
                    sub_status=SubStatus.FAILED, details="only the coordinator's own runs are executed here"
                )
            )

    # --- clients --------------------------------------------------------------------------------------------
    def _connect(self) -> None:
        """Open the client of the run's task, with this SuperLink's token and certificate."""
        self._client = self._runtime("flwr-serverapp", RuntimeTokenHttpInterceptor(self._token))

    def _runtime(self, component: str, guard: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient(
            self._superlink.base_url,
            interceptors=[
                _Bearer(self._superlink.token),
                RuntimeVersionHttpInterceptor(component_name=component),
                guard,
            ],
            verify=self._superlink.trust,
            retry_invoker=self._retry_invoker,
        )

    def _control(self) -> ControlHttpClient:
        return ControlHttpClient(
            self._superlink.base_url,
            interceptors=[
                _Bearer(self._superlink.token),
                RuntimeVersionHttpInterceptor(component_name="flwr CLI"),
            ],
            verify=self._superlink.trust,
            retry_invoker=self._retry_invoker,
        )

    def _gone(self, problem: BaseException | None) -> LinkLost:
        self._lost.set()
        self._failures += 1
        if self._failures >= MAX_FAILURES:  # it runs and does not work
            self._superlink.stop()
            self._failures = 0
        why = f" ({type(problem).__name__}: {problem})" if problem else ""
        return LinkLost(f"the SuperLink was lost{why}"[:390])


class _Reply:
    """A reply on its way: its head as the SuperLink checked it, and the objects it is made of."""

    def __init__(self, announced: WireMessage, tree: ObjectTree) -> None:
        self.identifier = announced.metadata.message_id
        self._head = message_from_proto(announced)
        self._arrival = Arrival(tree, who=f"node {self._head.metadata.src_node_id}")

    def is_complete(self, pull: Pull) -> bool:
        """Take what has come, and return whether that is all; an error has come with the head."""
        return self._head.has_error() or self._arrival.is_complete(pull)

    def take(self) -> Message:
        """Return the reply, or in its place an error that says what is wrong with it."""
        if self._head.has_error():
            return self._head
        metadata = self._head.metadata
        try:
            message = self._arrival.message()
            if not message.has_content():
                raise ProtocolError("sent a message without content")
        except ProtocolError as problem:
            return make_message(metadata, error=Error(ErrorCode.UNKNOWN, problem.message))
        return make_message(metadata, content=message.content)


def _key_bytes(line: str) -> bytes:
    key = load_ssh_public_key(line.encode())
    assert isinstance(key, EllipticCurvePublicKey)  # the roster's pattern names the algorithm
    return public_key_to_bytes(key)
