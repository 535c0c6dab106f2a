"""Flower's SuperLink with nothing open but what sites need: ``python -m fedfuse_server.superlink``.

Stock, everybody who reaches its port may submit runs, register nodes and list both. Here a request is let in if it

1. goes to the Fleet API, whose callers Flower authenticates by their registered keys, or to ``/health``; or
2. carries the token that this process and the coordinator alone know. Flower's Control API asks for it once more, by
   the plugin that Flower has for this.

Flower reads a whole request before it asks who sent it: without the token none is longer than what a site may send.

The token and the secret that guards task acquisition come over standard input and are written nowhere. The process
ends with the one that started it, however that ends.
"""

from __future__ import annotations

import hmac
import json
import os
import ssl
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import uvicorn
from flwr.common.constant import ACCESS_TOKEN_KEY, ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.logger import console_handler
from flwr.superlink.auth_plugin import ControlAuthnPlugin, NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from fedfuse_shared.arrival import MAX_SMALL
from fedfuse_shared.tied import die_with

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OPEN: Final = ("/v1/fleet/", "/health")
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: forward secrecy and authenticated encryption only, as TLS 1.3 has no others."""
MAX_REQUEST: Final = MAX_SMALL + 2**20
"""Longest request without the token (bytes): one object, of which a ConfigRecord is the longest, and its name."""
_MAX_SETUP: Final = 64 * 1024


@dataclass(frozen=True)
class Setup:
    """What the coordinator tells its SuperLink on standard input, as one JSON line."""

    parent: int
    """Process that has to live for this one to live."""
    host: str
    port: int
    database: str
    token: str
    superexec: str
    """Secret of task acquisition."""
    certificate: str | None
    key: str | None
    authority: str | None
    """TLS files; None: plain HTTP, without node authentication, for tests on one machine."""

    def line(self) -> bytes:
        """Return the line."""
        return json.dumps(asdict(self)).encode() + b"\n"


class TokenAuthn(ControlAuthnPlugin):
    """The Control API's gate: one secret token, no logging in."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        """Return that nobody can log in."""
        return None

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Return whether the token is there, and the one account there is."""
        for name, value in metadata:
            given = value if isinstance(value, bytes) else value.encode()
            if name == ACCESS_TOKEN_KEY and hmac.compare_digest(given, self._token):
                return NoOpControlAuthnPlugin().validate_tokens_in_metadata(())
        return False, None

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        """Return no token for anything."""
        del device_code
        return None

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """Return no token for anything."""
        del metadata
        return None, None


class Gate:
    """ASGI: what is not open needs the token, whatever Flower serves there."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with 401."""
        if scope["type"] == "lifespan" or self._has_token(scope):
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            return
        elif not _is_open(scope["path"]):
            await _refuse(send, 401, b"only the coordinator may ask this\n")
        elif _announced(scope) > MAX_REQUEST:
            await _refuse(send, 413, b"too long\n")
        else:
            await self._app(scope, _bounded(receive), send)

    def _has_token(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def _is_open(path: str) -> bool:
    return path == _OPEN[1] or path.startswith(_OPEN[0])


def _announced(scope: Scope) -> int:
    """Return how long a request says it is; uvicorn refuses a length that is none before this."""
    return max((int(value) for name, value in scope["headers"] if name == b"content-length"), default=0)


def _bounded(receive: Receive) -> Receive:
    """Break a request off that turns out to be longer: it need not have announced its length."""
    came = 0

    async def take() -> Message:
        nonlocal came
        message = await receive()
        came += len(message.get("body", b""))
        return message if came <= MAX_REQUEST else {"type": "http.disconnect"}

    return take


async def _refuse(send: Send, status: int, why: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why})


def build(setup: Setup) -> uvicorn.Server:
    """Return the SuperLink, ready to be run."""
    secure = setup.certificate is not None
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=setup.host,
        port=setup.port,
        insecure=not secure,
        certificates=None,  # of Flower's gRPC servers, which are not started
        superexec_auth_secret=setup.superexec.encode(),
        authn_plugin=TokenAuthn(setup.token),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=secure,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=setup.authority,
        ssl_certfile=setup.certificate,
        ssl_keyfile=setup.key,
        database=setup.database,
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    settings = uvicorn.Config(
        Gate(create_app(config, SuperLinkLifespan), setup.token),
        host=setup.host,
        port=setup.port,
        workers=1,
        ws="none",
        log_config=get_uvicorn_log_config(console_handler.level),
        ssl_certfile=setup.certificate,
        ssl_keyfile=setup.key,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    settings.load()
    if settings.ssl is not None:
        settings.ssl.minimum_version = ssl.TLSVersion.TLSv1_2  # 1.3 with whoever speaks it
        settings.ssl.set_ciphers(CIPHERS)
    return uvicorn.Server(settings)


def main() -> None:
    """Read the setup and serve."""
    setup = Setup(**json.loads(sys.stdin.buffer.readline(_MAX_SETUP)))
    die_with(setup.parent)
    os.umask(0o077)
    build(setup).run()


if __name__ == "__main__":
    main()
