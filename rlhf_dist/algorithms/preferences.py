"""Losses on comparisons: reward models (pairwise and K-wise) and direct preference optimisation.

Scores and sequence log-probabilities are ``[B]``; losses are per comparison or per prompt, without reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Metrics = dict[str, Tensor]


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, preference: Tensor, margin: Tensor | float = 0.0
) -> tuple[Tensor, Metrics]:
    """−p log σ(d) − (1 − p) log σ(−d) with d = r_w − r_l − margin: the cross entropy of the Bradley-Terry model.

    With p = 1 it is −log σ(d) (InstructGPT, 2203.02155; margin: Llama 2, 2307.09288). Labels that disagree make p a
    share, and a tie makes it ½, where the loss is least at d = 0.

    Args:
        chosen, rejected: scores of the two responses, ``[B]``.
        preference: p, ``[B]``, the probability that ``chosen`` is the better one.
        margin: ``[B]``, how much better the chosen one ought to be.

    Returns:
        loss ``[B]``; metrics ``accuracy`` (the side that is preferred scores higher; ties of scores or of labels count
        ½) and ``margin`` (its score less the other's, 0 where labels tie), both ``[B]``.
    """
    difference = chosen - rejected
    logit = difference - margin
    loss = -preference * logsigmoid(logit) - (1 - preference) * logsigmoid(-logit)
    return loss, _difference_metrics((2 * preference - 1).sign() * difference)


def kwise_loss(
    scores: Tensor, pair: Tensor, preference: Tensor, prompt: Tensor, total_prompts: float | Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Mean over prompts of the mean of :func:`pairwise_loss` over a prompt's pairs (2203.02155).

    A prompt with K responses has K(K−1)/2 pairs, or fewer where not all were compared; one forward for each response
    serves them all. Labels need not be transitive. A prompt without any pair does not count.

    Args:
        scores: ``[N]``, one for each response.
        pair: ``[P, 2]`` int64, the two responses of each pair.
        preference: ``[P]``, the probability that the first of a pair is the better one.
        prompt: ``[P]`` int64, the prompt of each pair; all pairs of a prompt are in the same call.
        total_prompts: prompts with a pair in the global batch, so that micro-batches and ranks add up; by default
            those of this call.

    Returns:
        loss, a scalar; metrics of :func:`pairwise_loss`, means over the pairs of each of the prompts: ``[prompts]``.
    """
    per_pair, parts = pairwise_loss(scores[pair[:, 0]], scores[pair[:, 1]], preference)
    _, index, pairs = torch.unique(prompt, return_inverse=True, return_counts=True)

    def mean_of_prompt(x: Tensor) -> Tensor:
        return x.new_zeros(len(pairs)).index_add(0, index, x) / pairs

    share = mean_of_prompt(per_pair).sum()
    total = max(len(pairs), 1) if total_prompts is None else total_prompts
    return share / total, {name: mean_of_prompt(x) for name, x in parts.items()}


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
