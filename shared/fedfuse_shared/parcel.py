"""What travels in one Flower message: signed bytes, ledger leaves and one raw vector, strictly unpacked.

Small parts sit in a ConfigRecord; the vector is one Array in an ArrayRecord, which Flower chunks and never
unpickles. Nothing here is trusted: signatures are checked by whoever unpacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedfuse_shared import limits
from fedfuse_shared.errors import ProtocolError

_RECORD: Final = "fedfuse"
_VECTOR: Final = "vector"
_STYPE: Final = "fedfuse.raw"
_MAX_LEAVES: Final = 10_000
_MAX_KNOWN: Final = 2**53 - 1
_MAX_LEAVES_BYTES: Final = 64 * 2**20
_MAX_PROBLEM: Final = 400


@dataclass(frozen=True)
class Parcel:
    """One message's content.

    Attributes:
        context: The attempt it belongs to; empty outside rounds.
        body: One signed message; empty where the step has none or the site has a problem.
        leaves: Leaves of the site's chain, oldest first.
        known: Sequence number of the site's last leaf on the server's ledger (server to site only).
        vector: Global weights to a site, little-endian float32; from it the masked vector, packed ring words.
        problem: Why a site cannot do the step; empty otherwise.
    """

    context: str = ""
    body: bytes = b""
    leaves: tuple[bytes, ...] = ()
    known: int = 0
    vector: bytes = b""
    problem: str = ""


def pack(parcel: Parcel) -> RecordDict:
    """Return the Flower records of a parcel."""
    small: dict[str, object] = {
        "context": parcel.context,
        "body": parcel.body,
        "leaves": list(parcel.leaves),
        "known": parcel.known,
        "problem": parcel.problem[:_MAX_PROBLEM],
    }
    records = RecordDict({_RECORD: ConfigRecord(small)})  # type: ignore[arg-type]
    if parcel.vector:
        array = Array("uint8", (len(parcel.vector),), _STYPE, parcel.vector)
        records[_VECTOR] = ArrayRecord({_VECTOR: array})
    return records


def unpack(records: RecordDict, *, who: str) -> Parcel:
    """Return the parcel in a peer's records.

    Raises:
        ProtocolError: a part is missing, of another type, or over its limit.
    """
    small = records.config_records.get(_RECORD)
    if small is None:
        raise ProtocolError("sent a message without a fedfuse record", who=who)
    context, body, problem = small.get("context"), small.get("body"), small.get("problem")
    leaves, known = small.get("leaves"), small.get("known")
    if not isinstance(context, str) or len(context) not in (0, 64):
        raise ProtocolError("sent a malformed context", who=who)
    if not isinstance(body, bytes) or len(body) > limits.MAX_MESSAGE:
        raise ProtocolError(f"sent no body of at most {limits.MAX_MESSAGE} bytes", who=who)
    if not isinstance(problem, str) or len(problem) > _MAX_PROBLEM:
        raise ProtocolError("sent a malformed problem", who=who)
    if not isinstance(leaves, list) or len(leaves) > _MAX_LEAVES:
        raise ProtocolError("sent malformed leaves", who=who)
    if not isinstance(known, int) or isinstance(known, bool) or not 0 <= known <= _MAX_KNOWN:
        raise ProtocolError("sent a malformed sequence number", who=who)
    checked = []
    for leaf in leaves:
        if not isinstance(leaf, bytes) or len(leaf) > limits.MAX_SITE_LEAF:
            raise ProtocolError("sent a malformed leaf", who=who)
        checked.append(leaf)
    if sum(map(len, checked)) > _MAX_LEAVES_BYTES:
        raise ProtocolError("sent more leaves than a message may hold", who=who)
    # It is shown and logged: what a peer sends must not steer a reader's terminal.
    shown = "".join(char if char.isprintable() else "?" for char in problem)
    return Parcel(context, body, tuple(checked), known, _vector(records, who), shown)


def _vector(records: RecordDict, who: str) -> bytes:
    record = records.array_records.get(_VECTOR)
    array = record.get(_VECTOR) if record is not None else None
    if array is None:
        return b""
    data = array.data
    if array.stype != _STYPE or len(data) > 4 * limits.MAX_VECTOR:
        raise ProtocolError("sent a malformed vector", who=who)
    return data
