"""What the server does with an opened average."""

import numpy as np
import pytest

from fedfuse_server.optimiser import GlobalModel
from fedfuse_shared.config.federation import AggregationConfig, ServerOptimizer


def config(**changes):
    plain = {"momentum": 0.0, "ema": 0.0, "learning_rate": 1.0}
    return AggregationConfig(**{**plain, **changes})


def ones(value=1.0):
    return np.full(3, value, np.float32)


def test_fedavg_without_momentum_adds_the_mean_update():
    model = GlobalModel(ones())
    model.apply(ones(0.5), config())
    model.apply(ones(0.25), config(learning_rate=2.0))
    assert model.weights.tolist() == [2.0, 2.0, 2.0]
    assert model.published.tolist() == model.weights.tolist()


def test_momentum_accumulates():
    model = GlobalModel(ones(0))
    for _ in range(3):
        model.apply(ones(), config(momentum=0.5))
    assert model.weights[0] == pytest.approx(1 + 1.5 + 1.75)


def test_fedadam_moves_by_about_its_learning_rate_whatever_the_updates_size():
    for size in (1.0, 100.0):
        model = GlobalModel(ones(0))
        for _ in range(300):
            model.apply(
                ones(size), config(optimizer=ServerOptimizer.FEDADAM, learning_rate=0.01, momentum=0.9)
            )
        assert model.weights[0] == pytest.approx(3.0, rel=0.6)


def test_the_published_weights_are_a_moving_average_that_does_not_start_at_the_initial_ones():
    model = GlobalModel(ones(0))
    model.apply(ones(1), config(ema=0.99))
    # The first average leans on the first step, not on the untrained weights.
    assert model.published[0] > 0.8
    for _ in range(50):
        model.apply(ones(0), config(ema=0.99))
    assert model.published[0] == pytest.approx(1, abs=0.05)


def test_everything_stays_float32():
    model = GlobalModel(ones())
    model.apply(ones(), config(momentum=0.9, ema=0.9))
    for array in (model.weights, model.published, model.first, model.second):
        assert array.dtype == np.float32
