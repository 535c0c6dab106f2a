"""What an attacker who sees logs, files, seeds or another process must not learn of the noise."""

import copy
import logging
import os
import pickle
import random

import numpy as np
import pytest
import torch

from fedfuse_shared.errors import StateError
from fedfuse_shared.privacy.noise import NoiseSource

KEY = bytes(range(100, 116))


def test_the_key_shows_in_no_text_form():
    source = NoiseSource(KEY)
    shown = (
        f"{source!r} {source} {source:}"
        + logging.LogRecord("x", 20, "", 0, "%s", (source,), None).getMessage()
    )
    number = int.from_bytes(KEY, "little")
    for form in (KEY.hex(), KEY[::-1].hex(), str(number), f"{number:x}", str(number & (2**64 - 1))):
        assert form not in shown
    assert "withheld" in repr(source)


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_cannot_be_duplicated(attempt):
    with pytest.raises(TypeError, match="make a fresh one"):
        attempt(NoiseSource.fresh())


def test_a_source_holds_no_attribute_dictionary_to_dump():
    with pytest.raises(TypeError):
        vars(NoiseSource.fresh())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_process_cannot_repeat_its_parents_noise():
    source = NoiseSource.fresh()
    child = os.fork()
    if child == 0:
        try:
            source.normal(1)
        except StateError:
            os._exit(17)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert source.normal(1).shape == (1,)


def test_no_seed_of_torch_numpy_or_python_repeats_noise():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - what user code might do
        random.seed(0)
        drawn.append(NoiseSource.fresh().normal(1000))
    assert not np.intersect1d(*drawn).size


def test_drawing_noise_moves_no_seeded_generator():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    NoiseSource.fresh().private_sum(np.zeros(100), clip=1.0, multiplier=1.0)
    assert torch.equal(before, torch.random.get_rng_state())
