"""Scores of a global model on test rows that the simulator holds; no message ever carries one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score

from fedfuse_shared.config.base import Frozen, Modality

Labels = NDArray[np.int64]


class Score(Frozen):
    """How well predictions match labels; every figure lies between 0 and 1."""

    rows: int
    accuracy: float
    balanced_accuracy: float
    f1_macro: float


class Scores(Frozen):
    """A model's scores: over all test rows, over those with every modality, and per subset of modalities on these."""

    all_rows: Score
    complete_rows: Score | None
    subsets: dict[str, Score] = Field(default_factory=dict)
    confusion: tuple[tuple[int, ...], ...]
    """Counts over all test rows; row: true class, column: predicted class."""


def subset_name(subset: Sequence[Modality], every: Sequence[Modality]) -> str:
    """Return a subset's name in reports: ``text``, ``text+image``, or ``all``."""
    return "all" if len(subset) == len(every) > 1 else "+".join(subset)


def subsets_of(modalities: Sequence[Modality]) -> list[tuple[Modality, ...]]:
    """Return every non-empty subset of modalities, small ones first."""
    return [chosen for size in range(1, len(modalities) + 1) for chosen in combinations(modalities, size)]


def score(labels: Labels, predicted: Labels) -> Score:
    """Return the scores of predictions, both of shape ``(rows,)``."""
    present = np.unique(labels)
    return Score(
        rows=len(labels),
        accuracy=float(accuracy_score(labels, predicted)),
        balanced_accuracy=float(balanced_accuracy_score(labels, predicted)),
        f1_macro=float(f1_score(labels, predicted, average="macro", labels=present, zero_division=0.0)),
    )


def confusion(labels: Labels, predicted: Labels, classes: int) -> tuple[tuple[int, ...], ...]:
    """Return the confusion matrix as nested tuples, shape ``(classes, classes)``."""
    counts = confusion_matrix(labels, predicted, labels=range(classes))
    return tuple(tuple(int(count) for count in row) for row in counts)
