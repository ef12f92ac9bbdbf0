"""What the config chooses from by name, and what each choice may look at.

A new variant is one function and one line here; one of your own needs no line:
``algo.policy_loss=my_package.losses:my_loss``, a function of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf_dist.algorithms import advantages as adv
from rlhf_dist.algorithms import losses


@dataclass(frozen=True)
class RewardTerms:
    """What an advantage estimator may look at: one whole batch, before any minibatch is cut."""

    rewards: Tensor
    """``[B, T]``: the score on the last trained token, and the KL where it is in the reward; 0 outside the mask."""
    scores: Tensor
    """``[B]``, after normalisation, clipping and penalties."""
    mask: Tensor
    """``[B, T]`` bool."""
    group_id: Tensor
    """``[B]`` int64, equal for the samples of one prompt."""
    values: Tensor | None
    """``[B, T]`` of the critic, where there is one."""
    greedy_scores: Tensor | None
    """``[B]``, score of the greedy response to the same prompt, for remax."""
    gamma: float
    gae_lambda: float


@dataclass(frozen=True)
class PolicyTerms:
    """What a policy loss may look at: one micro-batch; tensors are ``[B, T]``."""

    logprobs: Tensor
    """Of the policy that learns; the only one with a gradient."""
    old_logprobs: Tensor
    """Of the policy before the first update of this batch."""
    rollout_logprobs: Tensor
    """As the generator sampled."""
    advantages: Tensor
    mask: Tensor
    eps_clip: float
    eps_clip_high: float | None
    dual_clip: float | None


def _per_sample(estimator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[RewardTerms], tuple[Tensor, None]]:
    """An estimator that compares the total rewards of a prompt's samples, spread over their tokens."""

    def estimate(t: RewardTerms) -> tuple[Tensor, None]:
        return adv.broadcast(estimator(t.rewards.sum(1), t.group_id), t.mask), None

    return estimate


def _gae(t: RewardTerms) -> tuple[Tensor, Tensor]:
    assert t.values is not None
    return adv.gae(t.rewards, t.values, t.mask, t.gamma, t.gae_lambda)


def _remax(t: RewardTerms) -> tuple[Tensor, None]:
    assert t.greedy_scores is not None
    return adv.remax(t.rewards, t.greedy_scores, t.mask, t.gamma), None


#: ``f(RewardTerms) -> (advantages [B, T], returns [B, T] for the critic or None)``, 0 outside the mask; not yet
#: whitened, except where whitening is part of the algorithm.
ADVANTAGE_ESTIMATORS: dict[str, Callable[[RewardTerms], tuple[Tensor, Tensor | None]]] = {
    "gae": _gae,
    "reinforce": lambda t: (adv.reward_to_go(t.rewards, t.mask, t.gamma), None),
    "reinforce_plus_plus": lambda t: (adv.reinforce_plus_plus(t.rewards, t.mask, t.gamma), None),
    "reinforce_plus_plus_baseline": lambda t: (
        adv.reinforce_plus_plus_baseline(t.rewards, t.scores, t.mask, t.group_id, t.gamma),
        None,
    ),
    "remax": _remax,
    "rloo": _per_sample(adv.rloo),
    "grpo": _per_sample(adv.grpo),
    "dr_grpo": _per_sample(adv.dr_grpo),
}

#: ``f(PolicyTerms) -> (loss [B, T], metrics)``, not reduced; every metric is ``[B, T]`` without gradient.
POLICY_LOSSES: dict[str, Callable[[PolicyTerms], tuple[Tensor, dict[str, Tensor]]]] = {
    "ppo": lambda t: losses.ppo_policy_loss(
        t.logprobs, t.old_logprobs, t.advantages, t.mask, t.eps_clip, t.eps_clip_high, t.dual_clip
    ),
    "a2c": lambda t: losses.a2c_policy_loss(t.logprobs, t.advantages, t.mask),
    "gspo": lambda t: losses.gspo_policy_loss(
        t.logprobs, t.old_logprobs, t.advantages, t.mask, t.eps_clip, t.eps_clip_high
    ),
    "cispo": lambda t: losses.cispo_policy_loss(
        t.logprobs, t.old_logprobs, t.advantages, t.mask, t.eps_clip, t.eps_clip_high
    ),
    "decoupled_ppo": lambda t: losses.decoupled_ppo_loss(
        t.logprobs,
        t.old_logprobs,
        t.rollout_logprobs,
        t.advantages,
        t.mask,
        t.eps_clip,
        t.eps_clip_high,
        t.dual_clip,
    ),
}

#: ``f(old_logprobs, rollout_logprobs, mask, low, high) -> weight [B, T]`` without gradient, a factor of the loss.
CORRECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {
    "tis": lambda old, rollout, mask, _, high: losses.tis(old, rollout, high, mask),
    "icepop": lambda old, rollout, mask, low, high: losses.icepop(old, rollout, low, high, mask),
    "sequence_mask": losses.sequence_mask,
}
