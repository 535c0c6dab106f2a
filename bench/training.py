"""A step of DP-SGD, against plain SGD and against Opacus' default hooks, on the same records of every shipped model.

A step begins with records whose features are in memory and ends with new weights. Each side uses one thread of torch,
as runs do by default. The records are random pictures, noises and words, written to files and read as a site's are.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_shared.config.model import ModelConfig
    from fedfuse_shared.models import MultimodalClassifier

Pair = tuple[Callable[[], object], Callable[[], object]]

BATCH = 128
RATE = 0.1
MODELS = {
    "heads": ("hashed-words", "oriented-gradients", "spectral-shape"),
    "late": ("hashed-words", "oriented-gradients", "spectral-shape"),
    "text-conv": ("text-conv", None, None),
    "image-conv": (None, "image-conv", None),
    "audio-conv": (None, None, "audio-conv"),
    "trained": ("text-conv", "image-conv", "audio-conv"),
}
"""The shipped encoders by set: text, image, audio."""
STEPS = {"heads": 60, "late": 60, "image-conv": 8, "audio-conv": 5}
"""Steps timed as one; 2 of those that take longest."""


def against_plain(name: str) -> Callable[[], Pair]:
    """Return the pair of one model: a DP step by the mode a site would choose, and a step of plain SGD."""
    return lambda: (_repeated(name, _private(name)), _repeated(name, _plain(name)))


def against_hooks(name: str) -> Callable[[], Pair]:
    """Return the pair of one model: a DP step by the mode a site would choose, and one by Opacus as it comes."""
    return lambda: (_repeated(name, _private(name)), _repeated(name, _opacus(name)))


def _repeated(name: str, step: Callable[[], None]) -> Callable[[], object]:
    return lambda: [step() for _ in range(STEPS.get(name, 2))]


def _config(name: str) -> ModelConfig:
    from fedfuse_shared.config.model import EncoderConfig, Fusion, ModelConfig
    from fedfuse_shared.models import MODALITIES

    named = zip(MODALITIES, MODELS[name], strict=True)
    return ModelConfig(
        classes=tuple("0123456789"),
        encoders={m: EncoderConfig(name=encoder) for m, encoder in named if encoder},
        fusion=Fusion.LATE if name == "late" else Fusion.CONCAT,
    )


@cache
def _prepared(name: str) -> tuple[MultimodalClassifier, RecordTensors]:
    """Return a model at random weights and a batch of records whose features are in memory."""
    import soundfile
    import torch
    from PIL import Image

    from fedfuse_client.data.cells import Record
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_client.synthetic import shaken
    from fedfuse_shared.models import build_model

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    numbers, config = np.random.default_rng(0), _config(name)
    with tempfile.TemporaryDirectory() as folder:
        records = []
        for row in range(BATCH):
            picture, sound = Path(f"{row}.png"), Path(f"{row}.wav")
            Image.fromarray(numbers.integers(0, 256, (28, 28, 3), np.uint8)).save(Path(folder) / picture)
            soundfile.write(Path(folder) / sound, numbers.normal(0, 0.1, 4000), 8000)
            text = " ".join(f"word{number}" for number in numbers.integers(0, 5000, 100))
            records.append(Record(row + 2, f"r{row}", "here", "train", row % 10, text, picture, sound))
        data = RecordTensors(Path(folder), records, config)
        if len(data.usable(range(BATCH))) != BATCH:
            raise RuntimeError("a record that was just written cannot be read")
    return shaken(build_model(config, 0)), data


def _private(name: str) -> Callable[[], None]:
    import torch

    from fedfuse_client.gradient_choice import mode_for
    from fedfuse_client.training import PrivateOptimizer, accumulate
    from fedfuse_shared.privacy.noise import NoiseSource

    model, data = _prepared(name)
    chosen, trained, noise = mode_for(model, BATCH), copy.deepcopy(model), NoiseSource.fresh()
    print(f"{name}: {chosen.__name__}", flush=True)
    mode = chosen(trained)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(trained.parameters(), lr=RATE), clip=1.0, multiplier=1.0, batch=BATCH, noise=noise
    )

    def step() -> None:
        # All of them: a smaller draw costs the same, a larger one another microbatch.
        drawn = np.flatnonzero(noise.poisson_mask(BATCH, 1.0)).tolist()
        accumulate(mode, optimizer, data, data.usable(drawn), BATCH)
        optimizer.step()

    return step


def _plain(name: str) -> Callable[[], None]:
    import torch
    from torch.nn import functional

    model, data = _prepared(name)
    trained, rows = copy.deepcopy(model), list(range(BATCH))
    optimizer = torch.optim.SGD(trained.parameters(), lr=RATE)

    def step() -> None:
        batch = data.batch(rows)
        optimizer.zero_grad()
        logits = trained(batch["text"], batch["image"], batch["audio"], batch["present"])
        functional.cross_entropy(logits, batch["label"]).backward()
        optimizer.step()

    return step


def _opacus(name: str) -> Callable[[], None]:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from torch.nn import functional

    model, data = _prepared(name)
    wrapped, rows = GradSampleModule(copy.deepcopy(model)), list(range(BATCH))
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=RATE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
    )

    def step() -> None:
        batch = data.batch(rows)
        optimizer.zero_grad()
        logits = wrapped(batch["text"], batch["image"], batch["audio"], batch["present"])
        functional.cross_entropy(logits, batch["label"]).backward()
        optimizer.step()

    return step
