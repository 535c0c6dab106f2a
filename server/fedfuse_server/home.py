"""A run's folder: what is in it, and the durable state a stopped server goes on from.

======================  =====================================================
``config.toml``         the run's settings, noise multiplier included
``roster.json``         who takes part, signed by the operator
``ledger.jsonl``        every offer, reservation, receipt and close
``ledger.checkpoint``   signed size and root of the ledger
``model/``              the published global model and its card
``server/``             the server's key and its state between rounds (0700)
======================  =====================================================
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedfuse_server.optimiser import GlobalModel, Vector
from fedfuse_shared import limits
from fedfuse_shared.config.federation import RunConfig
from fedfuse_shared.config.files import load_toml
from fedfuse_shared.config.model import ModelConfig
from fedfuse_shared.envelope import Envelope, decode
from fedfuse_shared.errors import StateError
from fedfuse_shared.files import write_durably
from fedfuse_shared.keyfile import load_key
from fedfuse_shared.roster import Roster, check_roster


@dataclass(frozen=True)
class RunHome:
    """The paths of one run's folder, and how to read and write what lies there."""

    root: Path

    @property
    def config(self) -> Path:
        """The run's settings."""
        return self.root / "config.toml"

    @property
    def roster(self) -> Path:
        """The signed roster."""
        return self.root / "roster.json"

    @property
    def ledger(self) -> Path:
        """The ledger."""
        return self.root / "ledger.jsonl"

    @property
    def model_file(self) -> Path:
        """The published model."""
        return self.root / "model" / "model.safetensors"

    def publish(self, config: ModelConfig, weights: Vector, *, round_number: int) -> None:
        """Write the published model, weights of shape ``(d,)``, as safetensors with a JSON card beside it.

        Raises:
            OSError: the disk is full; the model before stands.
        """
        from fedfuse_shared.models import save_model  # noqa: PLC0415 - imports torch

        self.model_file.parent.mkdir(exist_ok=True)
        card = save_model(self.model_file, config, weights, round_number=round_number)
        write_durably(self.model_file.with_name("card.json"), card.model_dump_json(indent=2).encode() + b"\n")

    @property
    def server_key(self) -> Path:
        """The server's signing key."""
        return self.root / "server" / "server.key"

    @property
    def certificate(self) -> Path:
        """The server's TLS certificate (PEM)."""
        return self.root / "server" / "tls.crt"

    @property
    def certificate_key(self) -> Path:
        """The key of that certificate (PEM)."""
        return self.root / "server" / "tls.key"

    @property
    def authority(self) -> Path:
        """The certificate of the federation's authority, which every site has as well (PEM)."""
        return self.root / "server" / "ca.crt"

    @property
    def logs(self) -> Path:
        """What processes of the server write as they run."""
        return self.root / "logs"

    @property
    def lock(self) -> Path:
        """Held by the running server."""
        return self.root / "server" / "run.lock"

    @property
    def standing(self) -> Path:
        """What the running server last said of itself."""
        return self.root / "server" / "standing.json"

    @property
    def commands(self) -> Path:
        """Where signed commands wait for the running server."""
        return self.root / "server" / "commands"

    @property
    def state(self) -> Path:
        """The server's state between rounds."""
        return self.root / "server" / "state.safetensors"

    def load_config(self) -> RunConfig:
        """Return the run's settings.

        Raises:
            ConfigError: they are missing or wrong.
        """
        return load_toml(self.config, RunConfig)

    def load_roster(self) -> Envelope[Roster]:
        """Return the signed roster, its signature checked.

        Raises:
            StateError: the file cannot be read.
            ProtocolError: it is malformed.
            VerificationError: its signature does not hold.
        """
        try:
            raw = self.roster.read_bytes()[: limits.MAX_MESSAGE + 1]
        except OSError as problem:
            raise StateError(f"roster cannot be read ({problem.strerror})", who=str(self.roster)) from problem
        envelope = decode(raw.rstrip(b"\n"), Roster, who=str(self.roster))
        check_roster(envelope)
        return envelope

    def load_key(self) -> Ed25519PrivateKey:
        """Return the server's signing key.

        Raises:
            StateError: it is missing or open to others.
        """
        return load_key(self.server_key)


@dataclass(frozen=True)
class ServerState:
    """What the server knows between two rounds."""

    run: str
    round: int
    """The last round that was opened; 0 before the first."""
    model: GlobalModel
    close: bytes = b""
    """The signed close of that round: on disk with the model it states, before it is on the ledger."""

    def save(self, path: Path) -> None:
        """Write the state durably.

        Raises:
            OSError: the disk is full.
        """
        tensors = {
            "weights": self.model.weights,
            "published": self.model.published,
            "first": self.model.first,
            "second": self.model.second,
        }
        card = {"run": self.run, "round": str(self.round), "steps": str(self.model.steps)}
        card["close"] = self.close.decode()
        write_durably(path, save_tensors(tensors, metadata=card))

    @classmethod
    def load(cls, path: Path) -> ServerState:
        """Return a state that was saved.

        Raises:
            StateError: the file is missing or damaged.
        """
        try:
            raw = path.read_bytes()
            tensors = load_tensors(raw)
            card = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
            model = GlobalModel(tensors["weights"].astype(np.float32))
            model.published, model.first, model.second = (
                tensors[k] for k in ("published", "first", "second")
            )
            model.steps = int(card["steps"])
            return cls(card["run"], int(card["round"]), model, card["close"].encode())
        except (OSError, SafetensorError, KeyError, ValueError) as problem:
            raise StateError(
                f"server state cannot be read ({problem})", who=str(path), advice="restore the run's folder"
            ) from problem
