"""What an operator sees of a site's budget, and what is in a backup of its store."""

import json
import subprocess
import sys

import pytest
from support.small_federation import SmallFederation

from fedfuse_client.budget import statements
from fedfuse_client.home import SiteHome
from fedfuse_client.round import close_sites
from fedfuse_client.store import SiteStore
from fedfuse_shared.errors import StateError
from fedfuse_shared.messages import Step
from fedfuse_shared.privacy.accountant import epsilon
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Stopped(BaseException):
    """Ends a run in the middle of a round."""


@pytest.fixture(scope="module")
def spent(tmp_path_factory):
    """A federation that trained three rounds under a cap that leaves room for some more."""
    federation = SmallFederation(
        tmp_path_factory.mktemp("budget"), {"rounds": 3, "privacy": {"epsilon": 6.0, "noise_multiplier": 4.0}}
    )
    federation.run()
    close_sites()
    return federation


def statement_of(federation, site):
    home = SiteHome(federation.folders[site])
    with home.open_store() as store:
        (found,) = statements(store, home.load_policy())
    return found


def test_the_statement_is_what_the_audit_says_and_counts_by_federation(spent):
    found = statement_of(spent, "lyon")
    audited = {site.site: site for site in audit(spent.home).sites}["lyon"]
    assert found.epsilon == pytest.approx(audited.epsilon, abs=1e-12)
    assert found.cap == 6.0
    (share,) = found.shares
    assert (share.federation, share.rounds, share.steps) == ("fedfuse", 3, 3)
    assert share.epsilon == found.epsilon == found.curve[-1][1]
    assert [place for place, _ in found.curve] == [1, 2, 3]
    assert [value for _, value in found.curve] == sorted(value for _, value in found.curve)


def test_as_many_more_rounds_as_said_fit_and_not_one_more(spent):
    found = statement_of(spent, "oslo")
    home = SiteHome(spent.folders["oslo"])
    with home.open_store() as store:
        (charge,) = store.reservations(found.datasets[0])[-1].charges
    assert found.more_rounds > 1

    def cost(rounds):
        return epsilon([charge.model_copy(update={"steps": rounds * charge.steps})], found.delta)

    assert cost(3 + found.more_rounds) <= found.cap < cost(4 + found.more_rounds)


def run(*arguments):
    code = "import sys; from fedfuse_shared.cli import main; sys.argv[0] = 'fedfuse'; main()"
    command = [sys.executable, "-W", "ignore", "-c", code, "site", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_shows_it_without_torch(spent):
    folder = spent.folders["bern"]
    done = run("budget", folder)
    assert done.returncode == 0, done.stderr
    assert "epsilon" in done.stdout
    assert "more rounds like the last one fit under the cap" in done.stdout
    found = json.loads(run("budget", folder, "--json").stdout)
    assert found["site"] == "bern"
    assert found["budgets"][0]["shares"][0]["rounds"] == 3
    check = "import sys, fedfuse_client.site_command, fedfuse_client.budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_folder_that_is_no_site_is_one_line(tmp_path):
    done = run("budget", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_site_that_never_trained_has_nothing_to_show(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    done = run("budget", federation.folders["rome"])
    assert "nothing was ever charged" in done.stdout


def test_a_backup_holds_what_was_spent_and_no_secret_of_a_round(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})

    def stop(site, step):
        if step == Step.AGREE:
            raise Stopped
        return False

    with pytest.raises(Stopped):
        federation.run(federation.grid(stop))
    close_sites()
    folder, target = federation.folders["lyon"], tmp_path / "lyon.backup"
    with SiteStore.open(folder / "store.db") as store:
        (context,) = store.stored_contexts()
        state = store.load_state(context)[1]
        pools = store.pools()
    secret = state[state.index(b'"mask_private":"') + 16 :][:64]

    done = run("backup", folder, target)
    assert done.returncode == 0, done.stderr
    assert secret in (folder / "store.db").read_bytes()
    assert secret not in target.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o600
    with SiteStore.open(target) as copy:
        assert copy.pools() == pools
        assert len(copy.reservations(pools[0][0])) == 1
        assert copy.is_finished(context)
        with pytest.raises(StateError, match="is finished here"):
            copy.save_step(context, Step.AGREE.value, b"", b"")
    before = target.read_bytes()
    again = run("backup", folder, target)
    assert again.returncode == 1
    assert "is not overwritten" in again.stderr
    assert target.read_bytes() == before
