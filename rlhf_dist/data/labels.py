"""What people think of K responses: one number for each pair, whatever form the labels had.

The pairs of K responses are (1, 2), (1, 3) ... (1, K), (2, 3) ... (K-1, K), K(K-1)/2 in all: the order of
``itertools.combinations``. The number of a pair is the probability that its first response is the better one: 1, 0,
0.5 for a tie, the share of the annotators who say so where there are several, NaN where nobody compared them. Rankings,
ties, labels that contradict each other (A > B > C > A) and any number of annotators have this one form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np

Preferences = tuple[float, ...]
T = TypeVar("T")

NOT_COMPARED = math.nan


def by_score(scores: Sequence[float]) -> Preferences:
    """Of two responses that with the higher score is better; equal scores tie."""
    return tuple(0.5 if a == b else float(a > b) for a, b in combinations(scores, 2))


def by_rank(ranks: Sequence[float]) -> Preferences:
    """Of two responses that with the lower rank is better; equal ranks tie."""
    return by_score([-rank for rank in ranks])


def pooled(annotators: Sequence[Preferences]) -> Preferences:
    """The mean over the annotators of all pairs."""
    return tuple(np.mean(annotators, axis=0).tolist())


def compared(responses: Sequence[T], preferences: Sequence[float]) -> Iterator[tuple[T, T, float]]:
    """Of each pair that was compared the better response, the other one, and how probable that is, 0.5 or more.

    Of a tie the first counts as the better one.
    """
    for (a, b), p in zip(combinations(responses, 2), preferences, strict=True):
        if not math.isnan(p):
            yield (a, b, p) if p >= 0.5 else (b, a, 1 - p)


def targets(
    preferences: Preferences, ties: Literal["drop", "learn"], labels: Literal["majority", "share"]
) -> Preferences:
    """What a reward model is to learn of each pair: see ``reward_model.ties`` and ``reward_model.labels``."""
    p = np.asarray(preferences, np.float64)
    if labels == "majority":
        p = 0.5 + 0.5 * np.sign(p - 0.5)
    if ties == "drop":
        p = np.where(p == 0.5, NOT_COMPARED, p)
    return tuple(p.tolist())


def winner(preferences: Sequence[float]) -> int:
    """The response that wins the most of its pairs, ties counting half; the first of several."""
    k = round((1 + math.sqrt(1 + 8 * len(preferences))) / 2)
    wins = [0.0] * k
    for (i, j), p in zip(combinations(range(k), 2), preferences, strict=True):
        if not math.isnan(p):
            wins[i] += p
            wins[j] += 1 - p
    return wins.index(max(wins))


def vote_score(votes: int, accepted: bool) -> int:
    """log2(1 + votes), rounded, and 1 more if the asker accepted the answer; -1 if votes are negative (Askell et al.,
    2112.00861, on StackExchange)."""
    return -1 if votes < 0 else round(math.log2(1 + votes)) + accepted
