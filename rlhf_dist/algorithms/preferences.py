"""Losses on comparisons: reward models (pairwise and K-wise) and direct preference optimisation.

Scores and sequence log-probabilities are ``[B]``; losses are per comparison or per prompt, without reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Metrics = dict[str, Tensor]


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """−log σ(r_w − r_l − margin) (InstructGPT, 2203.02155; margin: Llama 2, 2307.09288).

    Args:
        chosen, rejected: scores of the two responses, ``[B]``.
        margin: ``[B]``, how much better the chosen one ought to be; 0 if not given.

    Returns:
        loss ``[B]``; metrics ``accuracy`` (a tie counts ½) and ``margin`` (r_w − r_l), both ``[B]``.
    """
    difference = chosen - rejected
    loss = -logsigmoid(difference if margin is None else difference - margin)
    return loss, _difference_metrics(difference)


def kwise_loss(
    scores: Tensor, prompt: Tensor, rank: Tensor, total_prompts: float | Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Mean over prompts of the mean of −log σ(r_i − r_j) over a prompt's pairs with i ranked above j (2203.02155).

    Without ties a prompt with K responses has K(K−1)/2 pairs. Ties give no pair and do not count in the mean; a
    prompt without any pair is left out.

    Args:
        scores: ``[N]``, one forward per response; all responses of a prompt are in the same call.
        prompt: ``[N]`` int64, any ids in any order.
        rank: ``[N]``, lower is better.
        total_prompts: prompts with a pair in the global batch, so that micro-batches and ranks add up; by default
            those of this call.

    Returns:
        loss, a scalar; metrics ``accuracy`` (a tie of scores counts ½) and ``margin`` (r_i − r_j), means over the
        pairs of each of the P prompts that have one: ``[P]``.
    """
    better, worse = torch.nonzero((prompt[:, None] == prompt) & (rank[:, None] < rank), as_tuple=True)
    _, index, pairs = torch.unique(prompt[better], return_inverse=True, return_counts=True)
    difference = scores[better] - scores[worse]

    def mean_of_prompt(x: Tensor) -> Tensor:
        return x.new_zeros(len(pairs)).index_add(0, index, x) / pairs

    metrics = {name: mean_of_prompt(x) for name, x in _difference_metrics(difference).items()}
    share = mean_of_prompt(-logsigmoid(difference)).sum()
    return share / (max(len(pairs), 1) if total_prompts is None else total_prompts), metrics


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """−log σ(βh), h = log(π/q)(chosen) − log(π/q)(rejected) (DPO, Rafailov et al., 2305.18290).

    With label smoothing ε it is conservative DPO, −(1 − ε) log σ(βh) − ε log σ(−βh): ε is the share of labels
    believed to be wrong.

    Args:
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs: log-probabilities of whole
            responses, summed over tokens, ``[B]``.

    Returns:
        loss ``[B]``; metrics ``accuracy``, ``margin`` (βh), ``chosen_reward`` and ``rejected_reward`` (β log π/q).

    Raises:
        ValueError: if label_smoothing is not in [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}: expected at least 0 and below 0.5, where labels mean nothing"
        )
    chosen = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected = beta * (rejected_logprobs - ref_rejected_logprobs)
    logit = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
    return loss, _implicit_reward_metrics(chosen, rejected)


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
) -> tuple[Tensor, Metrics]:
    """(h − 1/(2β))² (IPO, Azar et al., 2310.12036); arguments, h and metrics as in :func:`dpo_loss`.

    Raises:
        ValueError: if beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}: IPO aims at a log-ratio of 1/(2 beta) and needs beta above 0")
    chosen, rejected = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    loss = (chosen - rejected - 1 / (2 * beta)).square()
    return loss, _implicit_reward_metrics(beta * chosen, beta * rejected)


def _implicit_reward_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    metrics = {"chosen_reward": chosen.detach(), "rejected_reward": rejected.detach()}
    return metrics | _difference_metrics(chosen - rejected)


def _difference_metrics(difference: Tensor) -> Metrics:
    difference = difference.detach()
    return {"accuracy": 0.5 * (1 + difference.sign()), "margin": difference}
