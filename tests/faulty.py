"""Losses and estimators that go wrong where a test wants them to; the config takes them as functions."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.algorithms.losses import ppo_policy_loss
from rlhf_dist.algorithms.registry import PolicyTerms

#: Advantages at which :func:`sharp_loss` has no slope, and at which it is infinite.
EDGE, CLIFF = 7.0, 8.0


def sharp_loss(terms: PolicyTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss, but the gradient is NaN where the advantage is ``EDGE``, and the loss alone infinite at ``CLIFF``."""
    loss, parts = ppo_policy_loss(
        terms.logprobs,
        terms.old_logprobs,
        terms.advantages,
        terms.mask,
        eps_clip=terms.eps_clip,
        eps_clip_high=terms.eps_clip_high,
        dual_clip=terms.dual_clip,
    )
    marked = (terms.advantages == EDGE) & terms.mask
    zero = (terms.logprobs - terms.logprobs.detach()).abs()
    edge = torch.where(marked, torch.sqrt(torch.where(marked, zero, 1.0)), 0.0)
    cliff = torch.where((terms.advantages == CLIFF) & terms.mask, torch.inf, 0.0)
    return loss + edge + cliff, parts
