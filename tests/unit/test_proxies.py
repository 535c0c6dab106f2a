"""Between two processes of one machine stands no proxy, whatever the environment says of the way out."""

import os

import httpx
import pytest

from fedfuse_shared.proxies import reach_directly


def test_a_proxy_of_the_environment_is_left_out_on_this_machine_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "internal.example")
    monkeypatch.setenv("no_proxy", "internal.example")
    reach_directly("127.0.0.1")
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "internal.example,127.0.0.1"
    with httpx.Client() as client:
        direct = client._transport_for_url(httpx.URL("https://127.0.0.1:8000/"))
        outside = client._transport_for_url(httpx.URL("https://fl.example.org:8000/"))
        assert direct is client._transport
        assert outside is not client._transport
