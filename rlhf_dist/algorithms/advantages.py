"""Advantages: GAE and reward-to-go per token, and the baselines that compare whole samples.

Token-level functions take ``[B, T]`` and skip untrained tokens: an observation between two trained tokens neither
decays nor earns. Sample-level functions take ``scores [B]``; :func:`broadcast` spreads their result over the tokens.
Nothing here carries a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_dist.algorithms.kl import add_to_last_token
from rlhf_dist.algorithms.masking import masked

_BLOCK = 64


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 1506.02438).

    δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1}, R = A + V, where t+1 is the next *trained* token and V is 0
    after the last one. So a response that was cut off is treated as one that ended.

    Args:
        rewards, values: ``[B, T]``.
        mask: ``[B, T]``, 1 for trained tokens.
        gamma, lam: discount and λ, both in [0, 1].

    Returns:
        advantages (not whitened) and returns, both ``[B, T]``, 0 outside the mask.
    """
    mask = mask.bool()
    slot = _slots(mask)
    baseline = _compact(values, mask, slot)
    deltas = _compact(rewards, mask, slot) - baseline
    deltas[:, :-1] += gamma * baseline[:, 1:]
    advantages = _spread(_discounted_suffix_sum(deltas, gamma * lam), slot)
    return advantages, masked(advantages + values, mask)


@torch.no_grad()
def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γ R_{t+1} over the trained tokens (REINFORCE, Williams 1992); ``[B, T]``, 0 outside the mask."""
    mask = mask.bool()
    if gamma == 1:  # nothing decays, across a gap neither: the total less what was before
        rewards = masked(rewards, mask)
        before = rewards.cumsum(1)
        return masked((rewards + before[:, -1:]).sub_(before), mask)
    slot = _slots(mask)
    return _spread(_discounted_suffix_sum(_compact(rewards, mask, slot), gamma), slot)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / sqrt(variance + 1e-8) over all trained tokens of ``x [B, T]``; 0 outside the mask.

    The variance is the unbiased one. Call it once on the global batch, never per micro-batch. A single trained token
    becomes 0.
    """
    mask = mask.bool()
    trained = mask.count_nonzero()
    # Sums in float64: in float32 the rounding of the mean of equal, large x would be blown up by 1 / sqrt(1e-8).
    mean = masked(x, mask).sum(1, dtype=torch.float64).sum() / trained.clamp(min=1)
    centred = masked(x - mean.to(x.dtype), mask)
    variance = centred.square().sum(1, dtype=torch.float64).sum() / (trained - 1).clamp(min=1)
    return centred * (variance + 1e-8).rsqrt().to(x.dtype)


@torch.no_grad()
def rloo(scores: Tensor, group_id: Tensor) -> Tensor:
    """r_i − Σ_{j≠i} r_j / (n − 1), the leave-one-out baseline (Ahmadian et al., 2402.14740).

    Args:
        scores: ``[B]``.
        group_id: ``[B]`` int64, any ids in any order; groups may differ in size.

    Returns:
        ``[B]``; 0 for a group of one, which has nobody to be compared with.
    """
    centred, index, size = _centre(scores, group_id)
    return (centred * (size / (size - 1).clamp(min=1))[index]).to(scores.dtype)


@torch.no_grad()
def grpo(scores: Tensor, group_id: Tensor, eps: float = 1e-6) -> Tensor:
    """(r − mean) / (std + ε) within each group, sample standard deviation (Shao et al., 2402.03300).

    Arguments as in :func:`rloo`. Returns ``[B]``; 0 for a group of one and for a group whose scores are all equal.
    """
    centred, index, size = _centre(scores, group_id)
    squares = torch.zeros_like(size, dtype=torch.float64).index_add(0, index, centred.square())
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    return (centred / (std[index] + eps)).to(scores.dtype)


@torch.no_grad()
def dr_grpo(scores: Tensor, group_id: Tensor) -> Tensor:
    """r − mean of the group (Liu et al., 2503.20783); aggregate its loss with ``constant``.

    Arguments as in :func:`rloo`. Returns ``[B]``; 0 for a group of one. Its expected gradient is (n − 1)/n of the
    policy gradient, because each sample is part of its own baseline.
    """
    return _centre(scores, group_id)[0].to(scores.dtype)


@torch.no_grad()
def reinforce_plus_plus(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Reward-to-go, whitened over the trained tokens of the whole batch (REINFORCE++, Hu et al., 2501.03262).

    ``[B, T]`` from ``[B, T]``, 0 outside the mask. The KL belongs into ``rewards``.
    """
    return whiten(reward_to_go(rewards, mask, gamma), mask)


@torch.no_grad()
def reinforce_plus_plus_baseline(
    rewards: Tensor, scores: Tensor, mask: Tensor, group_id: Tensor, gamma: float
) -> Tensor:
    """REINFORCE++ with the mean of the group's scores taken off first (2501.03262); ``[B, T]``.

    Args:
        rewards: ``[B, T]``, with ``scores`` on the last tokens.
        scores: ``[B]``, what the group is compared by; a group of one has the baseline of its own score.
    """
    baseline = dr_grpo(scores, group_id) - scores
    return reinforce_plus_plus(add_to_last_token(rewards, baseline, mask), mask, gamma)


@torch.no_grad()
def remax(rewards: Tensor, greedy_scores: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Reward-to-go less the score of the greedy response to the same prompt (ReMax, Li et al., 2310.10505).

    Args:
        rewards: ``[B, T]``.
        greedy_scores: ``[B]``; the same for all samples of a prompt.

    Returns:
        ``[B, T]``, 0 outside the mask.
    """
    return reward_to_go(add_to_last_token(rewards, -greedy_scores, mask), mask, gamma)


@torch.no_grad()
def zero_std_groups(scores: Tensor, group_id: Tensor) -> Tensor:
    """Number of groups whose scores are all equal, groups of one included: those that teach nothing. int64 scalar."""
    _, index, size = torch.unique(group_id, return_inverse=True, return_counts=True)
    return _all_equal(scores, index, size).sum()


def broadcast(sequence_advantages: Tensor, mask: Tensor) -> Tensor:
    """Each row's advantage ``[B]`` on all its trained tokens: ``[B, T]``, 0 outside the mask."""
    return masked(sequence_advantages[:, None], mask.bool())


def _centre(scores: Tensor, group_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores less the mean of their group (float64 ``[B]``), the group's index ``[B]``, the sizes ``[G]``."""
    _, index, size = torch.unique(group_id, return_inverse=True, return_counts=True)
    wide = scores.double()
    mean = torch.zeros_like(size, dtype=torch.float64).index_add(0, index, wide) / size
    # The mean of equal scores may differ from them in the last bit, and GRPO would divide that bit by ε.
    equal = _all_equal(scores, index, size)
    return torch.where(equal[index], 0, wide - mean[index]), index, size


def _all_equal(scores: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """``[G]`` bool; False where a score is NaN, so that the NaN stays visible."""
    empty = scores.new_zeros(len(size))
    low = empty.scatter_reduce(0, index, scores, "amin", include_self=False)
    return low == empty.scatter_reduce(0, index, scores, "amax", include_self=False)


def _slots(mask: Tensor) -> Tensor | None:
    """For each trained token its number within the row, for all others T: ``[B, T]`` int64.

    None where no row has an untrained token before a trained one: everything is in its place.
    """
    if not (mask[:, 1:] > mask[:, :-1]).any():
        return None
    return torch.where(mask, mask.cumsum(1) - 1, mask.shape[1])


def _compact(x: Tensor, mask: Tensor, slot: Tensor | None) -> Tensor:
    """The trained tokens of each row moved to its left end, then zeros: ``[B, T]``, or ``[B, T + 1]`` with slots."""
    x = masked(x, mask)
    return x if slot is None else x.new_zeros(x.shape[0], x.shape[1] + 1).scatter_(1, slot, x)


def _spread(x: Tensor, slot: Tensor | None) -> Tensor:
    """Back from :func:`_compact`: ``[B, T]``, 0 at untrained tokens."""
    return x if slot is None else x.gather(1, slot)


def _discounted_suffix_sum(x: Tensor, decay: float) -> Tensor:
    """y_t = x_t + decay · y_{t+1} along the last dimension of ``x [B, T]``.

    Within blocks of 64 by one triangular matrix of powers; then the blocks' first elements obey the same recurrence
    with decay^64. No power is above 1, so nothing overflows, and T tokens need log_64 T matrix products.
    """
    rows, length = x.shape
    size = min(length, _BLOCK)
    step = torch.arange(size, device=x.device, dtype=x.dtype)
    powers = torch.pow(decay, (step[:, None] - step).clamp(min=0)).tril()
    if length <= _BLOCK:
        return x @ powers
    local = pad(x, (0, -length % _BLOCK)).view(rows, -1, _BLOCK) @ powers
    carry = pad(_discounted_suffix_sum(local[:, :, 0], decay**_BLOCK)[:, 1:], (0, 1))
    local += carry[:, :, None] * torch.pow(decay, _BLOCK - step)
    return local.view(rows, -1)[:, :length]
