"""What must not change a result, and what must hold for any input: micro-batches, padding, observations, row order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_dist.algorithms import advantages, kl, losses, preferences, supervised
from rlhf_dist.algorithms.registry import POLICY_LOSSES, PolicyTerms

quick = settings(max_examples=25, deadline=None, derandomize=True)

COLUMNS = ["logprobs", "old", "rollout", "advantages", "values", "rewards"]
PolicyLoss = Callable[[SimpleNamespace], tuple[Tensor, dict[str, Tensor]]]
LOSSES: dict[str, PolicyLoss] = {
    "ppo": lambda b: losses.ppo_policy_loss(b.logprobs, b.old, b.advantages, b.mask, 0.2, 0.28, 3.0),
    "gspo": lambda b: losses.gspo_policy_loss(b.logprobs, b.old, b.advantages, b.mask, 0.1),
    "cispo": lambda b: losses.cispo_policy_loss(b.logprobs, b.old, b.advantages, b.mask, 0.2),
    "decoupled": lambda b: losses.decoupled_ppo_loss(b.logprobs, b.old, b.rollout, b.advantages, b.mask, 0.2),
    "a2c": lambda b: losses.a2c_policy_loss(b.logprobs, b.advantages, b.mask),
    "tis": lambda b: (
        losses.a2c_policy_loss(b.logprobs, b.advantages, b.mask)[0] * losses.tis(b.old, b.rollout, mask=b.mask),
        {},
    ),
    "sequence_mask": lambda b: (
        losses.a2c_policy_loss(b.logprobs, b.advantages, b.mask)[0]
        * losses.sequence_mask(b.old, b.rollout, b.mask, 0.8, 1.2),
        {},
    ),
    "k3": lambda b: (kl.kl_estimate(b.logprobs, b.old, "k3", b.mask), {}),
    "sft": lambda b: supervised.sft_loss(b.logprobs, b.mask),
}
AGGREGATIONS: list[losses.Aggregation] = ["token_mean", "sequence_mean", "constant"]


@st.composite
def batches(draw: st.DrawFn) -> SimpleNamespace:
    """Float64 columns ``[B, T]``, up to 7 × 9; any mask, also empty rows; NaN outside the mask."""
    rows, length = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    mask = torch.rand(rows, length, generator=generator) < density
    columns = {name: torch.randn(rows, length, generator=generator, dtype=torch.float64) for name in COLUMNS}
    columns["old"] = columns["logprobs"] + 0.3 * columns["old"]
    columns["rollout"] = columns["old"] + 0.3 * columns["rollout"]
    columns = {name: torch.where(mask, x, torch.nan) for name, x in columns.items()}
    scores = torch.randint(0, 4, (rows,), generator=generator).double()
    groups = torch.randint(0, 3, (rows,), generator=generator)
    return SimpleNamespace(mask=mask, **columns, scores=scores, group_id=groups)


def rearranged(batch: SimpleNamespace, change: Callable[[Tensor], Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**{name: change(x) for name, x in vars(batch).items()})


def with_columns(batch: SimpleNamespace, positions: list[int], length: int) -> SimpleNamespace:
    """The same trained tokens at ``positions`` of rows of ``length``; the tokens between them untrained and NaN."""

    def spread(x: Tensor) -> Tensor:
        if x.dim() < 2:
            return x
        wide = torch.full((len(x), length), False if x.dtype == torch.bool else torch.nan, dtype=x.dtype)
        wide[:, positions] = x
        return wide

    return rearranged(batch, spread)


def value_and_gradient(
    batch: SimpleNamespace, loss: PolicyLoss, how: losses.Aggregation, parts: list[SimpleNamespace]
) -> tuple[float, Tensor]:
    """Sum of the shares of ``parts``, with the totals of ``batch``; the gradient in the parts' log-probabilities."""
    tokens, sequences = batch.mask.sum(), len(batch.mask)
    total, gradients = 0.0, []
    for part in parts:
        x = part.logprobs.clone().requires_grad_()
        values, _ = loss(SimpleNamespace(**{**vars(part), "logprobs": x}))
        share = losses.aggregate(values, part.mask, how, tokens, sequences, max_length=20)
        share.backward()
        total += share.item()
        gradients.append(x.grad)
    return total, torch.cat(gradients)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
@quick
@given(batch=batches(), cut=st.integers(1, 6))
def test_micro_batches_add_up(name: str, how: losses.Aggregation, batch: SimpleNamespace, cut: int) -> None:
    whole, gradient = value_and_gradient(batch, LOSSES[name], how, [batch])
    parts = [rearranged(batch, lambda x, i=i: x[i : i + cut]) for i in range(0, len(batch.mask), cut)]
    split, split_gradient = value_and_gradient(batch, LOSSES[name], how, parts)
    assert split == pytest.approx(whole, abs=1e-12)
    torch.testing.assert_close(split_gradient, gradient)
    assert not gradient[~batch.mask].any()


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
@quick
@given(batch=batches(), data=st.data())
def test_padding_and_row_order_do_not_matter(
    name: str, how: losses.Aggregation, batch: SimpleNamespace, data: st.DataObject
) -> None:
    whole, gradient = value_and_gradient(batch, LOSSES[name], how, [batch])
    width = batch.mask.shape[1]
    positions = sorted(data.draw(st.sets(st.integers(0, width + 3), min_size=width, max_size=width)))
    order = data.draw(st.permutations(range(len(batch.mask))))
    changed = rearranged(with_columns(batch, positions, width + 4), lambda x: x[order])
    value, changed_gradient = value_and_gradient(batch, LOSSES[name], how, [changed])
    assert value == pytest.approx(whole, abs=1e-12)
    torch.testing.assert_close(changed_gradient[:, positions], gradient[order])


@quick
@given(batch=batches(), data=st.data(), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_observations_and_row_order_leave_advantages(
    batch: SimpleNamespace, data: st.DataObject, gamma: float, lam: float
) -> None:
    width = batch.mask.shape[1]
    positions = sorted(data.draw(st.sets(st.integers(0, width + 3), min_size=width, max_size=width)))
    order = data.draw(st.permutations(range(len(batch.mask))))
    changed = rearranged(with_columns(batch, positions, width + 4), lambda x: x[order])

    def estimate(b: SimpleNamespace) -> list[Tensor]:
        rewards = kl.token_rewards(b.scores, b.rewards, b.mask, 0.1)
        found, returns = advantages.gae(rewards, b.values, b.mask, gamma, lam)
        to_go = advantages.reward_to_go(rewards, b.mask, gamma)
        return [rewards, found, returns, to_go, advantages.whiten(found, b.mask)]

    for before, after in zip(estimate(batch), estimate(changed), strict=True):
        torch.testing.assert_close(after[:, positions], before[order])
        assert not after[~changed.mask].any()


@pytest.mark.parametrize("estimator", [advantages.rloo, advantages.grpo, advantages.dr_grpo])
@quick
@given(batch=batches(), data=st.data())
def test_group_baselines_ignore_order_and_names(
    estimator: Callable[[Tensor, Tensor], Tensor], batch: SimpleNamespace, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(batch.mask))))
    names = torch.tensor(data.draw(st.lists(st.integers(-(2**60), 2**60), min_size=3, max_size=3, unique=True)))
    found = estimator(batch.scores, batch.group_id)
    again = estimator(batch.scores[order], names[batch.group_id[order]])
    torch.testing.assert_close(again, found[order])
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, batch.group_id, found)
    torch.testing.assert_close(sums, torch.zeros_like(sums))
    torch.testing.assert_close(estimator(batch.scores + 5, batch.group_id), found)


@quick
@given(batch=batches())
def test_both_forms_of_rloo_are_equal(batch: SimpleNamespace) -> None:
    size = torch.bincount(batch.group_id)[batch.group_id].double()
    scaled = advantages.dr_grpo(batch.scores, batch.group_id) * size / (size - 1).clamp(min=1)
    torch.testing.assert_close(advantages.rloo(batch.scores, batch.group_id), scaled)


@quick
@given(batch=batches(), gamma=st.floats(0, 1))
def test_gae_with_lambda_one_is_reward_to_go_less_value(batch: SimpleNamespace, gamma: float) -> None:
    found, returns = advantages.gae(batch.rewards, batch.values, batch.mask, gamma, 1.0)
    to_go = advantages.reward_to_go(batch.rewards, batch.mask, gamma)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(found, torch.where(batch.mask, to_go - batch.values, 0))


@quick
@given(batch=batches())
def test_whitened_moments(batch: SimpleNamespace) -> None:
    found = advantages.whiten(batch.advantages, batch.mask)[batch.mask]
    if len(found) > 1:
        assert found.mean().item() == pytest.approx(0, abs=1e-9)
        assert found.var().item() == pytest.approx(1, abs=1e-3)
    else:
        assert not found.any()


@quick
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), st.sampled_from([torch.float32, torch.float64])
)
def test_k2_and_k3_are_never_negative(ratios: list[float], dtype: torch.dtype) -> None:
    policy = torch.tensor([ratios], dtype=dtype, requires_grad=True)
    for estimator in ("k2", "k3"):
        value = kl.kl_estimate(policy, torch.zeros_like(policy), estimator)
        value.sum().backward()
        assert value.isfinite().all()
        assert (value >= 0).all()
    assert kl.kl_estimate(policy, policy, "k3").abs().max() == 0
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
@quick
@given(batch=batches())
def test_on_policy_every_loss_has_the_policy_gradient(name: str, batch: SimpleNamespace) -> None:
    """At ρ = 1; GSPO's, a mean over the row, needs the same advantage on all of a row's tokens."""
    batch.advantages = advantages.broadcast(batch.scores, batch.mask)
    batch.old = batch.logprobs
    _, gradient = value_and_gradient(
        batch,
        lambda b: POLICY_LOSSES[name](PolicyTerms(b.logprobs, b.old, b.old, b.advantages, b.mask, 0.2, None, None)),
        "sequence_mean",
        [batch],
    )
    _, expected = value_and_gradient(batch, LOSSES["a2c"], "sequence_mean", [batch])
    torch.testing.assert_close(gradient, expected)


@quick
@given(batch=batches(), width=st.floats(0.01, 1))
def test_gspo_equals_its_token_form(batch: SimpleNamespace, width: float) -> None:
    """GSPO-token: ratio sg(s) · π / sg(π) per token, equal where A is constant in a row (2507.18071, section 4.3)."""
    batch.advantages = advantages.broadcast(batch.scores - 1.5, batch.mask)

    def token_form(b: SimpleNamespace) -> tuple[Tensor, dict[str, Tensor]]:
        policy, old = (torch.where(b.mask, x, 0) for x in (b.logprobs, b.old))
        mean = (policy - old).detach().sum(1, keepdim=True) / b.mask.sum(1, keepdim=True).clamp(min=1)
        ratio = mean.exp() * (policy - policy.detach()).exp()
        bounded = ratio.clamp(1 - width, 1 + width)
        return torch.where(b.mask, -torch.minimum(ratio * b.advantages, bounded * b.advantages), 0), {}

    value, gradient = value_and_gradient(
        batch,
        lambda b: losses.gspo_policy_loss(b.logprobs, b.old, b.advantages, b.mask, width),
        "sequence_mean",
        [batch],
    )
    expected, expected_gradient = value_and_gradient(batch, token_form, "sequence_mean", [batch])
    assert value == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient, expected_gradient)


@quick
@given(st.integers(0, 1000), st.integers(1, 6))
def test_kwise_is_the_sum_of_the_pairs_and_micro_batches_add_up(seed: int, prompts: int) -> None:
    """Against a loop over prompts of pairwise losses, in float64: K from 2 to 5, ties, shares, pairs left out."""
    rng = random.Random(seed)
    scores = torch.randn(5 * prompts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores.requires_grad_()
    rows = [
        (p, 5 * p + i, 5 * p + j, rng.choice([0.0, 0.25, 0.5, 1.0]))
        for p in range(prompts)
        for i, j in itertools.combinations(range(rng.randint(2, 5)), 2)
        if (i, j) == (0, 1) or rng.random() < 0.8
    ]

    def loss(chosen: Callable[[int], bool]) -> Tensor:
        kept = [row for row in rng.sample(rows, len(rows)) if chosen(row[0])]
        prompt, first, second, share = (torch.tensor(column) for column in zip(*kept, strict=True))
        pair = torch.stack([first, second], 1)
        return preferences.kwise_loss(scores, pair, share.double(), prompt, total_prompts=prompts)[0]

    expected = torch.zeros((), dtype=torch.float64)
    for of_prompt in ([row for row in rows if row[0] == p] for p in range(prompts)):
        for _, i, j, share in of_prompt:
            one = preferences.pairwise_loss(scores[i], scores[j], torch.tensor(share, dtype=torch.float64))[0]
            expected = expected + one / len(of_prompt) / prompts
    (slope,) = torch.autograd.grad(expected, scores)
    parts = [loss(lambda p: p % 2 == 0), *([loss(lambda p: p % 2 == 1)] if prompts > 1 else [])]
    for found in (loss(lambda p: True), sum(parts)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(found, scores)[0], slope, rtol=1e-12, atol=1e-14)


@quick
@given(st.integers(0, 1000), st.integers(1, 6))
def test_distillation_is_a_lower_bound_of_the_full_kl(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 1, 3, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    top, ids = teacher.topk(k)
    full = (teacher.exp() * (teacher - student)).sum(-1)
    mask = torch.ones(1, 3)
    found, _ = supervised.distillation_loss(student, ids, top, mask)
    assert ((found >= -1e-12) & (found <= full + 1e-12)).all()
    same, _ = supervised.distillation_loss(teacher, ids, top, mask)
    torch.testing.assert_close(same, torch.zeros_like(same))


@pytest.mark.parametrize("decay", [1.0, 0.95, 0.01, 1e-30, 0.0])
@pytest.mark.parametrize("length", [63, 64, 65, 4097])
def test_long_rows_neither_overflow_nor_drift(decay: float, length: int) -> None:
    """Float32 against the recursion in float64, around the edges of the scan's blocks."""
    rewards = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    expected = torch.zeros(2, length, dtype=torch.float64)
    carry = torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(length)):
        carry = rewards[:, t].double() + decay * carry
        expected[:, t] = carry
    found = advantages.reward_to_go(rewards, torch.ones(2, length), decay)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
