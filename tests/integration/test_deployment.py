"""The whole of a deployment, every party a process of its own: TLS, node authentication, three rounds."""

import pytest
from support.deployment import Deployment

from fedfuse_server.status import status_of

pytestmark = pytest.mark.slow


@pytest.fixture
def deployment(tmp_path):
    started = Deployment(tmp_path / "demo", rounds=3)
    yield started
    started.end()
    assert not started.left()


def test_three_rounds_over_tls_with_three_sites_that_answer_for_themselves(deployment):
    deployment.start_sites()
    server = deployment.start_server()
    assert deployment.wait_for_end(server, 300) == 0, (deployment.root / "server-0.log").read_text()[-3000:]

    assert deployment.opened() == [deployment.sites] * 3
    report, charged = deployment.check()
    assert {site.site: site.reservations for site in report.sites} == dict.fromkeys(deployment.sites, 3)
    assert all(site.epsilon <= site.cap for site in report.sites)
    assert {len(contexts) for contexts in charged.values()} == {3}
    status = status_of(deployment.server)
    assert (status.round, status.running) == (3, False)
