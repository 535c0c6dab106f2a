"""What a hostile site can do to the coordinator by the bytes of a reply: a real SuperLink, and a key of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from contextlib import ExitStack
from http.client import HTTPSConnection

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supernode.fleet_http_connection import http_request_response
from support.served import free_port, three_sites, with_certificates, with_officers

from fedfuse_server import superlink
from fedfuse_server.exchange import Exchange
from fedfuse_server.link import LinkGrid
from fedfuse_server.supervisor import Listening, SuperLink
from fedfuse_shared import arrival
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.messages import Step
from fedfuse_shared.parcel import Parcel, pack

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
BODY = b"an honest answer"


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A SuperLink, the coordinator's end of it, and each site's key."""
    prepared = three_sites(tmp_path_factory.mktemp("review") / "federation")
    keys = with_officers(prepared)
    with_certificates(prepared.home)
    superlink = SuperLink(prepared.home, Listening("127.0.0.1", free_port(), insecure=False))
    grid = LinkGrid(superlink, prepared.home.load_roster().body)
    grid.get_node_ids()
    yield prepared, keys, grid
    grid.finish(completed=True)
    superlink.stop()


class Node:
    """A site's end, as Flower's SuperNode makes it; what it replies is its own affair."""

    def __init__(self, stack, federation, site):
        prepared, keys, grid = federation
        key = load_ssh_private_key(keys[site].read_bytes(), None)
        address = grid._superlink.listening.own_address
        authority = prepared.home.authority.read_bytes()
        connection = http_request_response(address, False, authority, (key, key.public_key()), 2, 10)
        self.number, self._receive, self._send, *_, self._push, _ = stack.enter_context(connection)
        self.objects: dict[str, bytes] = {}
        self.held: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        stack.callback(self._end)

    def _end(self):
        self._done.set()
        self._thread.join()

    def _serve(self):
        while not self._done.wait(0.05):
            if (found := self._receive()) is not None:
                self._reply(found[0])

    def _reply(self, asked):
        """Send a reply, some of its objects replaced by bytes that are none, or kept back."""
        reply = Message(self.content(), reply_to=asked)
        tree, objects = self.forge(reply)
        reply.metadata.__dict__["_message_id"] = tree.object_id
        missing, session = self._send(reply, tree, 0.0)
        for number in set(missing) - self.held:
            self._push(asked.metadata.run_id, session, number, objects[number])

    def content(self):
        return pack(Parcel(body=BODY))

    def forge(self, reply):
        objects = {number: part.deflate() for number, part in get_all_nested_objects(reply).items()}
        return get_object_tree(reply), objects


class Forger(Node):
    """Its reply is one object, with a hash that fits."""

    raw = b""

    def forge(self, reply):
        number = hashlib.sha256(self.raw).hexdigest()
        return ObjectTree(object_id=number), {number: self.raw}


class Multiplier(Node):
    """Its vector's array names one chunk many times."""

    times = 3

    def content(self):
        return pack(Parcel(body=BODY, vector=bytes(2000)))

    def forge(self, reply):
        _, honest = super().forge(reply)
        swapped = {}

        def put(raw, *children):
            number = hashlib.sha256(raw).hexdigest()
            swapped[number] = raw
            return ObjectTree(object_id=number, children=children)

        def made(kind, body, *children):
            head = f"{kind} {','.join(child.object_id for child in children)} {len(body)}"
            return put(head.encode() + b"\0" + body, *children)

        by_kind = {raw.partition(b" ")[0].decode(): raw for raw in honest.values()}
        chunk, config = put(by_kind["ArrayChunk"]), put(by_kind["ConfigRecord"])
        shape = {"dtype": "uint8", "shape": [2000], "stype": "fedfuse.raw"}
        array = made("Array", json.dumps({**shape, "arraychunk_ids": [0] * self.times}).encode(), chunk)
        vector = made("ArrayRecord", json.dumps({"vector": array.object_id}).encode(), array)
        names = {"fedfuse": config.object_id, "vector": vector.object_id}
        records = made("RecordDict", json.dumps(names).encode(), config, vector)
        return made("Message", by_kind["Message"].partition(b"\0")[2], records), swapped


class Withholder(Node):
    """It announces a reply and never sends what it is made of."""

    def forge(self, reply):
        tree, objects = super().forge(reply)
        self.held = set(objects)
        return tree, objects


def ask(federation, hostile, seconds=20.0):
    """Ask a hostile site and an honest one, and return what became of each."""
    grid, answers = federation[2], {}
    with ExitStack() as stack:  # what goes wrong within, Flower only logs: then there are no answers
        bad, good = hostile(stack, federation, "bern"), Node(stack, federation, "lyon")
        parcels = dict.fromkeys((bad.number, good.number), Parcel())
        answers = Exchange(grid, seconds).ask(Step.SETTLE, parcels, "test")
    assert not grid._lost.is_set()
    assert answers[good.number].body == BODY
    return answers[bad.number]


@pytest.mark.parametrize(
    "raw",
    [
        b"Message  3\0\xff\xff\xff",
        b"Message " + b"0" * 64 + b" 0\0",
        b"ArrayRecord  2\0{}",
        b"RecordDict  2\0{}",
        b"Array  2\0[]",
        b"ConfigRecord  1\0\xff",
        b"MetricRecord  0\0",
        b"CustomDataClass  0\0",
    ],
)
def test_a_reply_that_is_none_costs_its_sender_alone(federation, raw):
    answer = ask(federation, type("Forger", (Forger,), {"raw": raw}))
    assert isinstance(answer, ProtocolError)


def test_a_reply_cannot_grow_over_the_limit(federation, monkeypatch):
    assert len(ask(federation, Multiplier).vector) == 6000
    monkeypatch.setattr(arrival, "MAX_BYTES", 5000)
    assert isinstance(ask(federation, Multiplier), ProtocolError)


def test_a_reply_that_never_comes_whole_holds_nobody_up(federation):
    """Flower's own Grid waits for its parts for minutes, whatever the exchange's time is."""
    answer = ask(federation, Withholder, seconds=3.0)
    assert "did not answer in time" in answer.message


def test_small_parts_of_a_reply_are_bounded(federation):
    class Talker(Node):
        def content(self):
            return RecordDict({"fedfuse": ConfigRecord({f"k{n}": 1 for n in range(100)})})

    answer = ask(federation, Talker)
    assert "record" in answer.message


# --- who is not a site at all ---------------------------------------------------------------------------------------
def test_a_stranger_cannot_fill_the_servers_memory(federation, monkeypatch):
    """Flower reads the whole request before it looks at the key; what is over the limit is not even begun."""
    grid = federation[2]
    monkeypatch.setattr(superlink, "MAX_REQUEST", 1000)
    heard = []

    async def app(scope, receive, send):
        while True:
            message = await receive()
            heard.append(len(message.get("body", b"")))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break

    async def request(*chunks, **headers):
        parts = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        said = []

        async def receive():
            return parts.pop(0) if parts else {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            said.append(message.get("status"))

        scope = {"type": "http", "path": "/v1/fleet/push-object", "headers": list(headers.values())}
        await superlink.Gate(app, "token")(scope, receive, send)
        return said, sum(heard)

    assert asyncio.run(request(bytes(900), bytes(100))) == ([], 1000)
    heard.clear()
    assert asyncio.run(request(bytes(900), bytes(900), bytes(900))) == ([], 900)
    heard.clear()
    assert asyncio.run(request(length=(b"content-length", b"1001"))) == ([413, None], 0)
    monkeypatch.undo()
    listening = grid._superlink.listening
    connection = HTTPSConnection(listening.host, listening.port, context=grid._superlink.trust)
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("content-length", str(superlink.MAX_REQUEST + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("host", ["x/v1/runtime/push-object?", "x/?", "x#", "x\\v1\\runtime", "[::1"])
def test_a_host_header_does_not_get_around_the_key(federation, host):
    """Flower asks for a node's key by the path in the URL, routes by another: the two must not come apart."""
    superlink = federation[2]._superlink
    headers = {"content-type": "application/protobuf", "host": host}
    with httpx.Client(verify=superlink.trust, base_url=superlink.base_url) as client:
        for call in ("push-object", "pull-object", "confirm-message-received", "activate-node"):
            answer = client.post(f"/v1/fleet/{call}", headers=headers)
            assert answer.status_code in {400, 401, 415}, answer.text
