"""Both ends of a deployment's connections: what the server offers, and whom a site believes."""

import json
import shutil
import socket
import ssl
import subprocess
from contextlib import contextmanager, suppress

import pytest
from support.deployment import Deployment, repoint
from support.machines import Machines
from support.tls_server import Authority, serving

from fedfuse_client.home import SiteHome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """A server that waits for its sites, and a site's folder."""
    started = Deployment(tmp_path_factory.mktemp("tls") / "demo")
    started.start_server()
    started.wait(lambda: started.events("SitesAwaited"), 90, 0.2)
    yield started
    started.end()
    assert not started.left()


def handshake(deployment, context):
    with (
        socket.create_connection(("127.0.0.1", deployment.port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        return secure.version(), secure.cipher()[0]


def context_of(deployment):
    return ssl.create_default_context(cafile=str(deployment.server.authority))


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_the_server_speaks_current_versions_with_authenticated_ciphers(deployment, version):
    context = context_of(deployment)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    spoken, cipher = handshake(deployment, context)
    assert spoken == version.replace("_", ".")
    assert "GCM" in cipher or "CHACHA20" in cipher


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_the_server_speaks_no_old_version(deployment, version):
    context = context_of(deployment)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is the server's refusal
    with pytest.raises(ssl.SSLError, match=r"alert|version|closed|EOF"):
        handshake(deployment, context)


def test_the_server_takes_no_cipher_without_authentication(deployment):
    context = context_of(deployment)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AES:!AESGCM:!AESCCM")
    with pytest.raises(ssl.SSLError, match=r"handshake failure|alert|EOF"):
        handshake(deployment, context)


def test_the_server_does_not_answer_without_tls(deployment):
    with socket.create_connection(("127.0.0.1", deployment.port), 10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        plain.settimeout(10)
        with suppress(ConnectionError):
            assert b"200" not in plain.recv(4096)


IMPOSTORS = {
    "stranger": lambda own, folder: Authority().issue(folder),
    "expired": lambda own, folder: own.issue(folder, starts=-10, ends=-1),
    "not yet valid": lambda own, folder: own.issue(folder, starts=1, ends=10),
    "wrong name": lambda own, folder: own.issue(folder, name="elsewhere.example"),
}


@contextmanager
def site_against(deployment, tmp_path, certify):
    """A running site and what a server hears of it, which may have its certificate from the authority it believes."""
    machines = Machines(tmp_path)
    own = Authority()
    shutil.copytree(deployment.homes["bern"].root, tmp_path / "site")
    home = SiteHome(tmp_path / "site")
    home.authority.write_bytes(own.pem)
    heard = []

    def listen(peer):
        heard.append(peer.recv(4096))

    with serving(certify(own, tmp_path / "server"), listen) as address:
        repoint(home, address.rpartition(":")[2])
        try:
            machines.start("site", "fedfuse", "site", "run", str(home.root), "--json-logs")
            yield machines, home, heard
        finally:
            machines.end()


@pytest.mark.parametrize("how", IMPOSTORS)
def test_a_site_sends_nothing_to_a_server_it_cannot_be_sure_of(deployment, tmp_path, how):
    """Its own authority signs, or does not: the name, the time and the signer each have to be right."""
    with site_against(deployment, tmp_path, IMPOSTORS[how]) as (machines, home, heard):
        log = home.logs / "supernode.log"
        machines.wait(lambda: log.exists() and "CERTIFICATE_VERIFY_FAILED" in log.read_text(), 60, 0.2)
    assert heard == []


def test_a_site_talks_to_the_server_it_knows(deployment, tmp_path):
    """So that the silence above is not that of a site which talks to nobody."""
    with site_against(deployment, tmp_path, lambda own, folder: own.issue(folder)) as (machines, _, heard):
        spoken = machines.wait(lambda: [each for each in heard if each.startswith(b"POST")], 60, 0.2)
    assert spoken[0].startswith(b"POST /v1/fleet/")


@pytest.mark.deployment
def test_testssl_finds_nothing_of_weight(deployment, tmp_path):
    """By testssl.sh, which Debian packages; `make test-full` installs it."""
    program = shutil.which("testssl") or shutil.which("testssl.sh")
    assert program, "install testssl.sh: as root, apt-get install testssl.sh"
    report = tmp_path / "report.json"
    subprocess.run(
        [
            *(program, "--quiet", "--warnings", "batch", "--protocols", "--server-defaults", "--vulnerable"),
            *("--add-ca", str(deployment.server.authority), "--jsonfile", str(report)),
            f"https://127.0.0.1:{deployment.port}",
        ],
        capture_output=True,
        timeout=300,
        check=False,
    )
    found = json.loads(report.read_text())
    grave = {line["id"] for line in found if line["severity"] in {"LOW", "MEDIUM", "HIGH", "CRITICAL"}}
    assert {line["id"] for line in found} > {"TLS1_3", "heartbleed", "cert_chain_of_trust"}
    # A private authority has no revocation service: a server is revoked by a new roster.
    assert grave <= {"cert_revocation", "cert_crlDistributionPoints", "DNS_CAArecord"}, grave
