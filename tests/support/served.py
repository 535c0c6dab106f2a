"""A small federation as `fedfuse provision` would make it: coordinators, connections' keys, TLS."""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
import socket
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from fedfuse_server.home import RunHome
from fedfuse_shared.config.base import OPERATOR
from fedfuse_shared.crypto.keys import identity_public
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.keyfile import create_key, load_key
from fedfuse_shared.roster import Roster
from support.small_federation import SmallFederation, write_data


def with_officers(federation: SmallFederation) -> dict[str, Path]:
    """Name a coordinator, an auditor and every site's connection in the roster; return the new keys' files."""
    home, folders = federation.home, federation.folders
    keys = home.root.parent / "keys"
    keys.mkdir()
    files = {name: keys / f"{name}.key" for name in ("ada", "eve", *folders)}
    roster = home.load_roster().body
    nodes = {}
    for site in folders:
        key = ec.generate_private_key(ec.SECP384R1())
        files[site].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        files[site].chmod(0o600)
        nodes[site] = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    body = Roster(
        **{
            **roster.model_dump(),
            "coordinators": {"ada": identity_public(create_key(files["ada"]))},
            "auditors": {"eve": identity_public(create_key(files["eve"]))},
            "nodes": nodes,
        }
    )
    signed = encode(seal(body, OPERATOR, load_key(home.root / "server" / "operator.key"))) + b"\n"
    home.roster.write_bytes(signed)
    for folder in folders.values():
        (folder / "roster.json").write_bytes(signed)
        policy = folder / "policy.toml"
        text = re.sub(r'roster_hash = ".*"', f'roster_hash = "{body.hash()}"', policy.read_text())
        policy.write_text(text)
    return files


def with_certificates(home: RunHome) -> None:
    """Write an authority's certificate and the server's, for 127.0.0.1."""
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a federation's authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    now = dt.datetime.now(dt.UTC)

    def certificate(name, key, *extensions):
        builder = x509.CertificateBuilder(issuer, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now).not_valid_after(now + dt.timedelta(days=2))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(authority, SHA256()).public_bytes(Encoding.PEM)

    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    home.authority.write_bytes(certificate(issuer, authority, (x509.BasicConstraints(True, 0), True)))
    home.certificate.write_bytes(certificate(subject, server, (x509.SubjectAlternativeName(names), False)))
    home.certificate_key.touch(0o600)
    home.certificate_key.write_bytes(server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def three_sites(root: Path, **changes: object) -> SmallFederation:
    """A prepared run of three sites: the fourth's rows are not in the manifest."""
    write_data(root / "data")
    manifest = root / "data" / "manifest.csv"
    rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(row for row in rows if ",rome," not in row))
    return SmallFederation(root, {"rounds": 2, **changes})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
