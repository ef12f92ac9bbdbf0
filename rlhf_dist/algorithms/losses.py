"""Policy and value losses, the corrections for a sampler that differs from the learner, and the one reduction.

A loss returns ``(loss [B, T], metrics)``, not reduced, 0 outside the mask; every metric is ``[B, T]`` without
gradient. :func:`aggregate` reduces both. Advantages, returns and old log-probabilities are data: no gradient is
wanted through them. ρ = π/π_old; log-ratios are cut to ±20 before ``exp``, so ρ is never infinite, and a token beyond
has no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_dist.algorithms.kl import K3_LIMIT, LOG_RATIO_LIMIT
from rlhf_dist.algorithms.logprobs import entropy_from_logits
from rlhf_dist.algorithms.masking import count, masked

__all__ = [
    "a2c_policy_loss",
    "aggregate",
    "cispo_policy_loss",
    "decoupled_ppo_loss",
    "entropy_from_logits",
    "gspo_policy_loss",
    "icepop",
    "ppo_policy_loss",
    "sequence_mask",
    "soft_overlong_penalty",
    "tis",
    "value_loss",
]

Metrics = dict[str, Tensor]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def aggregate(
    x: Tensor,
    mask: Tensor,
    how: Aggregation,
    total_tokens: float | Tensor,
    total_sequences: float | Tensor,
    max_length: int | None = None,
) -> Tensor:
    """Reduce ``x [B, T]`` of one micro-batch to its share of the global mean, a scalar.

    The sum over this micro-batch is divided by totals of the *global* optimizer batch, over all micro-batches and
    ranks. So shares simply add up, and loss and gradient depend neither on the split nor on padding. (A framework
    that averages gradients over ranks needs the result times their number.)

    * ``token_mean``: Σ x / total_tokens (DAPO, 2503.14476)
    * ``sequence_mean``: Σ over rows of the row's mean / total_sequences; a row without trained tokens adds 0
    * ``constant``: Σ x / (total_sequences · max_length) (Dr.GRPO, 2503.20783)

    Args:
        total_tokens: trained tokens of the global batch.
        total_sequences: samples of the global batch, without those that only fill up a micro-batch.
        max_length: the constant, usually the longest response that sampling allows; only for ``constant``.

    Returns:
        A scalar; 0 where the total is 0.

    Raises:
        ValueError: for an unknown ``how``, or ``constant`` without ``max_length``.
    """
    mask = mask.bool()
    x = masked(x, mask)
    if how == "token_mean":
        return x.sum() / _at_least_one(total_tokens)
    if how == "sequence_mean":
        return _row_mean(x, mask).sum() / _at_least_one(total_sequences)
    if how == "constant":
        if max_length is None:
            raise ValueError("how='constant' divides by max_length, which is not given")
        return x.sum() / (_at_least_one(total_sequences) * max_length)
    raise ValueError(f"how={how!r}: expected token_mean, sequence_mean or constant")


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped objective (1707.06347), with DAPO's higher upper clip and the dual clip (1912.09729).

    J = min(ρA, clip(ρ, 1 − eps_clip, 1 + eps_clip_high) A); for A < 0 with dual clip c, J = max(J, cA). Loss −J.

    Args:
        logprobs, old_logprobs, advantages, mask: ``[B, T]``.
        eps_clip_high: ``eps_clip`` if not given.
        dual_clip: c > 1, the bound of the loss for negative advantages in units of |A|.

    Returns:
        loss ``[B, T]``; metrics ``ratio``, ``ppo_kl`` (ρ − 1 − log ρ, which is KL(π_old ‖ π) in the mean over samples
        of π_old and never negative), ``clip_frac`` (1 where the clip took the gradient away) and, with dual clip,
        ``dual_clip_frac``.
    """
    log_ratio, advantages, mask = _operands(logprobs, old_logprobs, advantages, mask)
    ratio = log_ratio.exp()
    loss, clipped = _clipped(ratio, advantages, eps_clip, eps_clip_high)
    metrics = _ratio_metrics(log_ratio, ratio, clipped, mask)
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        metrics["dual_clip_frac"] = (loss > bound).to(loss.dtype)
        loss = torch.minimum(loss, bound)
    return loss, metrics


def a2c_policy_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    """−A log π, for one pass without a ratio (A2C, 1602.01783; Sparrow, 2209.14375); all ``[B, T]``, no metrics."""
    mask = mask.bool()
    return masked(advantages, mask).neg_() * masked(logprobs, mask), {}


def gspo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """GSPO (2507.18071): one ratio per sequence, s = exp(mean_t(log π − log π_old)), clipped as in PPO.

    Every token of a row carries −min(sA, clip(s)A), so ``sequence_mean`` gives the paper's objective. The sequence
    mean itself is differentiated; where A is constant in a row, that equals the token form with stop-gradient.
    Arguments and metrics as in :func:`ppo_policy_loss`, with ``ratio`` the row's s on each of its tokens.
    """
    log_ratio, advantages, mask = _operands(logprobs, old_logprobs, advantages, mask)
    log_ratio = _row_mean(log_ratio, mask)  # [B, 1] from here on
    ratio = log_ratio.exp()
    loss, clipped = _clipped(ratio, advantages, eps_clip, eps_clip_high)
    return loss, _ratio_metrics(log_ratio, ratio, clipped, mask)


def cispo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO (2506.13585): −sg(clip(ρ, 1 − eps_clip, 1 + eps_clip_high)) A log π.

    The weight is clipped, the gradient never vanishes. ``eps_clip`` ≥ 1 means no lower bound, as in the paper.
    Arguments and metrics as in :func:`ppo_policy_loss`; ``clip_frac`` marks the tokens whose weight was clipped.
    """
    log_ratio, advantages, mask = _operands(logprobs, old_logprobs, advantages, mask)
    ratio = log_ratio.detach().exp()
    weight = _clip(ratio, eps_clip, eps_clip_high)
    loss = advantages.mul_(weight).neg_() * masked(logprobs, mask)
    return loss, _ratio_metrics(log_ratio, ratio, weight != ratio, mask)


def decoupled_ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Decoupled PPO (AReaL, 2505.24298): PPO's loss around π_old, weighted by sg(π_old / μ).

    μ (``rollout_logprobs``) is the policy that sampled. The weight corrects for it already: do not add :func:`tis`.
    Other arguments and metrics as in :func:`ppo_policy_loss`.
    """
    loss, metrics = ppo_policy_loss(logprobs, old_logprobs, advantages, mask, eps_clip, eps_clip_high, dual_clip)
    return loss * _ratio(old_logprobs, rollout_logprobs, mask), metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip: float | None = None
) -> tuple[Tensor, Metrics]:
    """½ max((V − R)², (clip(V, V_old ± value_clip) − R)²); without ``value_clip`` ½ (V − R)². All ``[B, T]``.

    The metric ``value_clip_frac`` is 1 where the clipped term was the larger: that token has no gradient.
    """
    mask = mask.bool()
    values, old_values, returns = (masked(x, mask) for x in (values, old_values, returns))
    loss = (values - returns).square()
    if value_clip is None:
        return 0.5 * loss, {"value_clip_frac": torch.zeros_like(loss)}
    # Clamped to bounds, not old + clamped difference, whose rounding would count as a clip.
    clipped = (values.clamp(old_values - value_clip, old_values + value_clip) - returns).square()
    return 0.5 * torch.maximum(loss, clipped), {"value_clip_frac": (clipped > loss).to(loss.dtype)}


def tis(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float = 2.0, mask: Tensor | None = None) -> Tensor:
    """Truncated importance sampling: min(π_old / μ, cap) per token, without gradient, a factor of the loss.

    All ``[B, T]``. With a mask the weight is 0 outside it and NaN there is inert.
    """
    return _ratio(old_logprobs, rollout_logprobs, mask).clamp(max=cap)


def icepop(
    old_logprobs: Tensor, rollout_logprobs: Tensor, low: float, high: float, mask: Tensor | None = None
) -> Tensor:
    """IcePop (2510.18855): π_old / μ where it is within [low, high], else 0; as :func:`tis`."""
    ratio = _ratio(old_logprobs, rollout_logprobs, mask)
    # Written so that a NaN stays one: both comparisons are false for it.
    return torch.where((ratio < low) | (ratio > high), 0, ratio)


def sequence_mask(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """1 on the trained tokens of the rows whose mean ratio is within [low, high], else 0: ``[B, T]``, a factor.

    The mean is geometric, exp(mean_t(log π_old − log μ)): it does not depend on the length.
    """
    mask = mask.bool()
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, mask).detach()
    ratio = _row_mean(log_ratio, mask).exp()
    return (mask & (ratio >= low) & (ratio <= high)).to(log_ratio.dtype)


def soft_overlong_penalty(lengths: Tensor, max_length: int, cache: int) -> Tensor:
    """DAPO's penalty (2503.14476, eq. 13), to be added to the score: ``lengths [B]`` to float32 ``[B]`` in [−1, 0].

    0 up to max_length − cache tokens, from there linear to −1 at max_length, −1 beyond.

    Raises:
        ValueError: unless 0 < cache ≤ max_length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache={cache} must be above 0 and at most max_length={max_length}")
    return ((max_length - cache - lengths).float() / cache).clamp(-1, 0)


def _operands(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log ρ and A, both 0 outside the mask, and the mask as bool."""
    mask = mask.bool()
    return _log_ratio(logprobs, old_logprobs, mask), masked(advantages, mask), mask


def _log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor | None) -> Tensor:
    log_ratio = numerator - denominator
    if mask is not None:
        # Here, not after exp: the gradient of a masked NaN would be 0 · NaN.
        log_ratio = masked(log_ratio, mask.bool())
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor | None) -> Tensor:
    ratio = _log_ratio(old_logprobs.detach(), rollout_logprobs.detach(), mask).exp()
    return ratio if mask is None else masked(ratio, mask.bool())


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the trained tokens of each row: ``[B, 1]``; ``x`` is 0 outside the mask."""
    return x.sum(1, keepdim=True) / count(mask).clamp(min=1)


def _clip(ratio: Tensor, eps_clip: float, eps_clip_high: float | None) -> Tensor:
    return ratio.clamp(1 - eps_clip, 1 + (eps_clip if eps_clip_high is None else eps_clip_high))


def _clipped(ratio: Tensor, advantages: Tensor, eps_clip: float, eps_clip_high: float | None) -> tuple[Tensor, Tensor]:
    """−min(ρA, clip(ρ)A), and where the clipped term is the smaller one: there nothing has a gradient."""
    negative = -advantages
    loss = ratio * negative
    with torch.no_grad():
        bound = _clip(ratio, eps_clip, eps_clip_high) * negative
        clipped = bound > loss
    return torch.where(clipped, bound, loss), clipped


@torch.no_grad()
def _ratio_metrics(log_ratio: Tensor, ratio: Tensor, clipped: Tensor, mask: Tensor) -> Metrics:
    """``log_ratio`` and ``ratio`` are ``[B, T]``, or ``[B, 1]`` where a row has one."""
    ppo_kl = (log_ratio.expm1() - log_ratio).clamp(0, K3_LIMIT)  # k3 of a log-ratio that is cut already
    if ppo_kl.shape != mask.shape:  # else it is 0 outside the mask already, as log_ratio is
        ppo_kl = masked(ppo_kl, mask)
    return {"ratio": masked(ratio, mask), "ppo_kl": ppo_kl, "clip_frac": clipped.to(ratio.dtype)}


def _at_least_one(total: float | Tensor) -> float | Tensor:
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
