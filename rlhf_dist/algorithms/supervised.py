"""Losses that imitate: supervised finetuning and distillation. Per token, 0 outside the mask; reduce with aggregate."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.algorithms.masking import masked


def sft_loss(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy −log π on the response's tokens only: ``[B, T]``, no metrics.

    On pretraining text, where every token but the first is the response, it is the second term of PPO-ptx (2203.02155).
    """
    return -masked(logprobs, mask.bool()), {}


def distillation_loss(
    student_logits: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(teacher ‖ student) over the teacher's K most likely tokens, all others as one class (2112.00861; 2204.05862).

    A lower bound of the full KL; equal to it for K = V.

    Args:
        student_logits: ``[B, T, V]``, with gradient.
        teacher_topk_ids: ``[B, T, K]`` int64, different ids at each position, K ≤ V.
        teacher_topk_logprobs: ``[B, T, K]``, their log-probabilities under the teacher, normalised over all V.
        mask: ``[B, T]``.

    Returns:
        loss ``[B, T]`` in nats, float32 or wider; no metrics.
    """
    mask = mask.bool()
    # Trained positions only: neither memory nor the gradient is spent on the others.
    ids, teacher = teacher_topk_ids[mask], teacher_topk_logprobs[mask]
    student = student_logits[mask]
    student = torch.log_softmax(student, -1, dtype=torch.promote_types(student.dtype, torch.float32))
    teacher = teacher.to(student.dtype)
    probs = teacher.exp()
    kl = -(torch.special.entr(probs) + probs * student.gather(-1, ids)).sum(-1)
    if ids.shape[-1] < student.shape[-1]:
        rest = (1 - probs.sum(-1)).clamp(min=0)
        # From the other tokens themselves, not as 1 − Σ: exact also where the student gives them almost nothing.
        student_rest = student.scatter(-1, ids, -torch.inf).logsumexp(-1)
        kl = kl - torch.special.entr(rest) - rest * student_rest
    return kl.new_zeros(mask.shape).masked_scatter(mask, kl), {}
