"""What a server shows to whoever connects: its certificate, its TLS version, its clock; nothing is sent but a HEAD.

Rules kept here:

1. Only the federation's own authority (``ca.crt``) is trusted, never the machine's; below TLS 1.2 nothing is said.
2. What is not safe is not asked for the time.
3. Whatever the other side does, a probe ends: one deadline and a bound on what is read hold for all of it.
4. A peer's words are shown with nothing in them that steers a terminal.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from fedfuse_client.connection import Connection
from fedfuse_shared.enrolment import read_bounded
from fedfuse_shared.errors import ConfigError, FedfuseError, ProtocolError, StateError, VerificationError

LIMIT: Final = 10.0
"""Longest a probe takes once the server's name is found (seconds)."""
MAX_AHEAD: Final = 30.0
"""Most that this machine's clock may differ from the server's (seconds)."""
MAX_HEAD: Final = 2**14
"""Most that is read of an answer (bytes)."""
_MAX_AUTHORITY: Final = 2**16
_MAX_SHOWN: Final = 100
_DATE: Final = re.compile(
    rb"\A[ \t]*([A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT)[ \t]*\Z"
)
"""The one form of a date that HTTP servers may send (RFC 9110, section 5.6.7)."""

_REFUSALS: Final = {
    9: "is not valid yet",
    10: "has expired",
    62: "is for another name",
    64: "is for another address",
}
"""What is wrong with a certificate, by OpenSSL's number; whatever else: it is not from ``ca.crt``."""
_CLOCKS: Final = frozenset({9, 10})
_OLD: Final = frozenset({"TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"})
_PLAIN: Final = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"})


@dataclass(frozen=True)
class Reached:
    """A server whose certificate holds.

    Attributes:
        version: Of TLS, as agreed.
        names: The certificate's.
        expires: When the certificate does.
        ahead: How far this machine's clock is ahead of the server's (seconds, to about one); None: not known.
        no_time: Why it is not known.
    """

    version: str
    names: tuple[str, ...]
    expires: datetime
    ahead: float | None
    no_time: FedfuseError | None


def probe(
    connection: Connection,
    authority: Path,
    *,
    limit: float = LIMIT,
    clock: Callable[[], float] = time.time,
) -> Reached:
    """Connect to a server, check its certificate, and ask it for the time.

    Args:
        connection: Where it is.
        authority: File of the only authority that is trusted (PEM).
        limit: Longest it may take (seconds).
        clock: This machine's (seconds since 1970).

    Raises:
        ProtocolError: ``ca.crt`` cannot be read.
        ConfigError: ``ca.crt`` holds no certificate.
        VerificationError: the server is not the one it should be, or not safe to talk to.
        StateError: it cannot be reached, or does not answer.
    """
    host, _, port = connection.address.rpartition(":")
    host = host.strip("[]")
    context = _context(authority)
    deadline = time.monotonic() + limit
    try:
        with (
            socket.create_connection((host, int(port)), timeout=limit) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            certificate = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
            version = tls.version() or "unknown"
            try:
                ahead, no_time = _ahead(tls, connection.address, deadline, clock), None
            except FedfuseError as problem:
                ahead, no_time = None, problem
    except ssl.SSLCertVerificationError as problem:
        raise _refused(problem, connection.address) from problem
    except ssl.SSLError as problem:
        raise _unsafe(problem, connection.address) from problem
    except TimeoutError as problem:
        raise _silent(connection.address, limit) from problem
    except (OSError, OverflowError, UnicodeError) as problem:
        raise StateError(
            f"cannot be reached ({getattr(problem, 'strerror', None) or type(problem).__name__})",
            who=connection.address,
            advice="check the address in connection.toml, the network and the firewall; is the server running?",
        ) from problem
    return Reached(version, _names(certificate), certificate.not_valid_after_utc, ahead, no_time)


def check_clock(server: Reached) -> str:
    """Return in words how far this machine's clock is from the server's.

    Raises:
        StateError: further than is borne, or the server's time is not known.
        ProtocolError: the server told no time that can be read.
    """
    if server.ahead is None:
        raise server.no_time or StateError("the server's time is not known")
    off = abs(server.ahead)
    said = f"this machine's clock is {off:.0f} s {'ahead of' if server.ahead > 0 else 'behind'} the server's"
    if not off <= MAX_AHEAD:
        raise StateError(
            f"{said}, at most {MAX_AHEAD:g} s are borne",
            advice="set this machine's clock (by NTP); if it is right, tell the operator",
        )
    return said if off >= 1 else "agrees with the server's"


def authority_expires(authority: Path) -> datetime:
    """Return when the federation's authority expires.

    Raises:
        ProtocolError: the file cannot be read.
        ConfigError: it holds no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(read_bounded(authority, _MAX_AUTHORITY)).not_valid_after_utc
    except ValueError as problem:
        raise _no_authority(authority) from problem


def printable(text: str) -> str:
    """Return a peer's words so that they cannot steer a reader's terminal, and not too many of them."""
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_SHOWN])


def _context(authority: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # it asks for a certificate and compares names
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=read_bounded(authority, _MAX_AUTHORITY).decode("ascii"))
    except (ssl.SSLError, ValueError) as problem:
        raise _no_authority(authority) from problem
    return context


def _no_authority(path: Path) -> ConfigError:
    return ConfigError(
        "holds no certificate", who=str(path), advice="take ca.crt from the kit the operator sent"
    )


def _ahead(tls: ssl.SSLSocket, address: str, deadline: float, clock: Callable[[], float]) -> float:
    """Return how far this machine's clock is ahead of the one in the answer's Date (seconds).

    Raises:
        StateError: no whole answer came in time.
        ProtocolError: it is no answer of HTTP, or says no time.
    """
    asked = clock()
    head = _head(tls, address, deadline)
    # A Date is cut to whole seconds, and was written somewhere between the question and the answer.
    return (asked + clock()) / 2 - (_date(head, address) + 0.5)


def _head(tls: ssl.SSLSocket, address: str, deadline: float) -> bytes:
    head = b""
    try:
        tls.settimeout(max(0.01, deadline - time.monotonic()))
        tls.sendall(f"HEAD / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode("ascii"))
        while b"\r\n\r\n" not in head:
            left = deadline - time.monotonic()
            if left <= 0 or len(head) > MAX_HEAD:
                break
            tls.settimeout(left)
            more = tls.recv(MAX_HEAD)
            if not more:
                break
            head += more
    except OSError:  # of TLS too: whatever came is judged
        pass
    if not head:
        raise StateError(
            "does not answer over HTTP", who=address, advice="ask the operator what listens there"
        )
    return head


def _date(head: bytes, address: str) -> float:
    lines = head[:MAX_HEAD].partition(b"\r\n\r\n")[0].split(b"\r\n")
    if not lines[0].startswith(b"HTTP/1."):
        raise ProtocolError("does not speak HTTP", who=address, advice="check the address in connection.toml")
    said = [
        value for name, _, value in (line.partition(b":") for line in lines[1:]) if name.lower() == b"date"
    ]
    found = _DATE.match(said[0]) if len(said) == 1 else None
    try:
        if found is not None:
            return parsedate_to_datetime(found[1].decode("ascii")).timestamp()
    except (ValueError, TypeError, OverflowError):
        pass  # the thirty-first of February
    raise ProtocolError(
        "does not say what time it is" if not said else "sends a Date that is none",
        who=address,
        advice="compare this machine's clock with the operator's by hand",
    )


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return tuple(
        printable(str(name.value)) for name in found if isinstance(name, x509.DNSName | x509.IPAddress)
    )


def _refused(problem: ssl.SSLCertVerificationError, address: str) -> VerificationError:
    what = _REFUSALS.get(problem.verify_code, "is not from the authority in ca.crt")
    if problem.verify_code in _CLOCKS:
        advice = "if this machine's clock is right, the operator has to renew it"
    elif problem.verify_code in _REFUSALS:
        advice = "connect by a name the certificate has, or ask the operator for one with this name"
    else:
        advice = "somebody else may be answering: send nothing, and ask the operator; is ca.crt from the newest kit?"
    return VerificationError(f"certificate {what}", who=address, advice=advice)


def _unsafe(problem: ssl.SSLError, address: str) -> FedfuseError:
    if problem.reason in _OLD:
        return VerificationError(
            "speaks only TLS below 1.2", who=address, advice="the operator has to allow TLS 1.2 or 1.3"
        )
    if problem.reason in _PLAIN:
        return VerificationError(
            "answers without TLS", who=address, advice="check the port; the operator has to switch TLS on"
        )
    return VerificationError(
        f"breaks off the TLS handshake ({printable(problem.reason or type(problem).__name__)})",
        who=address,
        advice="ask the operator what listens there",
    )


def _silent(address: str, limit: float) -> StateError:
    return StateError(
        f"did not answer within {limit:g} s",
        who=address,
        advice="check the address in connection.toml, the network and the firewall; is the server running?",
    )
