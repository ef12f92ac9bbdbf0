"""What ``algorithms.py`` measures: our computation and the same one of verl or TRL, on one batch of random tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_dist.algorithms.advantages import whiten
from rlhf_dist.algorithms.kl import token_rewards
from rlhf_dist.algorithms.losses import aggregate
from rlhf_dist.algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, PolicyTerms, RewardTerms

GROUP = 8
GAMMA, LAMBDA = 0.99, 0.95
LOW, HIGH, DUAL = 0.2, 0.28, 3.0

Tensors = tuple[Tensor, ...]
Step = Callable[[], Tensors]
Loss = Callable[[Tensor], tuple[Tensor, dict[str, Any]]]
How = Literal["token_mean", "sequence_mean"]
#: verl's names for the two.
VERL_HOW: dict[How, str] = {"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean"}


@dataclass(frozen=True)
class Pair:
    """Two computations of the same tensors. ``ours`` starts with a name from the tables of ``rlhf_dist.algorithms``.

    All tensors that ``run_ours`` returns must equal the first ones of ``run_theirs``.
    """

    ours: str
    library: str
    theirs: str
    backward: bool
    run_ours: Step
    run_theirs: Step


def make_batch(rows: int, length: int) -> SimpleNamespace:
    """Random columns of the shapes of ``RewardTerms`` and ``PolicyTerms``, 0 outside the mask.

    Rows end at log-normal lengths; their masks have no holes. Policy advantages are equal within a row, as group
    estimators make them: TRL has no others, and it is there that our form of GSPO has the gradient of the other two.
    """
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    lengths = (length / 4 * normal(rows, 1).exp()).clamp(1, length).long()
    mask = torch.arange(length) < lengths

    def noise(scale: float) -> Tensor:
        return scale * normal(rows, length) * mask

    scores = normal(rows)
    logprobs = noise(1.0) - 2.0 * mask
    return SimpleNamespace(
        mask=mask,
        # Their pipelines have int64 masks; they get float32 here, which saves them a conversion in every product.
        weights=mask.float(),
        tokens=int(mask.sum()),
        # Groups of eight or a few more, never of one: verl leaves the score of a single sample as it is, we give 0.
        group_id=torch.arange(rows) % max(rows // GROUP, 1),
        scores=scores,
        greedy_scores=normal(rows),
        outcomes=token_rewards(scores, noise(1.0), mask, 0.0),
        rewards=token_rewards(scores, noise(1.0), mask, 0.01),
        values=noise(1.0),
        logprobs=logprobs,
        # Spread by token and by row, so that every clip is at work.
        old_logprobs=logprobs + noise(0.5) + 0.3 * normal(rows, 1) * mask,
        advantages=normal(rows, 1) * mask,
    )


def advantage_pairs(b: SimpleNamespace, verl: Any) -> list[Pair]:
    """Forward passes. Returns are compared too where both libraries mean the same by them.

    ``verl`` is its module ``core_algos``, or None: then ``run_theirs`` of its pairs must not be called.
    """
    index, plus = b.group_id.numpy(), "reinforce_plus_plus"
    discount = SimpleNamespace(gamma=GAMMA)

    def of_verl(name: str, ours: Step, function: str, *args: Any, **options: Any) -> Pair:
        return Pair(name, "verl", function, False, ours, lambda: getattr(verl, function)(*args, **options))

    def by_group(name: str, variant: str, **options: Any) -> Pair:
        function = f"compute_{variant}_outcome_advantage"
        return of_verl(name, lambda: _estimate(name, b)[:1], function, b.rewards, b.weights, index, **options)

    def gae() -> Tensors:
        """As the pipeline runs it; the others whiten within the same function."""
        advantages, returns = _estimate("gae", b, GAMMA)
        return whiten(advantages, b.mask), returns

    def plus_baseline() -> Tensors:
        # verl spreads the sum of the rewards over all tokens: the reward-to-go of an outcome without discount.
        return _estimate(f"{plus}_baseline", b, rewards=b.outcomes)[:1]

    verl_gae = (b.rewards, b.values, b.weights, GAMMA, LAMBDA)
    verl_plus, verl_remax = f"compute_{plus}_outcome_advantage", "compute_remax_outcome_advantage"
    verl_baseline = f"compute_{plus}_baseline_outcome_advantage"
    return [
        of_verl("gae, whiten", gae, "compute_gae_advantage_return", *verl_gae),
        by_group("grpo", "grpo"),
        by_group("grpo", "grpo_vectorized"),
        by_group("dr_grpo", "grpo_vectorized", norm_adv_by_std_in_grpo=False),
        by_group("rloo", "rloo"),
        by_group("rloo", "rloo_vectorized"),
        of_verl(plus, lambda: _estimate(plus, b, GAMMA), verl_plus, b.rewards, b.weights, config=discount),
        of_verl(f"{plus}_baseline", plus_baseline, verl_baseline, b.outcomes, b.weights, index),
        # verl's has no discount.
        of_verl("remax", lambda: _estimate("remax", b), verl_remax, b.rewards, b.greedy_scores, b.weights),
    ]


def loss_pairs(b: SimpleNamespace, verl: Any, trl: Any) -> list[Pair]:
    """Forward and backward passes; ``verl`` as in :func:`advantage_pairs`, ``trl`` is the GRPO trainer or None.

    The dual clip is on against verl, which cannot do without, and off against TRL, which has none. CISPO's lower
    bound is 0, since the paper and TRL have none.
    """

    def of_verl(name: str, variant: str, how: How = "token_mean", low: float = LOW, dual: float | None = None) -> Pair:
        function = f"compute_policy_loss_{variant}"
        ours, theirs = _our_loss(name, b, how, low, dual), _verl_loss(function, b, verl, how, low)
        return Pair(name, "verl", function, True, _with_gradient(ours, b), _with_gradient(theirs, b))

    def of_trl(name: str, kind: str, level: str, how: How = "token_mean", low: float = LOW) -> Pair:
        function = f"GRPOTrainer._compute_loss, {kind}, {level}"
        ours, theirs = _our_loss(name, b, how, low, None), _trl_loss(b, trl, kind, level, low)
        return Pair(name, "trl", function, True, _with_gradient(ours, b), _with_gradient(theirs, b))

    return [
        of_verl("ppo", "vanilla", dual=DUAL),
        of_trl("ppo", "dapo", "token"),
        of_verl("gspo", "gspo", "sequence_mean"),
        of_trl("gspo", "grpo", "sequence", "sequence_mean"),
        of_verl("cispo", "cispo", low=1.0),
        of_trl("cispo", "cispo", "token", low=1.0),
        of_verl("a2c", "gpg"),
    ]


def _estimate(name: str, b: SimpleNamespace, gamma: float = 1.0, rewards: Tensor | None = None) -> Tensors:
    """Advantages, and returns where the estimator has any: without a critic they are of no use."""
    terms = RewardTerms(
        rewards=b.rewards if rewards is None else rewards,
        scores=b.scores,
        mask=b.mask,
        group_id=b.group_id,
        values=b.values,
        greedy_scores=b.greedy_scores,
        gamma=gamma,
        gae_lambda=LAMBDA,
    )
    advantages, returns = ADVANTAGE_ESTIMATORS[name](terms)
    return (advantages,) if returns is None else (advantages, returns)


def _our_loss(name: str, b: SimpleNamespace, how: How, low: float, dual_clip: float | None) -> Loss:
    """Loss and metrics reduced as the learner does it, by totals that it knows beforehand."""
    rows = len(b.mask)

    def loss(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = PolicyTerms(logprobs, b.old_logprobs, b.old_logprobs, b.advantages, b.mask, low, HIGH, dual_clip)
        per_token, metrics = POLICY_LOSSES[name](terms)
        means = {key: aggregate(x, b.mask, "token_mean", b.tokens, rows) for key, x in metrics.items()}
        return aggregate(per_token, b.mask, how, b.tokens, rows), means

    return loss


def _verl_loss(function: str, b: SimpleNamespace, verl: Any, how: How, low: float) -> Loss:
    """verl reduces within its functions, by the totals in its config."""
    config = verl and verl.ActorConfig(
        strategy="fsdp",
        rollout_n=GROUP,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=HIGH,
        clip_ratio_c=DUAL,
        global_batch_info={"batch_num_tokens": b.tokens, "global_batch_size": len(b.mask)},
    )
    return lambda logprobs: getattr(verl, function)(
        b.old_logprobs, logprobs, b.advantages, b.weights, VERL_HOW[how], config
    )


def _trl_loss(b: SimpleNamespace, trainer: Any, kind: str, level: str, low: float) -> Loss:
    """The trainer's method without a trainer: a stand-in has what the method reads, in the model's place stand its
    log-probabilities.

    KL, entropy bonus and vLLM's correction are off, one rank gathers nothing. Token ids are empty, and entropies,
    which TRL always averages, are one column. What ours does not do is then a copy of the mask, where TRL joins that
    of the prompts, empty here, to that of the responses.
    """
    nothing, entropies = torch.empty(len(b.mask), 0, dtype=torch.long), torch.zeros(len(b.mask), 1)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": b.weights[:, :0],
        "completion_ids": nothing,
        "completion_mask": b.weights,
        "advantages": b.advantages[:, 0].clone(),
        "old_per_token_logps": b.old_logprobs,
        "num_items_in_batch": torch.tensor(float(b.tokens)),
    }
    stand_in = SimpleNamespace(
        loss_type=kind,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=1 + HIGH if kind == "cispo" else HIGH,  # there it is the bound itself
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda logprobs, *_, **__: (logprobs, entropies, None),
    )

    def loss(logprobs: Tensor) -> tuple[Tensor, dict[str, Any]]:
        stand_in._metrics = {"train": defaultdict(list)}
        value = trainer._compute_loss(stand_in, logprobs, inputs)
        return value, {}  # the metrics are numbers already

    return loss


def _with_gradient(loss: Loss, b: SimpleNamespace) -> Step:
    """Loss and gradient; the metrics are read as numbers, as the learners of all three do in each micro-batch."""

    def step() -> Tensors:
        logprobs = b.logprobs.detach().requires_grad_()
        value, metrics = loss(logprobs)
        value.backward()
        for metric in metrics.values():
            float(metric)
        assert logprobs.grad is not None
        return value.detach(), logprobs.grad

    return step
