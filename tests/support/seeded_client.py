"""A ClientApp that trains with noise and sampling anyone can repeat, so that two engines can be compared.

No package refers to it: it exists in tests alone, and a site that ran it would have no privacy.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from unittest.mock import patch

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfuse_client import learner
from fedfuse_client.app import app as client_app
from fedfuse_shared.privacy.noise import NoiseSource


class SeededClientApp(ClientApp):
    """The real ClientApp, with each site's noise and draws a function of its name and the attempt alone."""

    def __call__(self, message: Message, context: Context) -> Message:
        site = Path(str(context.node_config["home"])).name
        key = hashlib.sha256(f"{site}/{message.metadata.group_id}".encode()).digest()[:16]
        with (
            patch.object(NoiseSource, "fresh", lambda: NoiseSource(key)),
            # The fastest mode may be another in another process, and modes differ in the last bits.
            patch.object(learner, "GRADIENTS", "layers"),
        ):
            return client_app(message, context)


app = SeededClientApp()
