"""Everything that decodes bytes from a file or the network, one target each: only typed errors may leave it.

A target is a function of bytes; what it accepts it checks further (one spelling, same bytes back). Seeds are made by
the real encoders when a target is started, so that a fuzzer begins where decoding goes deep.
"""

from __future__ import annotations

import atexit
import io
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support.federation import Federation, Round
from support.ledgers import LedgerBuilder, head_of

from fedfuse_shared.errors import FedfuseError


@dataclass(frozen=True)
class Target:
    """A decoder under test.

    Attributes:
        make: Returns what is called with each input; imports of heavy packages happen in it.
        seeds: Returns valid inputs.
        longest: Longest input tried (bytes).
    """

    make: Callable[[], Callable[[bytes], object]]
    seeds: Callable[[], list[bytes]]
    longest: int = 4096

    def checked(self) -> Callable[[bytes], None]:
        """Return the target as it is fuzzed: typed errors are what is promised, all others are findings."""
        work = self.make()

        def one(data: bytes) -> None:
            try:
                work(data)
            except FedfuseError:
                return

        return one


@cache
def folder() -> Path:
    """A place for targets that read files; in memory where there is such a place."""
    shm = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="fedfuse-fuzz-", dir=shm if shm.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def file_target(load: Callable[[Path], object], name: str, mode: int = 0o600) -> Callable[[bytes], object]:
    path = folder() / name

    def work(data: bytes) -> object:
        path.write_bytes(data)
        path.chmod(mode)
        return load(path)

    return work


@cache
def played() -> Round:
    """A whole small round; its messages are seeds."""
    import numpy as np
    from support.federation import run_round

    federation = Federation.of(3)
    sequence = Round(federation, federation.offer(ring_bits=20))
    run_round(sequence, {n: sequence.words(np.zeros(200)) for n in federation.names})
    return sequence


@cache
def ledger() -> LedgerBuilder:
    builder = LedgerBuilder().enrol()
    builder.round()
    offer = builder.offer()
    builder.refuse(builder.federation.names[0], offer)
    builder.abort(offer)
    return builder


# --- signed messages ----------------------------------------------------------------------------------------
def envelopes() -> Callable[[bytes], object]:
    from fedfuse_shared.envelope import Body, decode, encode, verify

    def kinds(body: type[Body]) -> list[type[Body]]:
        below = [kind for each in body.__subclasses__() for kind in kinds(each)]
        return ([body] if hasattr(body, "kind") else []) + below

    import fedfuse_shared.ledger.records
    import fedfuse_shared.messages  # noqa: F401

    known = sorted(kinds(Body), key=lambda kind: kind.kind)
    key = Federation.of(3).roster.key_of("site00")

    def work(data: bytes) -> None:
        if not data:
            return
        envelope = decode(data[1:], known[data[0] % len(known)], who="a peer")
        if encode(envelope) != data[1:]:
            raise AssertionError("accepted a second spelling")
        verify(envelope, key)

    work.known = known  # type: ignore[attr-defined]
    return work


def envelope_seeds() -> list[bytes]:
    kinds = [kind.kind for kind in envelopes().known]  # type: ignore[attr-defined]
    raws = [*ledger().lines(), *(raw for raw in played().view if raw.startswith(b"{"))]
    found = []
    for raw in raws:
        kind = raw.split(b'"kind":"')[-1].split(b'"')[0].decode()
        found.append(bytes([kinds.index(kind)]) + raw)
    return found


def sessions() -> Callable[[bytes], object]:
    """Messages at live sessions: a refused one changes nothing."""
    from fedfuse_shared.secagg.site import SiteSession

    sequence = played()
    handlers = ("deal", "accept_delivery", "agree", "reveal")
    states = []
    fresh = Round(sequence.federation, sequence.offer)
    names = list(fresh.offer.participants)
    lists = fresh.keys(names)
    states.append(fresh.sites["site00"].state)
    deliveries = fresh.shares(names, lists)
    states.append(fresh.sites["site00"].state)
    import numpy as np

    for name in names:
        fresh.send(name, fresh.words(np.zeros(200)), deliveries[name])
    states.append(fresh.sites["site00"].state)
    fresh.agree(names)
    states.append(fresh.sites["site00"].state)

    def work(data: bytes) -> None:
        if not data:
            return
        place = data[0] % 4
        session = SiteSession(fresh.offer, fresh.federation.identity("site00"), bytes, states[place])
        getattr(session, handlers[place])(data[1:])

    return work


def session_seeds() -> list[bytes]:
    sequence = Round(played().federation, played().offer)
    names = list(sequence.offer.participants)
    lists = sequence.keys(names)
    deliveries = sequence.shares(names, lists)
    import numpy as np

    for name in names:
        sequence.send(name, sequence.words(np.zeros(200)), deliveries[name])
    survivors = sequence.server.survivors()
    for name in names:
        sequence.server.receive_agreement(name, sequence.sites[name].agree(survivors[name]))
    unmasking = sequence.server.unmasking()
    one = "site00"
    messages = (lists[one], deliveries[one], survivors[one], unmasking[one])
    return [bytes([place]) + raw for place, raw in enumerate(messages)]


def server_session() -> Callable[[bytes], object]:
    sequence = Round(played().federation, played().offer)
    raw = {name: sequence.sites[name].advertise() for name in sequence.offer.participants}
    from fedfuse_shared.secagg.server import ServerSession

    def work(data: bytes) -> None:
        server = ServerSession(
            sequence.offer, sequence.federation.roster, sequence.federation.server, lambda n: b"1" * n
        )
        if data[:1] and data[0] % 2:
            for name, keys in raw.items():
                server.receive_keys(name, keys)
            server.key_lists()
            server.receive_dealing("site00", data[1:])
        else:
            server.receive_keys("site00", data[1:])

    return work


def server_seeds() -> list[bytes]:
    sequence = Round(played().federation, played().offer)
    names = list(sequence.offer.participants)
    advertised = sequence.sites["site00"].advertise()
    lists = sequence.keys(names)
    return [b"\0" + advertised, b"\1" + sequence.sites["site00"].deal(lists["site00"])]


# --- small parts --------------------------------------------------------------------------------------------
def packing() -> Callable[[bytes], object]:
    import numpy as np

    from fedfuse_shared.secagg.packing import RING_BITS, add_packed, pack

    def work(data: bytes) -> None:
        if len(data) < 2:
            return
        bits, count = RING_BITS[data[0] % len(RING_BITS)], data[1]
        total = np.zeros(count, np.uint32)
        add_packed(total, data[2:], bits, who="a peer")
        if pack(total, bits) != data[2:]:
            raise AssertionError("accepted a second spelling")

    return work


def packing_seeds() -> list[bytes]:
    import numpy as np

    from fedfuse_shared.secagg.packing import RING_BITS, pack

    words = np.arange(20, dtype=np.uint32) * np.uint32(214013)
    return [bytes([place, 20]) + pack(words, bits) for place, bits in enumerate(RING_BITS)]


def rolls() -> Callable[[bytes], object]:
    from fedfuse_shared.messages import Roll
    from fedfuse_shared.secagg.transcript import members_of, roll

    names = tuple(f"s{n}" for n in range(200))

    def work(data: bytes) -> None:
        if len(data) < 2:
            return
        participants = names[: 3 + data[0] % 190]
        called = Roll(members=data[1:].hex(), items="0" * 64) if len(data) <= 1251 else None
        if called is None:
            return
        if roll(participants, members_of(called, participants), "0" * 64) != called:
            raise AssertionError("accepted a second spelling")

    return work


def secrets() -> Callable[[bytes], object]:
    """Sealed shares, shares, and the states a restarted process reads."""
    from fedfuse_client.round import _Stored
    from fedfuse_shared.crypto.sealing import unseal
    from fedfuse_shared.crypto.shamir import combine
    from fedfuse_shared.secagg.site import SiteState

    def work(data: bytes) -> None:
        if not data:
            return
        kind, rest = data[0] % 4, data[1:]
        if kind == 0:
            unseal(b"k" * 32, rest, "ab" * 32, "a", "b")
        elif kind == 1:
            shares = {n + 1: rest[33 * n : 33 * n + 33] for n in range(len(rest) // 33)}
            combine(shares, who="a")
        elif kind == 2:
            SiteState.load(rest)
        else:
            import pydantic

            try:
                _Stored.model_validate_json(rest)
            except pydantic.ValidationError:
                return  # as Site._load does

    return work


def secret_seeds() -> list[bytes]:
    from fedfuse_shared.crypto.sealing import seal
    from fedfuse_shared.crypto.shamir import split

    sealed = seal(b"k" * 32, b"plain", "ab" * 32, "a", "b", lambda n: b"n" * n)
    shares = split(b"s" * 32, 2, [1, 2, 3], lambda n: b"r" * n)
    state = played().sites["site00"].state.dump()
    return [b"\0" + sealed, b"\1" + b"".join(shares.values()), b"\2" + state]


def parcels() -> Callable[[bytes], object]:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from fedfuse_shared.parcel import pack, unpack

    def value(kind: int, raw: bytes) -> object:
        text = raw.decode("latin-1")
        number = int.from_bytes(raw[:8], "little", signed=True)
        return (raw, text, number, float(number), bool(number), [raw, raw], [text], [number], [], text[:64])[
            kind % 10
        ]

    names = ("context", "body", "leaves", "known", "problem", "other")

    def work(data: bytes) -> None:
        small: dict[str, object] = {}
        rest = data
        while len(rest) >= 3:
            name, kind, size = names[rest[0] % 6], rest[1], rest[2]
            small[name] = value(kind, rest[3 : 3 + size])
            rest = rest[3 + size :]
        records = RecordDict({"fedfuse": ConfigRecord(small)})  # type: ignore[arg-type]
        if data[:1] and data[0] % 3 == 0:
            array = Array("uint8", (len(rest),), "fedfuse.raw" if data[0] % 2 else "other", rest)
            records["vector"] = ArrayRecord({"vector": array})
        parcel = unpack(records, who="a peer")
        if unpack(pack(parcel), who="a peer") != parcel:
            raise AssertionError("a parcel changes when it is packed")

    return work


def parcel_seeds() -> list[bytes]:
    whole = b""
    for place, kind, raw in ((0, 9, b"0" * 64), (1, 0, b"{}"), (2, 5, b"leaf"), (3, 2, b"\1"), (4, 1, b"no")):
        whole += bytes([place, kind, len(raw)]) + raw
    return [whole, b"\0\x09\0" + whole]


def kits() -> Callable[[bytes], object]:
    """What sites, operators and coordinators send each other outside rounds; the first byte says which file."""
    from fedfuse_client.connection import load_connection
    from fedfuse_server.provisioning import load_federation
    from fedfuse_shared.commands import Command, check_command
    from fedfuse_shared.enrolment import check_kit, check_request
    from fedfuse_shared.envelope import decode
    from fedfuse_shared.keyfile import is_node_key, load_node_public

    roster = Federation.with_officers(3).roster
    readers: tuple[Callable[[bytes], object], ...] = (
        lambda data: check_request(data, who="a site"),
        lambda data: is_node_key(data.decode("latin-1")),
        file_target(load_node_public, "node.key"),
        lambda data: check_kit(data, roster, site="site00", who="a kit"),
        file_target(load_connection, "connection.toml"),
        file_target(load_federation, "federation.toml"),
        lambda data: check_command(decode(data, Command, who="a command"), roster),
    )

    def work(data: bytes) -> None:
        if data:
            readers[data[0] % len(readers)](data[1:])

    return work


def kit_seeds() -> list[bytes]:
    from fedfuse_client.home import SiteHome
    from fedfuse_client.joining import initialise
    from fedfuse_shared.commands import Action, Command
    from fedfuse_shared.config.base import COORDINATOR
    from fedfuse_shared.envelope import encode, seal

    shutil.rmtree(folder() / "site", ignore_errors=True)
    home = SiteHome(folder() / "site")
    request = initialise(home, "site00", "lab").read_bytes().rstrip()
    federation = Federation.with_officers(3)
    command = Command(
        federation="lab",
        roster_hash=federation.roster.hash(),
        action=Action.RUN,
        plan_hash="1" * 64,
        site=None,
        reason="",
        nonce="2" * 64,
    )
    settings = (
        b'federation = "lab"\naddress = "a.example:1"\n[coordinators]\nanna = ""\n[run]\nrounds = 1\n'
        b'[run.model]\nclasses = ["a", "b"]\n[run.model.encoders.text]\nname = "hashed-words"\n'
    )
    files = (
        request,
        request.split(b'"node":"')[1].split(b'"')[0],
        home.node_key.read_bytes(),
        request,
        b'address = "a.example:1"\n',
        settings,
        encode(seal(command, COORDINATOR + "ada", federation.coordinator)),
    )
    return [bytes([number]) + content for number, content in enumerate(files)]


# --- the ledger ---------------------------------------------------------------------------------------------
def ledgers() -> Callable[[bytes], object]:
    from fedfuse_shared.ledger.log import read_ledger
    from fedfuse_shared.ledger.verification import verify_ledger

    roster = ledger().federation.roster
    path = folder() / "ledger.jsonl"

    def work(data: bytes) -> None:
        path.write_bytes(data)
        lines = [entry.raw for entry in read_ledger(path)]
        report = verify_ledger(lines, roster, head_of(lines))
        if report.ok and lines and lines != ledger().lines()[: len(lines)]:
            raise AssertionError("a ledger nobody wrote holds")

    return work


def ledger_seeds() -> list[bytes]:
    lines = ledger().lines()
    return [b"".join(line + b"\n" for line in lines[:count]) for count in (1, 3, len(lines))]


def checkpoints() -> Callable[[bytes], object]:
    from fedfuse_shared.ledger.checkpoint import parse_checkpoint, verify_checkpoint

    key = ledger().federation.roster.key_of("@server")

    def work(data: bytes) -> None:
        parse_checkpoint(data)
        verify_checkpoint(data, "lab", key)

    return work


def checkpoint_seeds() -> list[bytes]:
    from fedfuse_shared.ledger.checkpoint import sign_checkpoint

    return [sign_checkpoint(head_of(ledger().lines()), ledger().federation.server)]


# --- files --------------------------------------------------------------------------------------------------
def settings() -> Callable[[bytes], object]:
    from fedfuse_client.policy import load_policy
    from fedfuse_shared.config.federation import RunConfig
    from fedfuse_shared.config.files import load_toml

    path = folder() / "settings.toml"

    def work(data: bytes) -> None:
        path.write_bytes(data[1:])
        if data[:1] and data[0] % 2:
            load_policy(path)
        else:
            load_toml(path, RunConfig)

    return work


def settings_seeds() -> list[bytes]:
    policy = b"""site = "lyon"\nfederation = "lab"\nroster_hash = "%s"\ndata = "."\nmodalities = ["text"]
epsilon_cap = 8.0\ndelta = 1e-5\nmin_participants = 3\nmin_survivors = 3\nmin_threshold = 3\nmin_colluders = 0
trust = ["site"]\nmin_noise_multiplier = 1.0\nmax_sampling_rate = 0.5\nmax_steps_per_round = 1\nmax_clip = 1.0\n"""
    run = b"""rounds = 3\n[model]\nclasses = ["a", "b"]\n[model.encoders.text]\nname = "hashed-words"
[privacy]\nepsilon = 3.0\n[secure_aggregation]\nring_bits = 20\n"""
    return [b"\1" + policy % (b"0" * 64), b"\0" + run]


def keys() -> Callable[[bytes], object]:
    from fedfuse_shared.keyfile import load_key

    return file_target(load_key, "a.key")


def key_seeds() -> list[bytes]:
    from fedfuse_shared.keyfile import create_key

    path = folder() / "seed.key"
    path.unlink(missing_ok=True)
    create_key(path)
    return [path.read_bytes()]


def server_states() -> Callable[[bytes], object]:
    from fedfuse_server.home import ServerState

    return file_target(ServerState.load, "state.safetensors")


def server_state_seeds() -> list[bytes]:
    import numpy as np

    from fedfuse_server.home import ServerState
    from fedfuse_server.optimiser import GlobalModel

    path = folder() / "seed.safetensors"
    ServerState("run", 3, GlobalModel(np.zeros(3, np.float32)), b"{}").save(path)
    return [path.read_bytes()]


def models() -> Callable[[bytes], object]:
    from fedfuse_shared.models import load_model

    return file_target(load_model, "model.safetensors")


def model_seeds() -> list[bytes]:
    import numpy as np
    from support.federation import Federation

    from fedfuse_shared.models import build_model, flatten
    from fedfuse_shared.models.weights import save_model

    config = Federation.of(3).offer().model
    path = folder() / "seed-model.safetensors"
    save_model(path, config, flatten(build_model(config, 0)).astype(np.float32), round_number=1)
    raw = path.read_bytes()
    return [raw[:3000], raw] if len(raw) <= 40_000 else [raw[:3000]]


def manifests() -> Callable[[bytes], object]:
    from fedfuse_client.data.manifest import load_dataset

    place = folder() / "data"
    place.mkdir(exist_ok=True)
    info = b'name = "x"\ntask = "classification"\nclasses = ["a", "b"]\nmodalities = ["text"]\nrecord = "r"\n'

    def work(data: bytes) -> None:
        for old in place.iterdir():
            old.unlink()
        kind = data[0] % 4 if data else 0
        (place / "dataset.toml").write_bytes(data[1:] if kind == 3 else info)
        name = ("manifest.csv", "manifest.jsonl", "manifest.parquet", "manifest.csv")[kind]
        (place / name).write_bytes(b"id,site,split,label,text,image,audio\n" if kind == 3 else data[1:])
        load_dataset(place)

    return work


def manifest_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {
        "id": "r1",
        "site": "a",
        "split": "train",
        "label": "a",
        "text": "words",
        "image": None,
        "audio": None,
    }
    table = io.BytesIO()
    pq.write_table(pa.table({name: pa.array([value], pa.string()) for name, value in row.items()}), table)
    return [
        b"\0id,site,split,label,text,image,audio\nr1,a,train,a,some words,,\nr2,b,test,b,,x.png,\n",
        b'\1{"id":"r1","site":"a","split":"train","label":"a","text":"x","image":null,"audio":null}\n',
        b"\2" + table.getvalue(),
        b'\3name = "x"\ntask = "classification"\nclasses = ["a", "b"]\nmodalities = ["text"]\nrecord = "r"\n',
    ]


def images() -> Callable[[bytes], object]:
    from fedfuse_client.data.decoding import decode_image
    from fedfuse_shared.config.model import ImageInput

    return file_target(lambda path: decode_image(path, ImageInput()), "a.png")


def image_seeds() -> list[bytes]:
    from PIL import Image

    found = []
    for form, mode in (
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("JPEG", "L"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "L"),
    ):
        raw = io.BytesIO()
        Image.new(mode, (9, 7), 3).save(raw, form)
        found.append(raw.getvalue())
    return found


def recordings() -> Callable[[bytes], object]:
    from fedfuse_client.data.decoding import decode_audio
    from fedfuse_shared.config.model import AudioInput

    return file_target(lambda path: decode_audio(path, AudioInput()), "a.wav")


def recording_seeds() -> list[bytes]:
    import numpy as np
    import soundfile

    found = []
    for form in ("WAV", "FLAC", "OGG"):
        raw = io.BytesIO()
        soundfile.write(raw, np.sin(np.arange(300) / 5), 8000, format=form)
        found.append(raw.getvalue())
    return found


def progress() -> Callable[[bytes], object]:
    from fedfuse_simulations.metrics import _read

    return file_target(_read, "progress.jsonl")


def progress_seeds() -> list[bytes]:
    return [
        b'{"round":1,"survivors":["a","b"],"scores":null}\n{"round":1,"site":"a","step":"x","reason":"y"}\n',
        b'{"round":1,"attempt":1,"reason":"y"}\n{"round":',
    ]


TARGETS = {
    "envelopes": Target(envelopes, envelope_seeds),
    "site-sessions": Target(sessions, session_seeds, 16_384),
    "server-session": Target(server_session, server_seeds, 8192),
    "packing": Target(packing, packing_seeds, 512),
    "rolls": Target(rolls, lambda: [b"\5\xff\x01", b"\x20" + b"\xaa" * 5], 64),
    "secrets": Target(secrets, secret_seeds),
    "parcels": Target(parcels, parcel_seeds, 1024),
    "kits": Target(kits, kit_seeds),
    "ledgers": Target(ledgers, ledger_seeds, 65_536),
    "checkpoints": Target(checkpoints, checkpoint_seeds, 1024),
    "settings": Target(settings, settings_seeds, 2048),
    "keys": Target(keys, key_seeds, 512),
    "server-states": Target(server_states, server_state_seeds, 2048),
    "models": Target(models, model_seeds, 65_536),
    "manifests": Target(manifests, manifest_seeds),
    "images": Target(images, image_seeds, 2048),
    "recordings": Target(recordings, recording_seeds),
    "progress": Target(progress, progress_seeds, 1024),
}
