"""Best-of-n in closed form against every subset, and its KL against a policy whose KL can be counted."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

from rlhf_dist.evaluation.best_of_n import best_weights, kl_bound


def over_all_subsets(proxy: list[int], figure: list[int], n: int) -> Fraction:
    """Mean over the subsets of ``n`` samples of the figure of the best; of several best ones, of their mean."""
    means = []
    for subset in combinations(range(len(proxy)), n):
        best = [i for i in subset if proxy[i] == max(proxy[j] for j in subset)]
        means.append(Fraction(sum(figure[i] for i in best), len(best)))
    return sum(means, Fraction()) / len(means)


@pytest.mark.parametrize("levels", [1, 2, 3, 100], ids=lambda n: f"{n} levels")
def test_closed_form_is_the_mean_over_all_subsets(levels: int) -> None:
    """Few levels of the proxy: many ties, also all equal."""
    rng = np.random.default_rng(levels)
    proxy, figure = rng.integers(0, levels, (5, 8)), rng.integers(-9, 10, (5, 8))
    for n in range(1, 9):
        weights = best_weights(proxy.astype(float), n)
        assert weights.sum(1) == pytest.approx(np.ones(5), abs=1e-12)
        expected = [float(over_all_subsets(p, f, n)) for p, f in zip(proxy.tolist(), figure.tolist(), strict=True)]
        assert (weights * figure).sum(1) == pytest.approx(expected, abs=1e-12)


def test_its_ends_are_the_mean_and_the_best_sample() -> None:
    proxy = np.array([[0.5, -1.0, 3.0, 2.0]])
    assert best_weights(proxy, 1) == pytest.approx(np.full((1, 4), 0.25))
    assert best_weights(proxy, 4).tolist() == [[0, 0, 1, 0]]
    assert best_weights(np.array([[2.0, 1.0, 2.0, 0.0]]), 4) == pytest.approx(np.array([[0.5, 0, 0.5, 0]]))


def test_it_is_unbiased() -> None:
    """The mean over all draws of N samples from a policy of three responses is best-of-n's expectation, exactly."""
    chance, proxy, gold, n, size = [0.5, 0.3, 0.2], [0.0, 1.0, 1.0], [1.0, 5.0, -3.0], 2, 4

    def mean(size: int, estimate: bool) -> float:
        total = 0.0
        for draw in product(range(3), repeat=size):
            weights = best_weights(np.array([[proxy[i] for i in draw]]), n if estimate else size)
            total += math.prod(chance[i] for i in draw) * float(weights[0] @ [gold[i] for i in draw])
        return total

    assert mean(size, estimate=True) == pytest.approx(mean(n, estimate=False), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_bound_of_the_kl(n: int) -> None:
    """Of responses that are equally likely and all differ in the proxy: the bound comes close as they become many."""
    gaps = []
    for responses in (4, 10_000):
        ranks = np.arange(responses + 1) / responses
        chosen = np.diff(ranks**n)  # the best of n draws
        kl = float(np.sum(chosen * np.log(chosen * responses)))
        gaps.append(kl_bound(n) - kl)
    assert -1e-12 < gaps[1] <= gaps[0] + 1e-12
    assert gaps[1] < 1e-2
    assert gaps[0] > 0.01 or n == 1
