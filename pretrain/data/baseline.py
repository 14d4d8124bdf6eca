"""A bag-of-tokens classifier: how far one gets on a task without looking at the order of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_STEPS, _LEARNING_RATE, _L2 = 200, 0.02, 1e-3
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, with the standard error of so many draws."""

    accuracy: float
    standard_error: float
    num_examples: int


def accuracy_of(right: int, total: int) -> Accuracy:
    """`right` of `total`, with its binomial standard error."""
    share = right / total
    return Accuracy(share, math.sqrt(share * (1 - share) / total), total)


def bag_of_tokens(
    train_ids: Sequence[Sequence[int]],
    train_labels: Sequence[int],
    *,
    test_ids: Sequence[Sequence[int]],
    test_labels: Sequence[int],
    vocab_size: int,
) -> Accuracy:
    """Test accuracy of a logistic regression on token counts, with labels 0 and 1; no random numbers in it."""
    weights = _fit(_counts(train_ids, vocab_size), np.asarray(train_labels, dtype=np.float32))
    predicted = _counts(test_ids, vocab_size) @ weights > 0
    return accuracy_of(int((predicted == np.asarray(test_labels, dtype=bool)).sum()), len(test_labels))


def _counts(ids: Sequence[Sequence[int]], vocab_size: int) -> Floats:
    """How often each token occurs, and a column of ones for the bias."""
    counts = np.zeros((len(ids), vocab_size + 1), dtype=np.float32)
    for row, tokens in enumerate(ids):
        np.add.at(counts[row], np.asarray(tokens, dtype=np.int64), 1)
    counts[:, -1] = 1
    return counts


def _fit(counts: Floats, labels: Floats) -> Floats:
    """Weights that minimise the mean logistic loss plus an L2 term, by full-batch Adam."""
    weights = np.zeros(counts.shape[1], dtype=np.float32)
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, _STEPS + 1):
        chance = 1 / (1 + np.exp(-np.clip(counts @ weights, -30, 30)))
        gradient = (chance - labels) @ counts / np.float32(len(labels)) + _L2 * weights
        mean += (1 - _BETA1) * (gradient - mean)
        square += (1 - _BETA2) * (gradient**2 - square)
        weights -= _LEARNING_RATE * (mean / (1 - _BETA1**step)) / (np.sqrt(square / (1 - _BETA2**step)) + _EPSILON)
    return weights
