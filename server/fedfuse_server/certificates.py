"""The federation's own certificate authority, and the server's certificate (RFC 5280), by pyca/cryptography.

Sites accept this authority and no other for their connections. That keeps strangers from reading along; what counts
is signed end to end under the roster's keys, whoever holds a certificate.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfuse_shared.errors import ConfigError, StateError

_SKEW: Final = timedelta(hours=1)
"""Certificates begin so much earlier, for clocks that are behind."""
LOCAL: Final = ("localhost", "127.0.0.1")
"""Names by which the coordinator reaches its own SuperLink."""


@dataclass(frozen=True)
class Certified:
    """A private key and its certificate, both in PEM."""

    key: bytes
    certificate: bytes


def make_authority(federation: str, days: int) -> Certified:
    """Return a new authority that signs servers' certificates and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{federation} authority")
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Certified(_pem(key), certificate.public_bytes(Encoding.PEM))


def make_server(authority: Certified, hosts: Sequence[str], days: int) -> Certified:
    """Return a new key and certificate for a server of these host names and addresses.

    Raises:
        ConfigError: a host is neither a name nor an address, or the certificate would outlive its authority.
        StateError: the authority's key or certificate cannot be used.
    """
    try:
        root = x509.load_pem_x509_certificate(authority.certificate)
        signer = load_pem_private_key(authority.key, password=None)
    except (ValueError, TypeError) as problem:
        raise StateError("the authority's key or certificate cannot be read") from problem
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != root.public_key():
        raise StateError("the authority's key does not fit its certificate")
    if datetime.now(UTC) + timedelta(days=days) > root.not_valid_after_utc:
        raise ConfigError(
            f"a server's certificate of {days} days would outlive its authority",
            advice="set certificate.server_days lower, or make a new authority",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general(host) for host in dict.fromkeys((*hosts, *LOCAL))]
    certificate = (
        _builder(_name(hosts[0]), root.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    return Certified(_pem(key), certificate.public_bytes(Encoding.PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as problem:
        raise ConfigError(
            f"{host!r} is neither a host name nor an address", advice="write the name's ASCII form"
        ) from problem


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
