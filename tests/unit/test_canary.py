"""The figure that a weight sync is judged by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_dist.engines.canary import canary_difference


def test_by_hand() -> None:
    """V = 100: an even distribution gives -4.605. The second token counts half: its log-probability is twice that."""
    even = -math.log(100)
    expected = np.array([even, 2 * even, -0.1], np.float32)
    found = expected + np.array([0.01, 0.04, 0.015], np.float32)
    assert canary_difference(found, expected, 100) == pytest.approx(0.02, rel=1e-4)
    assert canary_difference(expected, expected, 100) == 0


def test_what_is_no_number_is_no_small_difference() -> None:
    expected = np.array([-1.0, -2.0], np.float32)
    assert math.isnan(canary_difference(np.array([-1.0, np.nan], np.float32), expected, 100))


def test_rounded_weights_pass_however_sharp_the_model_becomes() -> None:
    """A linear model in bfloat16 against float32: the plain difference grows with the logits, this figure does not."""
    import torch

    torch.manual_seed(0)
    inputs, weights, tokens = torch.randn(256, 64), torch.randn(64, 100) / 8, torch.randint(0, 100, (256, 1))
    plain, judged = [], []
    for sharpness in (1.0, 4.0, 16.0):
        exact = torch.log_softmax(inputs @ (sharpness * weights), -1).gather(1, tokens)[:, 0].numpy()
        rounded = (sharpness * weights).bfloat16().float()
        found = torch.log_softmax(inputs @ rounded, -1).gather(1, tokens)[:, 0].numpy()
        plain.append(np.abs(found - exact).max())
        judged.append(canary_difference(found, exact, 100))
    assert plain[2] > 8 * plain[0]
    assert max(judged) < 0.05


def test_other_weights_are_still_far_away() -> None:
    import torch

    torch.manual_seed(0)
    inputs, tokens = torch.randn(16, 64), torch.randint(0, 100, (16, 1))
    one, other = (
        torch.log_softmax(inputs @ torch.randn(64, 100), -1).gather(1, tokens)[:, 0].numpy() for _ in range(2)
    )
    assert canary_difference(one, other, 100) > 1
