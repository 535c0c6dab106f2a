"""What a site and the operator exchange before the first round: a site's request, and the kit that answers it.

A request proves that its sender holds the key in it. A kit is signed by the operator, whose roster a site pins by a
hash that it learns by another way: who can replace files in transit can only make joining fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Final

from pydantic import Field, StringConstraints

from fedfuse_shared.config.base import OPERATOR, Frozen, Hex32, Label, NodeKey, SiteName, Trust
from fedfuse_shared.config.federation import GraphKind, Lifetime
from fedfuse_shared.config.privacy import Delta, Positive, SamplingRate, Schedule
from fedfuse_shared.envelope import Body, Envelope, decode, verify
from fedfuse_shared.errors import ProtocolError, VerificationError
from fedfuse_shared.keyfile import is_node_key
from fedfuse_shared.offer import SiteCount
from fedfuse_shared.roster import Roster

MAX_REQUEST: Final = 4096
"""Longest request (bytes)."""
MAX_KIT: Final = 64 * 2**10
"""Longest signed part of a kit (bytes)."""

Address = Annotated[
    str,
    StringConstraints(pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*):[0-9]{1,5}$", max_length=300),
]
"""A host name or address (version 6 in brackets) and a port."""


class SiteRequest(Body):
    """A site's wish to be enrolled, under keys that it made itself."""

    kind: ClassVar[str] = "site-request"

    federation: Label
    site: SiteName
    identity: Hex32
    """Public Ed25519 key of everything the site will sign, this included."""
    node: NodeKey
    """Public key of its connections."""


class Terms(Frozen):
    """What the first planned run asks of a site: the tightest bounds of a policy that lets the site take part."""

    rounds: Annotated[int, Field(ge=1)]
    epsilon: Positive
    delta: Delta
    min_participants: SiteCount
    min_survivors: SiteCount
    min_threshold: SiteCount
    min_colluders: SiteCount
    trust: Trust
    min_noise_multiplier: Positive
    max_sampling_rate: SamplingRate
    max_steps_per_round: Annotated[int, Field(ge=1, le=10_000)]
    max_clip: Positive
    graph: GraphKind
    max_lifetime: Lifetime
    schedule: Schedule
    min_evaluation_noise: Positive | None
    model: Hex32
    """``fedfuse_shared.offer.architecture_hash``."""
    plan: Hex32
    """``fedfuse_shared.offer.plan_hash``."""
    bundle: Hex32
    """``fedfuse_shared.bundle.bundle_hash``."""


class Kit(Body):
    """The operator's answer: where the server is, how to know it, and what the run will ask for."""

    kind: ClassVar[str] = "kit"

    roster_hash: Hex32
    site: SiteName
    address: Address
    authority: Annotated[str, Field(max_length=8192)]
    """Certificate of the authority that the server's certificate comes from (PEM)."""
    terms: Terms


def check_request(raw: bytes, *, who: str) -> Envelope[SiteRequest]:
    """Return a request whose sender holds the key in it.

    Raises:
        ProtocolError: malformed, in another site's name, or with a connection's key that is none.
        VerificationError: its signature does not hold.
    """
    envelope = decode(raw, SiteRequest, who=who, limit=MAX_REQUEST)
    if envelope.author != envelope.body.site:
        raise ProtocolError(f"is signed in the name of {envelope.author}, not {envelope.body.site}", who=who)
    if not is_node_key(envelope.body.node):
        raise ProtocolError(
            "has a key of connections that is none, or not as OpenSSH writes it",
            who=who,
            advice="have the site make its own: fedfuse site init",
        )
    verify(envelope, bytes.fromhex(envelope.body.identity))
    return envelope


def check_kit(raw: bytes, roster: Roster, *, site: str, who: str) -> Kit:
    """Return a kit that the operator of a roster signed for a site.

    Raises:
        ProtocolError: malformed.
        VerificationError: for another site or roster, or not signed by the operator.
    """
    envelope = decode(raw, Kit, who=who, limit=MAX_KIT)
    if envelope.author != OPERATOR:
        raise VerificationError("is not signed by the operator", who=who)
    verify(envelope, bytes.fromhex(roster.operator))
    kit = envelope.body
    if kit.roster_hash != roster.hash() or kit.site != site:
        raise VerificationError(
            f"is for site {kit.site} under roster {kit.roster_hash[:16]}…, not for {site} under "
            f"{roster.hash()[:16]}…",
            who=who,
            advice="ask the operator for this site's own kit",
        )
    return kit


def read_bounded(path: Path, limit: int) -> bytes:
    """Return a small file's content without a final newline; a longer one is cut, and does not decode.

    Raises:
        ProtocolError: it cannot be read, or is no regular file.
    """
    try:
        if not path.is_file():
            raise ProtocolError("is not a file", who=str(path), advice="check the path")
        with path.open("rb") as file:
            return file.read(limit + 2).rstrip(b"\n")
    except OSError as problem:
        raise ProtocolError(f"cannot be read ({problem.strerror})", who=str(path)) from problem
