"""Selecting and counting trained tokens, in the forms that torch is quick at on CPUs too."""

from __future__ import annotations

import torch
from torch import Tensor


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask``, else 0, NaN or not; both broadcast.

    With a 0-dim tensor in place of the number 0, torch 2.13 is four times as fast.
    """
    return torch.where(mask, x, x.new_zeros(()))


def count(mask: Tensor) -> Tensor:
    """Trained tokens of each row of a bool ``mask [B, T]``: ``[B, 1]`` int64. Summing a bool mask is far slower."""
    return mask.count_nonzero(1)[:, None]
