"""Labels of pairs: the order of the pairs, ranks, ties, annotators, what is learned of them, scores of votes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data import labels

NAN = labels.NOT_COMPARED


def test_pairs_stand_in_the_order_of_combinations() -> None:
    assert labels.by_score([4, 3, 9]) == (1.0, 0.0, 0.0), "12 13 23"
    assert labels.by_rank([1, 2, 0]) == (1.0, 0.0, 0.0)
    assert labels.by_rank([0, 1, 1, 2]) == (1.0, 1.0, 1.0, 0.5, 1.0, 1.0)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6), st.randoms())
def test_a_ranking_says_the_same_in_any_order(scores: list[int], rng: object) -> None:
    order = list(range(len(scores)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    found = labels.by_score([scores[i] for i in order])
    for p, (i, j) in zip(found, itertools.combinations(order, 2), strict=True):
        assert p == (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])


def test_annotators_are_pooled_pair_by_pair() -> None:
    ranks = [[0, 1, 2], [0, 2, 1], [1, 1, 0], [0, 1, 1]]
    assert labels.pooled([labels.by_rank(r) for r in ranks]) == (0.875, 0.75, 0.375)


@pytest.mark.parametrize(
    ("ties", "kind", "expected"),
    [
        ("drop", "majority", (1.0, 0.0, NAN, NAN, 1.0)),
        ("learn", "majority", (1.0, 0.0, 0.5, NAN, 1.0)),
        ("drop", "share", (0.75, 0.25, NAN, NAN, 1.0)),
        ("learn", "share", (0.75, 0.25, 0.5, NAN, 1.0)),
    ],
)
def test_what_is_learned_of_a_pair(ties: str, kind: str, expected: tuple[float, ...]) -> None:
    found = labels.targets((0.75, 0.25, 0.5, NAN, 1.0), ties, kind)  # type: ignore[arg-type]
    assert found == pytest.approx(expected, nan_ok=True)
    assert all(math.isnan(a) == math.isnan(b) for a, b in zip(found, expected, strict=True))


def test_scores_of_votes_are_those_of_the_paper() -> None:
    """2112.00861: log2(1 + votes) to the nearest whole number, one more where accepted, -1 below zero."""
    votes = {0: 0, 1: 1, 2: 2, 4: 2, 5: 3, 10: 3, 11: 4, 100: 7, 1023: 10, -1: -1, -20: -1}
    assert {v: labels.vote_score(v, False) for v in votes} == votes
    assert labels.vote_score(3, True) == 3
    assert labels.vote_score(0, True) == 1
    assert labels.vote_score(-2, True) == -1
