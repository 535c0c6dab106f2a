"""What server and site agree on; imports neither of them."""

import os

# Nothing this project starts reports home: set before Flower is first imported, kept where somebody chose otherwise.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
