"""`fedfuse site preflight`: every check passes on a sound site; each fault is found, with what to do about it."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import sys
import time

import pytest
from support.data_folder import rows, write_manifest
from support.federation import Federation
from support.joined_site import connect, write_site
from support.lone_site import NAME, PEERS
from support.tls_server import Authority, says, sends, serving
from typer.testing import CliRunner

from fedfuse_client.home import SiteHome
from fedfuse_client.leaving import leave
from fedfuse_client.preflight import Finding, State, passed, preflight
from fedfuse_client.run_lock import only_one
from fedfuse_client.server_probe import MAX_HEAD
from fedfuse_client.site_command import app
from fedfuse_client.store import SiteStore
from fedfuse_shared.config.base import OPERATOR
from fedfuse_shared.config.files import save_toml
from fedfuse_shared.envelope import encode, seal
from fedfuse_shared.keyfile import create_node_key

pytestmark = pytest.mark.slow

CHECKS = ["files", "disk", "policy", "roster", "node key", "code", "bundle", "data", "budget", "tls", "clock"]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def federation() -> Federation:
    return Federation((NAME, *PEERS))


@pytest.fixture
def home(tmp_path, federation, authority) -> SiteHome:
    return write_site(tmp_path / "site", federation, authority.pem)


@pytest.fixture
def certificate(tmp_path, authority):
    return authority.issue(tmp_path / "server")


def found(home: SiteHome, **options) -> dict[str, Finding]:
    findings = list(preflight(home, **options))
    assert [finding.check for finding in findings] == CHECKS
    return {finding.check: finding for finding in findings}


def failing(home: SiteHome) -> dict[str, Finding]:
    """What fails without a server; everything else has to pass."""
    findings = found(home, offline=True)
    return {name: finding for name, finding in findings.items() if finding.state is State.FAIL}


def against(home: SiteHome, certificate, behave, limit=10.0, **options) -> dict[str, Finding]:
    with serving(certificate, behave, **options) as address:
        connect(home, address)
        return found(home, limit=limit)


def contents(home: SiteHome) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in home.root.iterdir() if p.is_file()}


# --- a sound site -------------------------------------------------------------------------------------------
def test_a_sound_site_passes_every_check(home, certificate):
    findings = against(home, certificate, says())
    assert {finding.state for finding in findings.values()} == {State.PASS}
    assert findings["tls"].found.startswith("TLSv1.3, certificate for 127.0.0.1 is valid until ")
    assert findings["clock"].found == "agrees with the server's"


def test_it_needs_no_torch_and_changes_nothing(home, certificate):
    before = contents(home)
    program = (
        "import sys; from pathlib import Path; from fedfuse_client.home import SiteHome;"
        "from fedfuse_client.preflight import preflight, passed; import fedfuse_client.status as s\n"
        "h = SiteHome(Path(sys.argv[1])); assert passed(list(preflight(h, offline=True))); s.status(h)\n"
        "assert not {'torch', 'flwr', 'opacus'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, home.root], check=True)
    after = contents(home)
    # SQLite's own, which the last to look cannot remove: an empty log, and the log's index.
    assert after.pop("store.db-wal")[1] == b""
    after.pop("store.db-shm")
    assert after == before


def test_it_may_run_while_the_site_is_at_work(home):
    with only_one(home), home.open_store():
        assert failing(home) == {}


def test_offline_says_what_was_not_checked(home):
    findings = found(home, offline=True)
    assert (findings["tls"].state, findings["clock"].state) == (State.SKIP, State.SKIP)
    assert passed(list(findings.values()))


# --- the server ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("made", "what"),
    [
        ({"ends": -1}, "certificate has expired"),
        ({"starts": 1}, "certificate is not valid yet"),
        ({"name": "fl.example.org"}, "certificate is for another"),
        ({"name": "127.0.0.2"}, "certificate is for another address"),
    ],
)
def test_a_certificate_that_does_not_hold(home, authority, tmp_path, made, what):
    findings = against(home, authority.issue(tmp_path / "other", **made), says())
    assert findings["tls"].state is State.FAIL
    assert what in findings["tls"].found
    assert findings["tls"].advice
    assert findings["clock"].state is State.SKIP  # what is not safe is not asked for the time


def test_a_strangers_certificate(home, tmp_path):
    findings = against(home, Authority().issue(tmp_path / "other"), says())
    assert "is not from the authority in ca.crt" in findings["tls"].found
    assert "somebody else may be answering" in findings["tls"].advice


def test_a_wrong_name_is_refused_even_where_the_machine_trusts_the_authority(home, certificate, monkeypatch):
    # The machine's own authorities do not count, and an environment cannot add any.
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    stranger = Authority()
    home.authority.write_bytes(stranger.pem)
    assert against(home, certificate, says())["tls"].state is State.FAIL


def test_a_certificate_that_soon_expires_is_warned_of(home, authority, tmp_path):
    findings = against(home, authority.issue(tmp_path / "short", ends=20), says())
    assert findings["tls"].state is State.WARN
    assert "new certificate" in findings["tls"].advice
    assert passed(list(findings.values()))


def test_tls_below_1_2_is_refused(home, certificate):
    def old(context: ssl.SSLContext) -> None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1

    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        findings = against(home, certificate, says(), adjust=old)
    assert findings["tls"].state is State.FAIL
    assert "speaks only TLS below 1.2" in findings["tls"].found


def test_tls_1_2_is_enough(home, certificate):
    def older(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    findings = against(home, certificate, says(), adjust=older)
    assert findings["tls"].state is State.PASS
    assert "TLSv1.2" in findings["tls"].found


def test_a_server_without_tls(home):
    findings = against(home, None, sends(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    assert findings["tls"].state is State.FAIL
    assert "answers without TLS" in findings["tls"].found


def test_no_server_at_all(home):
    findings = found(home)
    assert "cannot be reached" in findings["tls"].found
    assert "connection.toml" in findings["tls"].advice


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "a" * 80 + ".example:1"])
def test_an_address_that_cannot_be(home, address):
    connect(home, address)
    assert "cannot be reached" in found(home)["tls"].found


@pytest.mark.parametrize("authority_file", [b"", b"nonsense", b"\xff" * 100_000])
def test_an_authority_that_is_none(home, authority_file):
    home.authority.write_bytes(authority_file)
    assert "holds no certificate" in found(home)["tls"].found


@pytest.mark.parametrize(("ahead", "words"), [(3600, "3600 s behind"), (-3600, "3600 s ahead of")])
def test_a_clock_that_is_an_hour_off(home, certificate, ahead, words):
    clock = against(home, certificate, says(ahead=ahead))["clock"]
    assert clock.state is State.FAIL
    assert words in clock.found.replace("3599", "3600").replace("3601", "3600")
    assert "NTP" in clock.advice


def test_a_clock_a_few_seconds_off_is_borne_and_said(home, certificate):
    clock = against(home, certificate, says(ahead=-10))["clock"]
    assert clock.state is State.PASS
    assert "s ahead of the server's" in clock.found


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: tomorrow\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Mon, 31 Feb 2026 10:00:00 GMT\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Mon, 02 Xyz 2026 10:00:00 GMT\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Mon, 02 Feb 0000 10:00:00 GMT\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Mon, 02 Feb 2026 10:00:00 GMT\r\nDate: Tue, 03 Feb 2026 10:00:00 GMT\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: \x1b[2J\x1b]0;owned\x07\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: " + b"9" * (4 * MAX_HEAD),
        b"\x00" * (4 * MAX_HEAD),
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_tells_no_time(home, certificate, answer):
    findings = against(home, certificate, sends(answer))
    assert findings["tls"].state is State.PASS
    assert findings["clock"].state is State.FAIL
    assert findings["clock"].advice
    assert all(line.isprintable() for line in (findings["clock"].found, findings["clock"].advice))


def test_a_server_that_never_ends_its_answer_is_not_listened_to_for_ever(home, certificate):
    def endless(peer) -> None:
        peer.recv(4096)
        peer.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:  # until the probe has gone
            peer.sendall(b"X-More: and more\r\n" * 100)

    assert against(home, certificate, endless)["clock"].state is State.FAIL


def test_a_server_that_never_speaks_is_waited_for_so_long_and_no_longer(home, certificate):
    def mute(peer) -> None:
        peer.recv(4096)
        peer.recv(4096)  # until the probe has gone

    assert "does not answer over HTTP" in against(home, certificate, mute, limit=0.5)["clock"].found
    findings = against(home, None, mute, limit=0.5)  # not even a handshake
    assert "did not answer within 0.5 s" in findings["tls"].found


# --- the folder ---------------------------------------------------------------------------------------------
def test_a_file_open_to_others_is_named_with_the_command_that_mends_it(home):
    home.node_key.chmod(0o640)
    home.root.chmod(0o755)
    findings = failing(home)
    assert findings["files"].found.endswith("is open to other users, node.key is open to other users")
    assert f"chmod 700 {home.root}" in findings["files"].advice
    assert f"chmod 600 {home.node_key}" in findings["files"].advice
    assert "node key" in findings  # and the key is not used


@pytest.mark.parametrize(
    "name", ["policy.toml", "identity.key", "node.key", "store.db", "roster.json", "ca.crt"]
)
def test_a_link_in_place_of_a_file(home, name):
    path = home.root / name
    path.rename(home.root.parent / name)
    path.symlink_to(home.root.parent / name)
    findings = failing(home)
    assert findings.keys() == {"files"}
    assert findings["files"].found == f"{name} is a link"
    assert "put the file itself" in findings["files"].advice


def test_links_that_go_nowhere_or_in_circles(home):
    for path in (home.policy, home.connection, home.authority, home.store):
        path.unlink()
        path.symlink_to(path)
    home.logs.symlink_to("/proc")
    findings = found(home)
    assert findings["files"].found.count("is a link") == 5
    assert findings["tls"].state is State.FAIL


def test_missing_files_fail_one_check_each_and_stop_none(home):
    for path in list(home.root.iterdir()):
        path.unlink()
    findings = found(home)
    assert "policy.toml is missing" in findings["files"].found
    assert "fedfuse site join" in findings["files"].advice
    assert findings["policy"].state is State.FAIL
    assert findings["roster"].state is State.SKIP
    assert findings["disk"].state is State.PASS


def test_no_folder_at_all(tmp_path):
    findings = found(SiteHome(tmp_path / "nowhere"))
    assert "fedfuse site init" in findings["files"].advice
    assert "No such file" in findings["disk"].found
    assert not passed(list(findings.values()))


def test_a_policy_that_does_not_parse(home):
    home.policy.write_text(home.policy.read_text() + "\nepsilon_kap = 1.0\n")
    findings = failing(home)
    assert findings.keys() == {"policy"}
    assert "unknown key epsilon_kap" in findings["policy"].found
    assert "did you mean epsilon_cap" in findings["policy"].advice


def test_little_room_on_the_disk(home, monkeypatch):
    usage = shutil.disk_usage(home.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * 2**20))
    assert failing(home)["disk"].found == "5 MiB free"


# --- keys and software --------------------------------------------------------------------------------------
def test_a_roster_other_than_the_pinned_one(home, federation):
    other = federation.roster.model_copy(update={"federation": "other"})
    home.roster.write_bytes(encode(seal(other, OPERATOR, federation.operator)))
    findings = failing(home)
    assert "is not the pinned" in findings["roster"].found
    assert "roster_hash" in findings["roster"].advice or "pin its hash" in findings["roster"].advice


def test_a_roster_with_another_key_for_this_site(home, tmp_path, authority):
    other = write_site(tmp_path / "other", Federation((NAME, *PEERS), seed="other"), authority.pem)
    shutil.copy(other.key, home.key)
    assert "another key for this site" in failing(home)["roster"].found


def test_a_node_key_the_roster_does_not_list(home):
    home.node_key.unlink()
    create_node_key(home.node_key)
    finding = failing(home)["node key"]
    assert "the roster lists another key for this site's connection" in finding.found
    assert "request.json" in finding.advice


def test_code_and_bundle_that_were_not_agreed_on(home):
    save_toml(home.policy, home.load_policy().model_copy(update={"code": ("0" * 64,), "bundles": ()}))
    findings = failing(home)
    assert findings.keys() >= {"code", "bundle"}
    assert "every message would be refused" in findings["bundle"].found


def test_code_that_nobody_named_is_warned_of(home):
    save_toml(home.policy, home.load_policy().model_copy(update={"code": ()}))
    home.policy.chmod(0o600)
    findings = found(home, offline=True)
    assert findings["code"].state is State.WARN
    assert passed(list(findings.values()))


# --- data and budget ----------------------------------------------------------------------------------------
def test_problems_of_the_data_are_counted_and_nothing_of_a_record_is_shown(home):
    data = home.load_policy().data
    records = rows(12)
    records[1]["label"] = "Anna Schmidt"
    write_manifest(data, records)
    (data / "images/2.png").write_bytes(b"nothing")
    result = CliRunner().invoke(app, ["preflight", str(home.root), "--offline"])
    assert result.exit_code == 1
    assert "unreadable" in result.stdout
    assert f"fedfuse data check {data}" in result.stdout
    assert not any(secret in result.stdout for secret in ("Anna", "Schmidt", "2.png", "r1", "row"))


def test_data_without_rows_of_this_site(home):
    save_toml(home.policy, home.load_policy().model_copy(update={"dataset_sites": ("nowhere",)}))
    assert "no training rows of nowhere" in failing(home)["data"].found


def test_a_site_that_left(home):
    leave(home, "moving")
    assert "left federation lab for good" in failing(home)["budget"].found


def reserve(home: SiteHome, federation: Federation, **changes) -> None:
    from fedfuse_client.learner import Learner
    from fedfuse_client.policy import SitePolicy

    policy: SitePolicy = home.load_policy()
    with SiteStore.open(home.store) as store:
        chain = store.chain(policy.federation, policy.site)
        dataset = Learner(policy).dataset(store)
        chain.reserve(policy, federation.offer(**changes), dataset, federation.keys[NAME])


def test_the_budget_says_how_many_rounds_are_left(home, federation):
    save_toml(home.policy, home.load_policy().model_copy(update={"epsilon_cap": 4.0}))
    home.policy.chmod(0o600)
    reserve(home, federation)
    finding = found(home, offline=True)["budget"]
    assert finding.state is State.PASS
    assert "of 4 spent" in finding.found
    assert int(finding.found.split(" spent, ")[1].split()[0]) > 3


def test_a_budget_that_is_spent(home, federation):
    reserve(home, federation)
    with SiteStore.view(home.store) as store:
        from fedfuse_client.budget import statements

        spent = statements(store, home.load_policy())[0].epsilon
    save_toml(home.policy, home.load_policy().model_copy(update={"epsilon_cap": spent * 1.001}))
    finding = failing(home)["budget"]
    assert "no more rounds like the last one fit" in finding.found
    assert "raise epsilon_cap" in finding.advice


def test_a_damaged_store(home):
    raw = bytearray(home.store.read_bytes())
    raw[4096:6000] = b"\xff" * 1904
    home.store.write_bytes(raw)
    assert "damaged" in failing(home)["budget"].found


# --- the command --------------------------------------------------------------------------------------------
def test_the_command_prints_a_line_a_check(home, certificate):
    with serving(certificate, says()) as address:
        connect(home, address)
        result = CliRunner().invoke(app, ["preflight", str(home.root)])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split("  ")[1].strip() for line in lines] == CHECKS
    assert all(line.startswith("pass") for line in lines)


def test_the_command_as_json_is_one_object(home):
    result = CliRunner().invoke(app, ["preflight", str(home.root), "--json"])
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert not answer["passed"]
    assert [check["check"] for check in answer["checks"]] == CHECKS
    assert {check["state"] for check in answer["checks"]} == {"pass", "fail", "skip"}


def test_a_wrong_clock_of_this_machine_is_measured_not_guessed(home, certificate):
    with serving(certificate, says()) as address:
        connect(home, address)
        findings = {f.check: f for f in preflight(home, clock=lambda: time.time() + 120)}
    assert findings["clock"].state is State.FAIL
    assert "ahead of the server's" in findings["clock"].found
