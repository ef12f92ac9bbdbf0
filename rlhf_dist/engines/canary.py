"""How far the log-probabilities of a fixed prompt are apart, learner's and generator's."""

from __future__ import annotations

import math

import numpy as np


def canary_difference(found: np.ndarray, expected: np.ndarray, vocabulary: int) -> float:
    """The largest difference, each in proportion to how unlikely its token is; NaN if there is one.

    Rounding moves logits in proportion to their size. A model that knows nothing gives every token ``-log V``, with
    logits next to 0; the sharper it becomes, the larger they are, and the more unlikely are the random tokens of the
    canary. So a difference counts less by ``|logprob| / log V`` where that is above 1. With bfloat16 the plain
    difference grew past any fixed limit in the course of a run.

    Args:
        found: ``[n]`` of the generator.
        expected: ``[n]`` of the learner.
        vocabulary: V, tokens of the model.
    """
    scale = np.maximum(1.0, np.abs(expected) / math.log(vocabulary))
    return float((np.abs(found - expected) / scale).max())
