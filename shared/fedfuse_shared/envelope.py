"""Signed values: one form for wire messages and ledger leaves alike.

An envelope is the JSON object ``{"author","body","kind","sig","v"}`` in the canonical form of RFC 8785. Its
signature is Ed25519 (RFC 8032) over a domain label, the kind, and the canonical form of the object without
``sig``. Decoding is strict: bounded length, no unknown field, no second spelling of the same value.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer

from fedfuse_shared import limits
from fedfuse_shared.config.base import AuthorName, Frozen, Hex64, Label
from fedfuse_shared.errors import ProtocolError, VerificationError


class Body(Frozen):
    """What an author states; every subclass names its kind."""

    kind: ClassVar[str]


class GrownBody(Body):
    """A body that has fields which older versions do not know.

    They are written only where they differ from their defaults. So what older versions signed still reads, and still
    has one spelling: a default that is spelled out is refused as not canonical.
    """

    added: ClassVar[frozenset[str]]
    """Names of the fields that came after version 0.1."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = whole(self)
        fields = type(self).model_fields
        for name in self.added:
            if getattr(self, name) == fields[name].get_default(call_default_factory=True):
                del dumped[name]
        return dumped


T = TypeVar("T", bound=Body)


class Envelope(Frozen, Generic[T]):
    """A body, who states it, and that author's signature."""

    author: AuthorName
    body: T
    kind: Label
    sig: Hex64
    v: Literal[1]


def canonical(value: Any) -> bytes:
    """Return the RFC 8785 form of a JSON value or pydantic model.

    Raises:
        ProtocolError: the value has no canonical form (NaN, integer beyond 2^53, lone surrogate).
    """
    if isinstance(value, Frozen):
        value = value.model_dump(mode="json")
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError) as problem:
        raise ProtocolError(f"value has no canonical form ({problem})") from problem


def _signed_part(author: str, kind: str, body: Body) -> bytes:
    unsigned = {"author": author, "body": body.model_dump(mode="json"), "kind": kind, "v": 1}
    return limits.LABEL_SIGNATURE + kind.encode() + b"\0" + canonical(unsigned)


def seal(body: T, author: str, key: Ed25519PrivateKey) -> Envelope[T]:
    """Sign a body in an author's name."""
    signature = key.sign(_signed_part(author, body.kind, body))
    signed = cast("type[Envelope[T]]", Envelope[type(body)])  # type: ignore[misc]
    return signed(author=author, body=body, kind=body.kind, sig=signature.hex(), v=1)


def encode(envelope: Envelope[Any]) -> bytes:
    """Return the one byte string that stands for an envelope; also its Merkle leaf and its ledger line."""
    return canonical(envelope)


def decode(raw: bytes, body_type: type[T], *, who: str, limit: int = limits.MAX_MESSAGE) -> Envelope[T]:
    """Parse an envelope of an expected kind; its signature is not yet checked.

    Raises:
        ProtocolError: too long, not JSON, wrong kind, unknown or missing field, value out of bounds, or not in
            canonical form.
    """
    if len(raw) > limit:
        raise ProtocolError(f"message of {len(raw)} bytes is over the limit of {limit}", who=who)
    try:
        envelope = Envelope[body_type].model_validate_json(raw)  # type: ignore[valid-type]
    except (ValidationError, RecursionError) as problem:
        raise ProtocolError(
            f"malformed {body_type.kind} message ({_first_problem(problem)})", who=who
        ) from problem
    if envelope.kind != body_type.kind:
        raise ProtocolError(f"expected a {body_type.kind} message, got {envelope.kind}", who=who)
    if canonical(envelope) != raw:
        raise ProtocolError(f"{body_type.kind} message is not in canonical form (RFC 8785)", who=who)
    return envelope


def verify(envelope: Envelope[Any], public_key: bytes) -> None:
    """Check the signature under an author's public key (32 bytes).

    Raises:
        VerificationError: the signature does not hold.
    """
    signed = _signed_part(envelope.author, envelope.kind, envelope.body)
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(bytes.fromhex(envelope.sig), signed)
    except (InvalidSignature, ValueError) as problem:
        raise VerificationError(
            f"signature of a {envelope.kind} message does not hold",
            who=envelope.author,
            advice="compare the roster's key with the author's",
        ) from problem


def _first_problem(problem: Exception) -> str:
    """Return where and why validation failed, without echoing the peer's bytes."""
    if isinstance(problem, ValidationError):
        first = problem.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"][:6])
        text = f"{place}: {first['msg'][:160]}" if place else first["msg"][:160]
        # A peer names fields as it likes; what it sends must not steer a reader's terminal.
        return "".join(char if char.isprintable() else "?" for char in text)
    return "nested too deeply"
