"""Rounds through the real apps on narrow rings and sparse graphs, and what becomes of secrets after a deadline."""

import time

import pytest
from support.small_federation import SITES, SmallFederation

from fedfuse_client.home import SiteHome
from fedfuse_client.round import Site, close_sites
from fedfuse_client.store import SiteStore
from fedfuse_server.events import RoundOpened, SiteLeftOut
from fedfuse_shared.ledger.records import Policy
from fedfuse_shared.messages import Step
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Stopped(BaseException):
    """Ends a run in the middle of a round, as a crash of the server would."""


@pytest.mark.parametrize(
    "secure",
    [
        {"ring_bits": 20},
        {"ring_bits": 17},
        {"graph": "sparse", "corruption": 0.0, "dropout": 0.0},
        {"graph": "sparse", "colluders": 0, "min_survivors": 4, "ring_bits": 24},
    ],
    ids=str,
)
def test_rounds_are_opened_and_audited(tmp_path, secure):
    federation = SmallFederation(tmp_path, {"rounds": 2, "secure_aggregation": secure})
    federation.run()
    assert [event.survivors for event in federation.told(RoundOpened)] == [SITES, SITES]
    report = audit(federation.home)
    assert report.ok, report.findings


def test_a_site_refuses_a_sparse_graph_its_policy_does_not_name(tmp_path):
    secure = {"graph": "sparse", "corruption": 0.0, "dropout": 0.0}
    federation = SmallFederation(tmp_path, {"rounds": 1, "secure_aggregation": secure})
    policy = federation.folders["lyon"] / "policy.toml"
    policy.write_text(policy.read_text().replace('graphs = [\n    "sparse",\n]', 'graphs = ["complete"]'))
    assert 'graphs = ["complete"]' in policy.read_text()
    federation.run()
    left_out = [event for event in federation.told(SiteLeftOut) if event.site == "lyon"]
    assert "masks on a sparse graph, policy allows complete" in left_out[0].reason


def test_a_narrow_ring_and_the_full_one_open_the_same_sum_up_to_rounding(tmp_path):
    from support.seeded_client import app as seeded

    models = []
    for bits in (32, 20):
        secure = {"ring_bits": bits}
        federation = SmallFederation(tmp_path / str(bits), {"rounds": 1, "secure_aggregation": secure})
        federation.run(federation.grid(app=seeded))
        models.append(federation.told(RoundOpened)[0].published)
    wide, narrow = models
    # The noise of a coordinate has deviation 1 here; twenty bits leave 16,384 steps per unit.
    assert abs(wide - narrow).max() <= 1 / 16_384
    assert (wide != narrow).any()


def test_secrets_of_a_round_that_is_not_finished_in_time_are_erased(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})

    def stop(site, step):
        if step == Step.AGREE:
            raise Stopped
        return False

    with pytest.raises(Stopped):
        federation.run(federation.grid(stop))
    for folder in federation.folders.values():
        path = folder / "store.db"
        with SiteStore.open(path) as store:
            (context,) = store.stored_contexts()
            state = store.load_state(context)[1]
        secret = state[state.index(b'"mask_private":"') + 16 :][:64]
        assert secret in path.read_bytes()

        in_time = Site(SiteHome(folder), clock=lambda: time.time() + 3500)
        in_time.close()
        with SiteStore.open(path) as store:
            assert store.stored_contexts() == [context]

        Site(SiteHome(folder), clock=lambda: time.time() + 3601).close()
        with SiteStore.open(path) as store:
            assert store.stored_contexts() == []
            assert store.is_finished(context)
        assert all(secret not in file.read_bytes() for file in folder.glob("store.db*"))


def test_the_policy_on_the_ledger_names_the_graphs(tmp_path):
    federation = SmallFederation(tmp_path, {"rounds": 1})
    federation.run()
    close_sites()
    with SiteStore.open(federation.folders["oslo"] / "store.db") as store:
        published = store.chain("fedfuse", "oslo").latest(Policy)
    assert published.body.graphs == ("complete",)
