"""The algorithms of the field as pure functions on tensors: tensors and numbers in, tensors out.

Everything is padded: ``[B, T]`` with a ``mask`` of the same shape (bool or 0/1) whose ones are the trained response
tokens. A row is one sample. What stands at masked positions never matters, not even NaN.

The tables hold what can be exchanged for one another without touching the caller. A new variant is a function of the
same signature and one line here; from outside the package, ``POLICY_LOSSES["mine"] = my_loss`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlhf_dist.algorithms.advantages import dr_grpo, grpo, rloo
from rlhf_dist.algorithms.losses import cispo_policy_loss, gspo_policy_loss, ppo_policy_loss

#: ``f(scores [B], group_id [B]) -> [B]``. ``gae`` and ``reward_to_go`` need rewards per token and are called by name.
ADVANTAGE_ESTIMATORS: dict[str, Callable[..., Tensor]] = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}

#: ``f(logprobs, old_logprobs, advantages, mask, eps_clip, eps_clip_high=None) -> (loss [B, T], metrics)``.
POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "ppo": ppo_policy_loss,
    "gspo": gspo_policy_loss,
    "cispo": cispo_policy_loss,
}
