"""Ragged batches with awkward cases, and how a result is compared with a slow reference; for the oracle tests.

A reference sees one row at a time, its trained tokens only, as lists of floats. So it cannot share a mistake about
masks or padding with the code. Whatever lies outside the mask is NaN in the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

CASES = ["random", "long", "one_token", "one_sample", "empty_response", "all_masked", "huge_ratios", "on_policy"]
NAMES = ["logprobs", "old", "rollout", "ref", "advantages", "values", "old_values", "returns", "rewards"]
Row = dict[str, list[float]]


def make_batch(case: str, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """Columns ``[B, T]`` with NaN outside ``mask``, and ``weight``, a random upstream gradient of the loss."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    rows, length = {"one_token": (1, 1), "one_sample": (1, 7), "long": (3, 300)}.get(case, (6, 9))

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, length, generator=generator, dtype=torch.float64)

    ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.rand(rows, length, generator=generator) < 0.7) & (torch.arange(length) < ends)
    mask[:, 0] = True
    if case == "empty_response":
        mask[[0, 3]] = False
    if case == "all_masked":
        mask[:] = False
    columns = {name: normal() for name in NAMES}
    columns["logprobs"] -= 2
    for name, scale in (("old", 0.3), ("rollout", 0.3), ("ref", 0.8)):
        columns[name] = columns["logprobs"] + normal(scale)
    if case == "huge_ratios":
        columns["old"] = columns["logprobs"] + normal(40)
        columns["rollout"] = columns["old"] + normal(40)
    if case == "on_policy":
        columns["old"] = columns["rollout"] = columns["ref"] = columns["logprobs"].clone()
    columns = {name: torch.where(mask, x, torch.nan).to(dtype) for name, x in columns.items()}
    return SimpleNamespace(**columns, mask=mask, weight=normal().to(dtype), scores=normal()[:, 0].to(dtype))


def rows_of(batch: SimpleNamespace) -> Iterator[tuple[int, list[int], Row]]:
    for b in range(len(batch.mask)):
        tokens = [t for t, trained in enumerate(batch.mask[b].tolist()) if trained]
        yield b, tokens, {name: [float(getattr(batch, name)[b, t]) for t in tokens] for name in [*NAMES, "weight"]}


def assert_rows(found: Tensor, batch: SimpleNamespace, reference: Callable[[int, Row], list[float]]) -> None:
    """``found`` equals the reference on the trained tokens of each row, and is 0 elsewhere."""
    expected = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for b, tokens, row in rows_of(batch):
        for t, value in zip(tokens, reference(b, row), strict=True):
            expected[b, t] = value
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def assert_loss(
    batch: SimpleNamespace,
    function: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    reference: Callable[[Row], tuple[list[float], list[float]]],
    variable: str = "logprobs",
) -> dict[str, Tensor]:
    """Loss and the gradient of Σ weight · loss in ``variable``; the reference returns both for one row."""
    x = getattr(batch, variable).clone().requires_grad_()
    loss, metrics = function(x)
    (batch.weight * loss).sum().backward()
    assert_rows(loss.detach(), batch, lambda _, row: reference(row)[0])
    assert x.grad is not None
    assert_rows(x.grad, batch, lambda _, row: reference(row)[1])
    for name, metric in metrics.items():
        assert metric.shape == batch.mask.shape, name
        assert not metric.requires_grad, name
        assert not metric[~batch.mask].any(), name
    return metrics


def clamp(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def zip_row(row: Row, *names: str) -> Iterator[tuple[float, ...]]:
    return zip(*(row[name] for name in names), strict=True)
