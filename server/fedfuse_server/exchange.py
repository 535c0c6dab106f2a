"""One exchange with many sites over Flower's Grid: who is asked what, and what came back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.messages import Step
from fedfuse_shared.parcel import Parcel, pack, unpack

log = logging.getLogger(__name__)

_MAX_REASON = 400
"""Longest reason of a failure that is passed on (characters)."""
_IN_TIME: Final = "did not answer in time"
_SAID_BY_FLOWER: Final = {
    ErrorCode.MESSAGE_UNAVAILABLE: _IN_TIME,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: _IN_TIME,
    ErrorCode.NODE_UNAVAILABLE: "lost its connection and did not answer",
}
"""What the SuperLink's own errors mean, which name its database and not what became of the site."""


@dataclass(frozen=True)
class Exchange:
    """A way to ask nodes and wait for their answers.

    Attributes:
        grid: Flower's Grid: in-process, Ray or a SuperLink.
        timeout: Seconds an exchange may take; it is each message's time to live as well, so that a late one is
            void.
    """

    grid: Grid
    timeout: float

    def ask(self, step: Step, parcels: Mapping[int, Parcel], group: str) -> dict[int, Parcel | ProtocolError]:
        """Send one parcel to each node and return each node's answer, or what was wrong with it.

        A node that does not answer in time, cannot be reached or fails is told apart from one that answers: its
        value is the ProtocolError that says so.
        """
        sent = {
            node: self.grid.create_message(pack(parcel), step.value, node, group, ttl=self.timeout)
            for node, parcel in parcels.items()
        }
        replies = self.grid.send_and_receive(list(sent.values()), timeout=self.timeout)
        # By what a reply answers: errors that the SuperLink makes itself come from its own node. A message over HTTP
        # has no identifier before it is sent.
        asked = {message.metadata.message_id: node for node, message in sent.items()}
        answers: dict[int, Parcel | ProtocolError] = {
            node: ProtocolError(_IN_TIME, who=f"node {node}") for node in sent
        }
        for reply in replies:
            node = asked.get(reply.metadata.reply_to_message_id)
            if node is None or (reply.metadata.src_node_id != node and not reply.has_error()):
                log.warning(
                    "a reply from node %s, which was not asked, is ignored", reply.metadata.src_node_id
                )
            elif reply.has_error() and reply.error.code in _SAID_BY_FLOWER:
                answers[node] = ProtocolError(_SAID_BY_FLOWER[reply.error.code], who=f"node {node}")
            elif reply.has_error():
                said = "".join(c if c.isprintable() else "?" for c in str(reply.error.reason)[:_MAX_REASON])
                answers[node] = ProtocolError(f"failed: {said}", who=f"node {node}")
            else:
                try:
                    answers[node] = unpack(reply.content, who=f"node {node}")
                except ProtocolError as problem:
                    answers[node] = problem
        return answers
