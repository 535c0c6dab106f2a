"""A step of DP-SGD, against plain SGD and against Opacus' default hooks, on the same records of every shipped model.

A step is the whole of it, from the draw of its records, whose features are in memory, to new weights: draw, packing,
fetching, gradients, clipping, sum, noise, step. The site has 640 rows of which a step draws each with q = 0.5, about
as a site of the digits scenario with the default configuration. All sides get the same draws and use one thread of
torch, as runs do by default. Plain SGD takes what was drawn in one batch, or in batches of 128 or 64 whose gradients
add up: whichever is fastest for the model. Opacus takes it in one batch. The records are random pictures, noises and
words, written to files and read as a site's are.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_shared.config.model import ModelConfig
    from fedfuse_shared.models import MultimodalClassifier
    from fedfuse_shared.privacy.noise import NoiseSource

Pair = tuple[Callable[[], object], Callable[[], object]]

ROWS = 640
SAMPLING = 0.5
EXPECTED = 320
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
STEPS = {"heads": 24, "late": 24, "image-conv": 4, "audio-conv": 3}
"""Steps timed as one; 2 of those that take longest."""
DRAWS = 24
"""Draws that all sides go through, in the same order."""


def against_plain(name: str) -> Callable[[], Pair]:
    """Return the pair of one model: a DP step by the mode a site would choose, and a step of plain SGD."""
    return lambda: (_repeated(name, _private(name)), _repeated(name, _plain(name)))


def against_hooks(name: str) -> Callable[[], Pair]:
    """Return the pair of one model: a DP step by the mode a site would choose, and one by Opacus as it comes."""
    return lambda: (_repeated(name, _private(name)), _repeated(name, _opacus(name)))


def _repeated(name: str, step: Callable[[list[int]], None]) -> Callable[[], object]:
    draws = _draws()
    noise = draws[0]
    turns = cycle(draws[1])

    def repeated() -> None:
        for _ in range(STEPS.get(name, 2)):
            np.flatnonzero(
                noise.poisson_mask(ROWS, SAMPLING)
            ).tolist()  # what a draw takes; all get the same one
            step(next(turns))

    return repeated


@cache
def _draws() -> tuple[NoiseSource, list[list[int]]]:
    from fedfuse_shared.privacy.noise import NoiseSource

    noise = NoiseSource.fresh()
    return noise, [np.flatnonzero(noise.poisson_mask(ROWS, SAMPLING)).tolist() for _ in range(DRAWS)]


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
    """Return a model at random weights and a site's records whose features are in memory."""
    import soundfile
    import torch
    from PIL import Image
    from threadpoolctl import threadpool_limits

    from fedfuse_client.data.cells import Record
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_client.synthetic import shaken
    from fedfuse_shared.models import build_model

    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's matrix products, which the sums of private training use
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    numbers, config = np.random.default_rng(0), _config(name)
    with tempfile.TemporaryDirectory() as folder:
        records = []
        for row in range(ROWS):
            picture, sound = Path(f"{row}.png"), Path(f"{row}.wav")
            Image.fromarray(numbers.integers(0, 256, (28, 28, 3), np.uint8)).save(Path(folder) / picture)
            soundfile.write(Path(folder) / sound, numbers.normal(0, 0.1, 4000), 8000)
            text = " ".join(f"word{number}" for number in numbers.integers(0, 5000, 100))
            records.append(Record(row + 2, f"r{row}", "here", "train", row % 10, text, picture, sound))
        data = RecordTensors(Path(folder), records, config)
        if len(data.usable(range(ROWS))) != ROWS:
            raise RuntimeError("a record that was just written cannot be read")
    return shaken(build_model(config, 0)), data


def _private(name: str) -> Callable[[list[int]], None]:
    import torch

    from fedfuse_client.gradient_choice import choice_for
    from fedfuse_client.learner import MICROBATCH
    from fedfuse_client.training import PrivateOptimizer, accumulate
    from fedfuse_shared.privacy.noise import NoiseSource

    model, data = _prepared(name)
    choice, trained = choice_for(model, MICROBATCH, expected=EXPECTED), copy.deepcopy(model)
    print(f"{name}: {choice.name}, microbatches of {choice.shapes or MICROBATCH}", flush=True)
    mode = choice.mode(trained)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(trained.parameters(), lr=RATE),
        clip=1.0,
        multiplier=1.0,
        batch=EXPECTED,
        noise=NoiseSource.fresh(),
    )

    def step(drawn: list[int]) -> None:
        accumulate(mode, optimizer, data, data.usable(drawn), MICROBATCH, choice.shapes)
        optimizer.step()

    return step


def _plain(name: str) -> Callable[[list[int]], None]:
    import torch
    from torch.nn import functional

    model, data = _prepared(name)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=RATE)

    def step(drawn: list[int], size: int) -> None:
        optimizer.zero_grad()
        for start in range(0, len(drawn), size):
            batch = data.batch(drawn[start : start + size])
            logits = trained(batch["text"], batch["image"], batch["audio"], batch["present"])
            (functional.cross_entropy(logits, batch["label"], reduction="sum") / EXPECTED).backward()
        optimizer.step()

    def took(size: int) -> float:
        started = time.perf_counter()
        for drawn in draws[: STEPS.get(name, 2)]:
            step(drawn, size)
        return time.perf_counter() - started

    draws = _draws()[1]
    spent = {size: min(took(size) for _ in range(4)) for size in (ROWS, 128, 64)}
    best = min(spent, key=spent.__getitem__)
    print(f"{name}: plain SGD in batches of {best}", flush=True)
    return lambda drawn: step(drawn, best)


def _opacus(name: str) -> Callable[[list[int]], None]:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from torch.nn import functional

    model, data = _prepared(name)
    wrapped = GradSampleModule(copy.deepcopy(model))
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=RATE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=EXPECTED,
    )

    def step(drawn: list[int]) -> None:
        batch = data.batch(drawn)
        optimizer.zero_grad()
        logits = wrapped(batch["text"], batch["image"], batch["audio"], batch["present"])
        functional.cross_entropy(logits, batch["label"]).backward()
        optimizer.step()

    return step
