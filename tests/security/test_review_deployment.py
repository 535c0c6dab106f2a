"""What an independent review of the deployment found; each attack is run against the real thing."""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.args import try_obtain_root_certificates
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from support.deployed_site import write_site
from support.federation import Federation
from support.lone_site import Around
from support.served import free_port, three_sites
from support.tls_server import Authority, sends, serving
from typer.testing import CliRunner

from fedfuse_client import join_command, supernode
from fedfuse_client.answers import Fresh
from fedfuse_client.joining import check_noise, policy_for
from fedfuse_client.policy import SitePolicy
from fedfuse_client.run_command import PROGRAM
from fedfuse_server.supervisor import Listening, SuperLink
from fedfuse_shared.cli import app
from fedfuse_shared.config.base import Modality, Trust
from fedfuse_shared.config.federation import GraphKind
from fedfuse_shared.config.privacy import Schedule
from fedfuse_shared.crypto.keys import identity_public
from fedfuse_shared.enrolment import Kit, SiteRequest, Terms, check_request
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.errors import ConfigError, ProtocolError
from fedfuse_shared.keyfile import create_node_key
from fedfuse_shared.tied import tied

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FEDERATION = """\
federation = "demo"
address = "fl.example.org:8000"
coordinators = { anna = "" }

[run]
rounds = 1
model = { classes = ["0", "1"], encoders = { text = { name = "hashed-words" } } }
"""
SHADOW = """\
from pathlib import Path
(Path(__file__).parents[1] / "ran").touch()
raise SystemExit(3)
"""


# --- the folder a command is given in ------------------------------------------------------------------------------
@pytest.fixture
def where(tmp_path, monkeypatch) -> Path:
    """A folder somebody else fills (a kit that came by mail, a data folder, /tmp), and a person works in."""
    folder = tmp_path / "kit"
    for package in ("fedfuse_client", "fedfuse_server", "fedfuse_shared", "flwr"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(SHADOW)
    monkeypatch.chdir(folder)
    return folder


def test_that_folder_would_be_imported_from(where):
    """The attack itself: Python puts the working directory first for ``-m``."""
    assert subprocess.run([sys.executable, "-m", "fedfuse_shared.tied"], check=False).returncode == 3
    assert (where / "ran").exists()


def test_the_supernode_of_a_site_is_not_taken_from_there(where):
    done = subprocess.run(tied([*PROGRAM, "--version"]), capture_output=True, text=True, check=False)
    assert not (where / "ran").exists(), done.stderr
    assert done.stdout.startswith("Flower version")


def test_no_answer_is_computed_by_code_from_there(where, tmp_path):
    home = write_site(tmp_path / "site", Around(), warm=False)
    home.logs.mkdir()
    Fresh(home, home.logs / "answers.log").close()  # asks a process at once
    assert not (where / "ran").exists()


def test_the_superlink_is_not_taken_from_there(where, tmp_path):
    home = three_sites(tmp_path / "federation").home
    superlink = SuperLink(home, Listening("127.0.0.1", free_port(), insecure=True))
    home.logs.mkdir()
    superlink._start()  # not `ensure`, which would try it again and again
    try:
        assert superlink._answers()
    finally:
        superlink.stop()
    assert not (where / "ran").exists()


# --- requests ------------------------------------------------------------------------------------------------------
def request(node: str) -> bytes:
    """A request of an applicant, whole in every other way."""
    key = Ed25519PrivateKey.generate()
    body = SiteRequest(federation="demo", site="bern", identity=identity_public(key), node=node)
    return encode(seal(body, "bern", key))


def test_a_key_of_connections_has_one_spelling(tmp_path):
    """Two spellings were two keys to the operator and one to the server: revoking one site shut the other out."""
    lyon = create_node_key(tmp_path / "node.key")
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = lyon[-3]  # before "=="; only its first two bits count
    copied = lyon[:-3] + digits[digits.index(last) ^ 1] + "=="
    assert load_ssh_public_key(copied.encode()) == load_ssh_public_key(lyon.encode())
    assert check_request(request(lyon), who="request").body.node == lyon
    with pytest.raises(ProtocolError, match="key of connections"):
        check_request(request(copied), who="request")


@pytest.mark.parametrize("text", ["A" * 100, "A" * 184, "A" * 182 + "=="])
def test_a_key_of_connections_that_is_none_is_refused(text):
    """It was found out when the server started: the whole federation had to be provisioned anew."""
    with pytest.raises(ProtocolError, match="key of connections"):
        check_request(request(f"ecdsa-sha2-nistp384 {text}"), who="request")


def test_an_exchanged_request_shows_where_keys_are_compared(tmp_path):
    """Who exchanged a request in transit was enrolled in the site's place, and nobody had anything to compare."""
    requests = tmp_path / "requests"
    requests.mkdir()
    told = {}
    for site in ("bern", "lyon", "oslo"):
        words = ["site", "init", str(tmp_path / site), "--site", site, "--federation", "demo"]
        said = CliRunner().invoke(app, words).output
        told[site] = next(word for word in said.split() if len(word) == 64)
        shutil.copy(tmp_path / site / "request.json", requests / f"{site}.json")
    (requests / "lyon.json").write_bytes(
        encode(
            seal(
                SiteRequest(
                    federation="demo",
                    site="lyon",
                    identity=identity_public(mallory := Ed25519PrivateKey.generate()),
                    node=create_node_key(tmp_path / "mallory.key"),
                ),
                "lyon",
                mallory,
            )
        )
    )
    (tmp_path / "federation.toml").write_text(FEDERATION)
    out = ["--out", str(tmp_path / "kits")]
    shown = CliRunner().invoke(app, ["provision", str(tmp_path / "federation.toml"), *out]).output
    assert {site: f"{key} {site}" in shown for site, key in told.items()} == {
        "bern": True,
        "lyon": False,
        "oslo": True,
    }
    assert f"{identity_public(mallory)} lyon" in shown


# --- what a person agrees to ---------------------------------------------------------------------------------------
SHOWN_ELSEWHERE = {"site", "federation", "roster_hash", "dataset_sites", "warm"}
"""In the title, given by the person, or about nothing but how a process is run."""


def kit(**changes: object) -> Kit:
    values = {
        "rounds": 3,
        "epsilon": 8.0,
        "delta": 1e-5,
        "min_participants": 3,
        "min_survivors": 3,
        "min_threshold": 3,
        "min_colluders": 0,
        "trust": Trust.SITE,
        "min_noise_multiplier": 1.0,
        "max_sampling_rate": 0.1,
        "max_steps_per_round": 5,
        "max_clip": 1.0,
        "graph": GraphKind.COMPLETE,
        "max_lifetime": 3600,
        "schedule": Schedule.FIXED,
        "min_evaluation_noise": None,
        **dict.fromkeys(("model", "plan", "bundle"), "0" * 64),
    }
    terms = Terms(**{**values, **changes})
    return Kit(roster_hash="0" * 64, site="bern", address="[fe80::1]:8000", authority="", terms=terms)


def policy_of(kit: Kit, tmp_path: Path) -> SitePolicy:
    roster = Federation.of(3).roster
    return policy_for(kit.terms, roster, "bern", data=tmp_path, modalities=(Modality.TEXT,))


def test_every_key_of_a_policy_is_shown_before_it_is_agreed_to(tmp_path, capsys, monkeypatch):
    """A sparse graph, released counts and small cohorts came with a kit and were on no line of the table."""
    monkeypatch.setenv("COLUMNS", "200")
    loose = kit(graph=GraphKind.SPARSE, min_evaluation_noise=2.0, schedule=Schedule.FREE)
    policy = policy_of(loose, tmp_path).model_copy(update={"max_epsilon_all_collude": 9.0})
    join_command._show(loose, policy)
    shown = capsys.readouterr().out
    assert [key for key in SitePolicy.model_fields if key not in SHOWN_ELSEWHERE and key not in shown] == []
    assert "TRUST THE SERVER" in shown
    assert "COUNTS OF TEST ROWS LEAVE" in shown
    assert "[fe80::1]:8000" in shown, "not taken for markup"


def test_no_kit_makes_a_site_train_without_noise():
    """Under `none` the cap is never asked, and the table showed it as what bounds the run."""
    with pytest.raises(ConfigError, match="adds no noise"):
        check_noise(kit(trust=Trust.NONE, min_noise_multiplier=1e-9).terms, "demo")


# --- the SuperNode's process ---------------------------------------------------------------------------------------
class Answering(BaseHTTPRequestHandler):
    """Sends whoever asks somewhere else, or notes that it was asked."""

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append(self.path)
        self.send_response(307 if self.server.elsewhere else 200)
        if self.server.elsewhere:
            self.send_header("location", self.server.elsewhere)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_):
        pass


@contextmanager
def answering(elsewhere: str = ""):
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        server.elsewhere, server.asked = elsewhere, []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("ours", [False, True])
def test_a_server_cannot_send_a_site_to_other_machines_of_its_network(ours, monkeypatch):
    monkeypatch.setattr(ProtobufClient, "__init__", ProtobufClient.__init__)  # put back afterwards
    if ours:
        supernode.go_nowhere_else()
    with answering() as (inner, where), answering(f"http://{where}/admin/reboot") as (_, server):
        client = FleetHttpClient.from_server_address(server, True, None, interceptors=[])
        if ours:
            with pytest.raises(httpx.HTTPStatusError):
                client.PullMessages(PullMessagesRequest())
        else:
            client.PullMessages(PullMessagesRequest())
        client.close()
    assert inner.asked == ([] if ours else ["/admin/reboot"])


def test_a_servers_words_neither_fill_nor_steer_the_log():
    record = logging.LogRecord(
        "flwr", logging.INFO, "", 0, "[RUN %s, ROUND %s]", (1, "\x1b[2J\n" * 10**6), None
    )
    assert supernode.shorten(record)
    assert len(record.getMessage()) <= 500
    assert record.getMessage().isprintable()


ARRANGED = """
import logging
from unittest.mock import patch
from fedfuse_client import supernode

def loop():
    from flwr.supercore import log
    from flwr.supernode.fleet_http_client import FleetHttpClient
    made = FleetHttpClient.from_server_address("127.0.0.1:1", True, None, interceptors=[])
    assert not made._client.follow_redirects
    log(logging.ERROR, "%s", chr(27) * 1000)

with patch("flwr.supernode.cli.flower_supernode.flower_supernode", loop):
    supernode.main()
"""


def test_the_real_supernode_is_held_to_both():
    """What `main` arranges, with Flower's own entry point in place of its loop."""
    done = subprocess.run(
        [
            *PROGRAM[:2],
            "-c",
            ARRANGED,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, "it ends with its loop"
    assert "gave up" not in done.stderr
    assert "?" * 500 in done.stderr
    assert "?" * 501 not in done.stderr


@pytest.mark.parametrize(
    ("authority", "name", "reached"),
    [("ours", "127.0.0.1", True), ("other", "127.0.0.1", False), ("ours", "fl.example.org", False)],
)
def test_the_supernodes_connection_is_to_the_kits_authority_and_name_alone(
    authority, name, reached, tmp_path, monkeypatch
):
    """Also where the machine itself trusts the other authority."""
    ours, other = Authority(), Authority()
    (tmp_path / "machine.pem").write_bytes(ours.pem + other.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "machine.pem"))
    (tmp_path / "ca.crt").write_bytes(ours.pem)
    given = argparse.Namespace(root_certificates=str(tmp_path / "ca.crt"), insecure=False)
    certificate = {"ours": ours, "other": other}[authority].issue(tmp_path / "server", name=name)
    with serving(certificate, sends(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")) as address:
        trusted = try_obtain_root_certificates(given, address)
        client = FleetHttpClient.from_server_address(address, False, trusted, interceptors=[])
        if reached:
            client.PullMessages(PullMessagesRequest())
        else:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                client.PullMessages(PullMessagesRequest())
        client.close()
