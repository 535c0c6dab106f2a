"""From sites' requests to kits and policies, and everything that can be wrong or hostile on the way."""

import json
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.small_federation import write_data
from typer.testing import CliRunner

from fedfuse_client.code import code_hash
from fedfuse_client.home import SiteHome
from fedfuse_server.certificates import make_authority, make_server
from fedfuse_server.home import RunHome
from fedfuse_server.plan import plan_hash
from fedfuse_shared.bundle import bundle_hash
from fedfuse_shared.cli import app
from fedfuse_shared.config.base import COORDINATOR, OPERATOR
from fedfuse_shared.enrolment import Kit, SiteRequest, check_request
from fedfuse_shared.envelope import canonical, decode, encode, seal
from fedfuse_shared.errors import ConfigError, FedfuseError, ProtocolError, StateError, VerificationError
from fedfuse_shared.keyfile import create_key, load_key, load_node_public
from fedfuse_shared.roster import Roster, check_roster

pytestmark = pytest.mark.slow

SITES = ("bern", "lyon", "oslo")
SETTINGS = """\
federation = "demo"
address = "fl.example.org:8000"

[coordinators]
anna = ""

[auditors]
erik = ""

[certificate]
names = ["10.0.0.7"]

[run]
rounds = 3

[run.model]
classes = ["0", "1"]

[run.model.encoders.text]
name = "hashed-words"

[run.model.encoders.image]
name = "oriented-gradients"
"""


def call(*words, answer=None):
    """Run a command as a person does; what fedfuse raises comes through."""
    done = CliRunner().invoke(app, [str(word) for word in words], input=answer)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three sites' folders, their requests, and the kits made of them; not to be changed."""
    root = tmp_path_factory.mktemp("federation")
    (root / "requests").mkdir()
    for site in SITES:
        assert call("site", "init", root / site, "--site", site, "--federation", "demo").exit_code == 0
        shutil.copy(root / site / "request.json", root / "requests" / f"{site}.json")
    (root / "federation.toml").write_text(SETTINGS)
    assert call("provision", root / "federation.toml", "--out", root / "kits").exit_code == 0
    write_data(root / "data")
    return root


@pytest.fixture
def own(made, tmp_path):
    """A copy to play with."""
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own"


def roster_in(root):
    return check_roster(
        decode((root / "kits/server/roster.json").read_bytes().rstrip(), Roster, who="roster")
    )


def join(root, site="lyon", kit=None, roster_hash=None, *, more=("--yes",), answer=None):
    return call(
        "site",
        "join",
        root / site,
        kit or root / "kits/sites" / site,
        "--roster-hash",
        roster_hash or roster_in(root).hash(),
        "--data",
        root / "data",
        *more,
        answer=answer,
    )


# --- what is made ------------------------------------------------------------------------------------------


def test_the_roster_holds_exactly_the_keys_that_sites_and_officers_have(made):
    roster = roster_in(made)
    for site in SITES:
        home = SiteHome(made / site)
        assert roster.sites[site] == load_key(home.key).public_key().public_bytes_raw().hex()
        assert roster.nodes[site] == load_node_public(home.node_key)
    anna = load_key(made / "kits/coordinator/anna.key").public_key().public_bytes_raw()
    assert roster.author_of(anna) == COORDINATOR + "anna"
    assert set(roster.auditors) == {"erik"}
    assert (
        roster.server
        == load_key(RunHome(made / "kits/server").server_key).public_key().public_bytes_raw().hex()
    )


def test_no_private_key_of_a_site_is_in_the_kits(made):
    for site in SITES:
        for name in ("identity.key", "node.key"):
            secret = (made / site / name).read_bytes()
            body = b"".join(secret.splitlines()[1:-1])
            for path in (made / "kits").rglob("*"):
                assert not path.is_file() or body[:40] not in path.read_bytes().replace(b"\n", b"")
        assert sorted(p.name for p in (made / "kits/sites" / site).iterdir()) == [
            "README.txt",
            "kit.json",
            "roster.json",
        ]


def test_secrets_are_their_owners_alone(made):
    for path in [*made.glob("*/*.key"), *(made / "kits").rglob("*.key")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in (
        made / "lyon",
        made / "kits",
        made / "kits/server",
        made / "kits/server/server",
        made / "kits/operator",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert not list(made.glob(".kits*"))


def test_the_certificate_is_for_the_servers_names_and_nothing_else(made):
    certificate = x509.load_pem_x509_certificate((made / "kits/server/server/tls.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((made / "kits/server/server/ca.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    constraint = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraint.ca, constraint.path_length) == (True, 0)
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=396) < left < timedelta(days=398)


def test_a_certificate_cannot_outlive_its_authority():
    with pytest.raises(ConfigError, match="outlive"):
        make_server(make_authority("demo", 100), ["a.example"], 200)


def test_two_requests_give_one_roster_hash_whatever_their_files_are_called(made):
    """The hash is what people read to each other."""
    hashes = {
        json.loads(p.read_bytes())["body"]["roster_hash"] for p in (made / "kits/sites").glob("*/kit.json")
    }
    assert hashes == {roster_in(made).hash()}
    assert roster_in(made).hash() in (made / "kits/sites/oslo/README.txt").read_text()


# --- joining -----------------------------------------------------------------------------------------------


def test_a_site_that_joins_pins_roster_plan_model_code_and_bundle(own):
    assert join(own).exit_code == 0
    home = SiteHome(own / "lyon")
    policy = home.load_policy()
    config = RunHome(own / "kits/server").load_config()
    assert policy.roster_hash == roster_in(own).hash()
    assert policy.plans == (plan_hash(config, len(SITES)),)
    assert (policy.code, policy.bundles) == ((code_hash(),), (bundle_hash(),))
    assert policy.min_noise_multiplier == config.privacy.noise_multiplier
    assert (policy.epsilon_cap, policy.modalities) == (8.0, ("text", "image"))
    assert home.load_identity(policy).name == "lyon"
    assert home.connection.read_text() == 'address = "fl.example.org:8000"\n'
    assert home.authority.read_bytes() == (own / "kits/server/server/ca.crt").read_bytes()
    for path in own.joinpath("lyon").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.name == "request.json", path


def test_the_sites_own_cap_counts(own):
    assert (
        join(
            own, more=("--yes", "--epsilon-cap", "3.5", "--dataset-site", "a", "--dataset-site", "b")
        ).exit_code
        == 0
    )
    policy = SiteHome(own / "lyon").load_policy()
    assert (policy.epsilon_cap, policy.record_sites) == (3.5, ("a", "b"))


def test_nothing_is_written_without_consent(own):
    before = sorted(path.name for path in (own / "lyon").iterdir())
    done = join(own, more=(), answer="n\n")
    assert done.exit_code == 1
    assert "epsilon_cap" in done.output
    assert sorted(path.name for path in (own / "lyon").iterdir()) == before


def test_a_policy_is_never_overwritten(own):
    join(own)
    before = (own / "lyon/policy.toml").read_bytes()
    with pytest.raises(StateError, match="has a policy already"):
        join(own)
    assert (own / "lyon/policy.toml").read_bytes() == before


def refused(own, error, match, **how):
    """Joining fails, and leaves no policy behind: without one a site does not run."""
    with pytest.raises(error, match=match):
        join(own, **how)
    assert not (own / "lyon/policy.toml").exists()


def test_a_roster_that_is_not_the_one_told_is_refused(own):
    refused(own, VerificationError, "is not the pinned", roster_hash="0" * 64)


def test_another_sites_kit_is_refused(own):
    refused(own, VerificationError, "is for site oslo", kit=own / "kits/sites/oslo")


def test_a_kit_signed_by_the_server_is_refused(own):
    """The server knows addresses and terms, but the operator vouches for them."""
    path = own / "kits/sites/lyon/kit.json"
    kit = decode(path.read_bytes().rstrip(), Kit, who="kit").body
    server = load_key(own / "kits/server/server/server.key")
    path.write_bytes(encode(seal(kit.model_copy(update={"address": "evil.example:1"}), OPERATOR, server)))
    refused(own, VerificationError, "signature of a kit message does not hold")


@pytest.mark.parametrize("field", ["address", "authority"])
def test_a_kit_that_was_changed_in_transit_is_refused(own, field):
    path = own / "kits/sites/lyon/kit.json"
    raw = json.loads(path.read_bytes())
    raw["body"][field] = raw["body"][field].replace("e", "i")
    path.write_bytes(canonical(raw))
    refused(own, VerificationError, "signature of a kit message does not hold")


def test_a_roster_with_another_key_for_this_site_is_refused(own):
    """An operator, or who took the operator's place, cannot speak for a site."""
    operator = load_key(own / "kits/operator/operator.key")
    theirs = create_key(own / "other.key").public_key().public_bytes_raw().hex()
    roster = roster_in(own)
    forged = roster.model_copy(update={"sites": {**roster.sites, "lyon": theirs}})
    (own / "kits/sites/lyon/roster.json").write_bytes(encode(seal(forged, OPERATOR, operator)))
    refused(own, VerificationError, "does not enrol lyon of demo with the keys", roster_hash=forged.hash())


def test_a_roster_with_another_connections_key_is_refused(own):
    operator = load_key(own / "kits/operator/operator.key")
    roster = roster_in(own)
    forged = roster.model_copy(update={"nodes": {s: k for s, k in roster.nodes.items() if s != "lyon"}})
    (own / "kits/sites/lyon/roster.json").write_bytes(encode(seal(forged, OPERATOR, operator)))
    refused(own, VerificationError, "does not enrol lyon of demo with the keys", roster_hash=forged.hash())


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"[" * 100_000, b"0" * 2**20])
@pytest.mark.parametrize("name", ["kit.json", "roster.json"])
def test_garbage_in_a_kit_is_refused(own, name, content):
    (own / "kits/sites/lyon" / name).write_bytes(content)
    refused(own, ProtocolError, "kit|enrolment", roster_hash=roster_in(own).hash())


def test_a_kit_that_is_no_file_is_refused(own):
    (own / "kits/sites/lyon/kit.json").unlink()
    (own / "kits/sites/lyon/kit.json").mkdir()
    refused(own, ProtocolError, "is not a file")


# --- requests ----------------------------------------------------------------------------------------------


def test_a_site_is_not_made_twice(own):
    before = (own / "lyon/identity.key").read_bytes()
    with pytest.raises(StateError, match="not overwritten"):
        call("site", "init", own / "lyon", "--site", "lyon", "--federation", "demo")
    assert (own / "lyon/identity.key").read_bytes() == before


def test_a_site_is_not_made_among_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        call("site", "init", tmp_path, "--site", "lyon", "--federation", "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["@server", "", "a b", "x" * 64, "../up"])
def test_a_name_no_site_can_have_leaves_nothing_behind(tmp_path, name):
    with pytest.raises(ConfigError):
        call("site", "init", tmp_path / "site", "--site", name, "--federation", "demo")
    assert not (tmp_path / "site").exists()


def test_a_request_under_a_key_its_sender_does_not_hold_is_refused(made):
    """Otherwise a stranger could enrol another's key under a name of its own."""
    body = decode((made / "requests/lyon.json").read_bytes().rstrip(), SiteRequest, who="lyon").body
    forged = seal(body, "lyon", Ed25519PrivateKey.generate())
    with pytest.raises(VerificationError, match="does not hold"):
        check_request(encode(forged), who="forged")


def provisioning_fails(own, error, match):
    """Nothing is left that could be taken for a federation."""
    with pytest.raises(error, match=match):
        call("provision", own / "federation.toml", "--out", own / "new")
    assert not (own / "new").exists()
    assert not list(own.glob(".new*"))


def test_a_second_request_of_a_site_is_refused(own):
    shutil.copy(own / "requests/lyon.json", own / "requests/lyon2.json")
    provisioning_fails(own, ConfigError, "second request of lyon")


def test_a_request_with_another_sites_key_is_refused(own):
    """Two sites under one key would be one site that counts twice."""
    home = SiteHome(own / "lyon")
    body = decode(home.request.read_bytes().rstrip(), SiteRequest, who="lyon").body
    twin = seal(body.model_copy(update={"site": "rome"}), "rome", load_key(home.key))
    (own / "requests/rome.json").write_bytes(encode(twin))
    provisioning_fails(own, ConfigError, "has a key of lyon")


def test_a_request_for_another_federation_is_refused(own):
    call("site", "init", own / "rome", "--site", "rome", "--federation", "elsewhere")
    shutil.copy(own / "rome/request.json", own / "requests/rome.json")
    provisioning_fails(own, ConfigError, "asks to join elsewhere, not demo")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 50_000, b"hello"])
def test_garbage_among_the_requests_is_refused_by_name(own, content):
    (own / "requests/rome.json").write_bytes(content)
    provisioning_fails(own, ProtocolError, r"rome\.json|site-request")


def test_two_sites_are_too_few(own):
    (own / "requests/oslo.json").unlink()
    provisioning_fails(own, ConfigError, "2 requests, secure aggregation needs at least 3 sites")


def test_one_key_in_two_roles_is_refused(own):
    key = roster_in(own).sites["lyon"]
    text = (own / "federation.toml").read_text().replace('anna = ""', f'anna = "{key}"')
    (own / "federation.toml").write_text(text)
    provisioning_fails(own, VerificationError, "share one key")


def test_an_officers_key_has_to_be_one(own):
    (own / "federation.toml").write_text(SETTINGS.replace('anna = ""', 'anna = "me"'))
    provisioning_fails(own, ConfigError, "key of coordinator anna is no public key")


def test_an_officers_own_key_is_taken(own):
    key = create_key(own / "anna.key").public_key().public_bytes_raw().hex()
    (own / "federation.toml").write_text(SETTINGS.replace('anna = ""', f'anna = "{key}"'))
    assert call("provision", own / "federation.toml", "--out", own / "new").exit_code == 0
    assert not (own / "new/coordinator").exists()
    roster = check_roster(
        decode((own / "new/server/roster.json").read_bytes().rstrip(), Roster, who="roster")
    )
    assert roster.coordinators == {"anna": key}


def test_kits_are_never_overwritten(own):
    before = (own / "kits/operator/operator.key").read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        call("provision", own / "federation.toml", "--out", own / "kits")
    assert (own / "kits/operator/operator.key").read_bytes() == before


def test_a_federation_without_a_coordinator_is_refused(own):
    (own / "federation.toml").write_text(SETTINGS.replace('anna = ""\n', ""))
    provisioning_fails(own, FedfuseError, "coordinators")


def test_a_model_that_no_site_could_build_is_refused(own):
    (own / "federation.toml").write_text(SETTINGS.replace("oriented-gradients", "oriental-gradients"))
    provisioning_fails(own, ConfigError, "oriental-gradients")


def test_a_plan_without_privacy_is_not_joined(own):
    """Whoever wants that has to write it down, and not to press return."""
    (own / "federation.toml").write_text(SETTINGS + '\n[run.privacy]\ntrust = "none"\n')
    call("provision", own / "federation.toml", "--out", own / "open")
    kit = own / "open/sites/lyon"
    hash_ = json.loads((kit / "kit.json").read_bytes())["body"]["roster_hash"]
    refused(own, ConfigError, "adds no noise", kit=kit, roster_hash=hash_)


def test_a_failure_half_way_leaves_nothing(own, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedfuse_server.provisioning.save_toml", full)  # the last thing that is written
    with pytest.raises(OSError, match="No space"):
        call("provision", own / "federation.toml", "--out", own / "new")
    assert not list(Path(own).glob("*new*"))
