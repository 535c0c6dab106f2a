"""A message over Flower's HTTP, object by object as they come, within limits that are checked before it is built.

Flower keeps a message as a tree of objects named by their hash, and hands out whatever the other end put there: the
name of an object holds, what it says need not. Its own decoders raise whatever bad input makes Python raise, and let
a small message grow to any size. Nothing is executed here, and nothing built but records of numbers, text and bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content

from fedfuse_shared import limits
from fedfuse_shared.errors import ProtocolError

MAX_OBJECTS: Final = 1024
"""Most objects of one message: the longest vector has 205 chunks, and a handful of records around them."""
MAX_SMALL: Final = 96 * 2**20
"""Most bytes of a message's ConfigRecord: a body, and the leaves a site hands over at once."""
MAX_BYTES: Final = 4 * limits.MAX_VECTOR + MAX_SMALL
"""Most bytes of one message."""
_MAX_ITEMS: Final = 16
"""Most entries of a ConfigRecord; a parcel has five."""
_MAX_BODY: Final = {
    "Message": 2**16,
    "RecordDict": 2**16,
    "ArrayRecord": 2**16,
    "Array": 2**16,
    "ConfigRecord": MAX_SMALL,
    "ArrayChunk": MAX_BYTES,
}
"""Kinds of objects a message is made of, and the most bytes of each before it is decoded."""
_ITEM: Final = 0x0A
"""How each entry of a ConfigRecord begins in Protocol Buffers' wire format: field 1, with its length."""

Pull = Callable[[str], PullObjectResponse]


class Arrival:
    """One message on its way.

    Args:
        tree: Its objects, as the other end announced them.
        who: The other end.
    """

    def __init__(self, tree: ObjectTree, *, who: str) -> None:
        self._who = who
        self._root = tree.object_id
        self._missing = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))[::-1]
        self._contents: dict[str, bytes] = {}
        self._room = MAX_BYTES
        self._problem = ""
        if len(self._missing) > MAX_OBJECTS:
            self._problem = f"sent a message of more than {MAX_OBJECTS} objects"
            self._missing = self._missing[-MAX_OBJECTS:]

    def is_complete(self, pull: Pull) -> bool:
        """Take what has come, and return whether that is all of it.

        What is over a limit is waited for but not kept: Flower loses a reply that comes before its message is whole.
        """
        while self._missing:
            found = pull(self._missing[-1])
            if found.object_found and not found.object_available:
                return False
            self._keep(self._missing.pop(), found)
        return True

    def message(self) -> Message:
        """Return the message; what was kept of it is let go.

        Raises:
            ProtocolError: it is too much, or malformed.
        """
        contents, self._contents = self._contents, {}
        if self._problem:
            raise ProtocolError(self._problem, who=self._who)
        try:
            self._check(contents)
            message = inflate_object_from_contents(self._root, contents)
        except ProtocolError:
            raise
        except Exception as problem:
            raise ProtocolError("sent a message that cannot be read", who=self._who) from problem
        if not isinstance(message, Message):
            raise ProtocolError("sent a message that is none", who=self._who)
        return message

    def _keep(self, identifier: str, found: PullObjectResponse) -> None:
        self._room -= len(found.object_content)
        if not found.object_found:
            self._problem = "sent a message of which a part is missing"
        elif self._room < 0:
            self._problem = f"sent a message of more than {MAX_BYTES} bytes"
        if self._problem:
            self._contents.clear()
        else:
            self._contents[identifier] = found.object_content

    def _check(self, contents: dict[str, bytes]) -> None:
        """Refuse objects that would grow when decoded; an array may name the same chunk any number of times."""
        arrays = records = 0
        for content in contents.values():
            validate_object_content(content)
            kind, children, length = get_object_head_values_from_object_content(content)
            if length > _MAX_BODY.get(kind, -1):
                raise ProtocolError(
                    f"sent an object of kind {kind[:20]} that no message needs", who=self._who
                )
            start = len(content) - length
            if kind == "Array":
                chunks = json.loads(content[start:])["arraychunk_ids"]
                arrays += sum(len(contents[children[index]]) for index in chunks)
            elif kind == "ConfigRecord":
                records += 1
                self._check_items(content, start)
            if arrays > MAX_BYTES:
                raise ProtocolError(f"sent arrays of more than {MAX_BYTES} bytes", who=self._who)
            if records > 1:
                raise ProtocolError("sent more than one record of small parts", who=self._who)

    def _check_items(self, content: bytes, at: int) -> None:
        """Count a ConfigRecord's entries: an empty one takes two bytes there, and hundreds once it is decoded."""
        for _ in range(_MAX_ITEMS):
            if at == len(content):
                return
            if content[at] != _ITEM:
                break
            length, shift, at = 0, 0, at + 1
            while True:
                length |= (content[at] & 0x7F) << shift
                shift, at = shift + 7, at + 1
                if not content[at - 1] & 0x80:
                    break
            at += length
        if at != len(content):
            raise ProtocolError(
                f"sent a message with a record of more than {_MAX_ITEMS} entries, or of none", who=self._who
            )
