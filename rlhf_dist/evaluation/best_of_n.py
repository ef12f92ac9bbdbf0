"""Best-of-n sampling, the baseline to beat: of n samples to a prompt take the one that a proxy prefers.

What it gives for every n up to N is estimated from the same N samples of each prompt, without sampling again.
"""

from __future__ import annotations

import math

import numpy as np


def best_weights(proxy: np.ndarray, n: int) -> np.ndarray:
    """Chance of each sample to be the best of ``n``, drawn from its prompt's N without putting back.

    The sum of a figure over a prompt's samples, weighted by it, is the mean over all C(N, n) subsets of the figure of
    the sample that the proxy prefers there: the unbiased estimate of best-of-n, with the least variance that the N
    samples allow. Samples that the proxy holds equal share the chance that one of them is taken.

    Args:
        proxy: ``[prompts, N]``, finite.
        n: from 1 to N.

    Returns:
        ``[prompts, N]`` float64; each row adds up to 1.

    Source: Nakano et al., 2112.09332; Gao et al., 2210.10760.
    """
    size = proxy.shape[1]
    # Share of the subsets that lie within the k lowest samples.
    within = np.array([math.comb(k, n) / math.comb(size, n) for k in range(size + 1)])
    weights = np.empty(proxy.shape)
    for scores, row in zip(proxy, weights, strict=True):
        ordered = np.sort(scores)
        below, up_to = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
        row[:] = (within[up_to] - within[below]) / (up_to - below)
    return weights


def kl_bound(n: int) -> float:
    """log n − (n − 1) / n, in nats: at least the KL of best-of-n to the policy that it samples from.

    Equal to it where no two responses are the same and the proxy has no ties; else the KL is smaller (Beirami et al.,
    2401.01879).
    """
    return math.log(n) - (n - 1) / n
