"""Training without privacy: only where a site's own policy names it, and marked wherever it shows."""

import pytest
from support.small_federation import SITES, SmallFederation

from fedfuse_client.policy import load_policy
from fedfuse_server.events import RoundOpened, RunStopped
from fedfuse_shared.config.base import Trust
from fedfuse_shared.config.files import save_toml
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
NONE = {"rounds": 2, "privacy": {"trust": "none"}}


def test_a_run_without_privacy_says_so_in_its_ledger(tmp_path):
    federation = SmallFederation(tmp_path, NONE)
    federation.run()
    assert len(federation.told(RoundOpened)) == 2
    report = audit(federation.home)
    assert report.ok
    assert {site.trust for site in report.sites} == {Trust.NONE}
    assert {site.epsilon for site in report.sites} == {None}


def test_a_site_that_does_not_name_it_refuses(tmp_path):
    federation = SmallFederation(tmp_path, NONE)
    for folder in federation.folders.values():
        policy = load_policy(folder / "policy.toml")
        save_toml(folder / "policy.toml", policy.model_copy(update={"trust": (Trust.SITE,)}))
    federation.run()
    assert not federation.told(RoundOpened)
    assert federation.told(RunStopped)
    assert all(site.reservations == 0 for site in audit(federation.home).sites)


def test_nothing_private_is_trained_on_the_same_records_afterwards(tmp_path):
    from fedfuse_client.store import SiteStore
    from fedfuse_shared.privacy.accountant import epsilon

    federation = SmallFederation(tmp_path, {**NONE, "rounds": 1})
    federation.run()
    for name in SITES:
        with SiteStore.open(federation.folders[name] / "store.db") as store:
            (dataset,) = [row[0] for row in store._database.rows("SELECT id FROM dataset")]
            assert epsilon(store.spent(dataset), 1e-5) == float("inf")
