"""A real TLS server on loopback in a thread, and the authority its certificate comes from."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)
Behaviour = Callable[[socket.socket], None]
"""What a server does with a connection whose handshake is over."""


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


class Authority:
    """A certificate authority of its own."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP384R1())
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(_named("authority"))
            .issuer_name(_named("authority"))
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 30 * DAY)
            .not_valid_after(now + 3650 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA384())
        )
        self.pem = self._certificate.public_bytes(Encoding.PEM)

    def issue(
        self, folder: Path, *, name: str = "127.0.0.1", starts: float = -10, ends: float = 365
    ) -> tuple[Path, Path]:
        """Write a server's certificate and key; ``starts`` and ``ends`` are days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        try:
            general: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            general = x509.DNSName(name)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_named("server"))
            .issuer_name(_named("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + starts * DAY)
            .not_valid_after(now + ends * DAY)
            .add_extension(x509.SubjectAlternativeName([general]), critical=False)
            .sign(self._key, hashes.SHA384())
        )
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "tls.crt", folder / "tls.key"
        paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return paths


def says(date: str | None = None, *, ahead: float = 0.0) -> Behaviour:
    """Answer a request with a Date: this machine's, so much ahead of it (seconds), or exactly this text."""

    def behave(peer: socket.socket) -> None:
        peer.recv(4096)
        said = date if date is not None else formatdate(time.time() + ahead, usegmt=True)
        peer.sendall(f"HTTP/1.1 404 Not Found\r\nDate: {said}\r\nContent-Length: 0\r\n\r\n".encode())

    return behave


def sends(*parts: bytes) -> Behaviour:
    """Answer a request with exactly these bytes."""

    def behave(peer: socket.socket) -> None:
        peer.recv(4096)
        for part in parts:
            peer.sendall(part)

    return behave


@contextmanager
def serving(
    certificate: tuple[Path, Path] | None,
    behave: Behaviour,
    *,
    adjust: Callable[[ssl.SSLContext], None] = lambda _: None,
) -> Iterator[str]:
    """Serve on a free port until the block ends, without TLS if there is no certificate; yields the address."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        adjust(context)
    ended = threading.Event()

    def one(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            peer.settimeout(10)
            if context is None:
                behave(peer)
            else:
                with context.wrap_socket(peer, server_side=True) as safe:
                    behave(safe)

    def loop(listening: socket.socket) -> None:
        while True:
            peer, _ = listening.accept()
            if ended.is_set():
                peer.close()
                return
            threading.Thread(target=one, args=(peer,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=loop, args=(listening,), daemon=True)
        thread.start()
        port = listening.getsockname()[1]
        try:
            yield f"127.0.0.1:{port}"
        finally:
            ended.set()
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            thread.join(10)
