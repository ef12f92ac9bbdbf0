"""From logits to log-probabilities and entropy."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the labels, computed in float32 (float64 for float64 logits).

    Args:
        logits: ``[B, T, V]``; ``logits[:, t]`` predicts ``labels[:, t]``.
        labels: ``[B, T]`` int64, all of them valid ids, also where they do not matter.
        temperature: the one that sampled; the learner's log-probabilities are compared with the sampler's.

    Returns:
        ``[B, T]``.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: log-probabilities need a temperature above 0; for greedy use 1")
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = torch.log_softmax(logits, -1, dtype=_wide(logits))
    return logprobs.gather(-1, labels[..., None]).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """−Σ p log p in nats, float32 or wider: ``[..., V]`` to ``[...]``. Logits of −inf are classes of probability 0."""
    logprobs = torch.log_softmax(logits, -1, dtype=_wide(logits))
    return -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0)).sum(-1)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Σ of the trained tokens' log-probabilities: ``[B, T]`` to ``[B]``; 0 for a row without any."""
    return torch.where(mask.bool(), logprobs, 0).sum(-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
