"""The KL to the reference: estimators per token, and the reward they enter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_dist.algorithms.masking import masked

#: Log-ratios are cut to ±20 before ``exp``: e^20 ≈ 5e8 is beyond any use, and float32 would overflow at 88.
LOG_RATIO_LIMIT = 20.0
#: and k3 to 10 nats.
K3_LIMIT = 10.0

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator, mask: Tensor | None = None) -> Tensor:
    """Estimate KL(π ‖ q) per token from the log-probabilities of a token sampled from π.

    k1 = log π − log q, k2 = ½ k1², k3 = e^{−k1} − 1 + k1 (Schulman, joschu.net/blog/kl-approx). k1 and k3 are
    unbiased, k2 and k3 never negative. In the reward use any; in the loss k2 has the gradient of the KL on-policy,
    k3's differs from it, and k1's is zero in expectation.

    k3 cuts the log-ratio to ±20 before ``exp`` and the result to 10; :func:`k3_clamped` marks those tokens, which
    have no gradient.

    Args:
        logprobs: ``[B, T]``, with gradient if the result enters the loss.
        ref_logprobs: ``[B, T]``.
        mask: ``[B, T]``; given, the result is 0 outside it and NaN there is inert, in the gradient too.

    Raises:
        ValueError: for an unknown estimator.
    """
    k1 = logprobs - ref_logprobs
    if mask is not None:
        # Before the estimator, not after: the gradient of a masked NaN would be 0 · NaN.
        k1 = masked(k1, mask.bool())
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return 0.5 * k1.square()
    if estimator == "k3":
        return k3(-k1)
    raise ValueError(f"estimator={estimator!r}: expected k1, k2 or k3")


def k3(log_ratio: Tensor) -> Tensor:
    """e^x − 1 − x with x cut to ±20 and the result to [0, 10]; any shape."""
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (log_ratio.expm1() - log_ratio).clamp(0, K3_LIMIT)


@torch.no_grad()
def k3_clamped(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """1 for the trained tokens whose k3 was cut, as a metric: ``[B, T]``."""
    at_limit = k3(ref_logprobs - logprobs) >= K3_LIMIT
    return (at_limit & mask.bool()).to(logprobs.dtype)


@torch.no_grad()
def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """−kl_coef · kl on every trained token, plus the score on the last one (InstructGPT, 2203.02155).

    Args:
        scores: ``[B]``.
        kl, mask: ``[B, T]``.

    Returns:
        ``[B, T]``, 0 outside the mask. A row without trained tokens has nowhere to put its score: all 0.
    """
    return add_to_last_token(masked(-kl_coef * kl, mask.bool()), scores, mask)


@torch.no_grad()
def add_to_last_token(rewards: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """``rewards [B, T]`` with ``x [B]`` added at the last trained token of each row that has one."""
    # Bytes, because looking for the last one should not cost more than the addition.
    reverse = mask.to(torch.uint8).flip(1)
    rows = reverse.any(1).nonzero()[:, 0]
    out = rewards.clone()
    if len(rows):
        out[rows, mask.shape[1] - 1 - reverse[rows].argmax(1)] += x[rows]
    return out
