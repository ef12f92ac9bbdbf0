"""Advantages and KL against slow references in plain Python floats, written from the papers: values, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from algorithm_batches import CASES, Row, assert_loss, assert_rows, clamp, make_batch, rows_of, zip_row

from rlhf_dist.algorithms import advantages, kl, kl_control
from rlhf_dist.algorithms.registry import ADVANTAGE_ESTIMATORS, RewardTerms


@pytest.fixture(params=CASES)
def batch(request: pytest.FixtureRequest) -> SimpleNamespace:
    return make_batch(request.param)


# --- advantages


def reference_gae(row: Row, gamma: float, lam: float) -> list[float]:
    """Σ_l (γλ)^l δ_{t+l}, the explicit sum (eq. 16 of 1506.02438), not the recursion."""
    rewards, values = row["rewards"], [*row["values"], 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1, 0.95), (0.9, 0.5), (1, 1), (0.99, 0), (0, 0.5), (0.01, 0.01)])
def test_gae(batch: SimpleNamespace, gamma: float, lam: float) -> None:
    found, returns = advantages.gae(batch.rewards, batch.values, batch.mask, gamma, lam)
    assert_rows(found, batch, lambda _, row: reference_gae(row, gamma, lam))
    assert_rows(
        returns,
        batch,
        lambda _, row: [a + v for a, v in zip(reference_gae(row, gamma, lam), row["values"], strict=True)],
    )


def test_gae_skips_an_observation() -> None:
    rewards, values = torch.tensor([[0, 0, 0, 1.0]]), torch.tensor([[0.5, 0.3, 0.3, 0.5]])
    found, returns = advantages.gae(rewards, values, torch.tensor([[1, 0, 0, 1]]), gamma=1, lam=0.95)
    torch.testing.assert_close(found, torch.tensor([[0.475, 0, 0, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.975, 0, 0, 1]]))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reward_to_go(batch: SimpleNamespace, gamma: float) -> None:
    def reference(_: int, row: Row) -> list[float]:
        rewards = row["rewards"]
        return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]

    assert_rows(advantages.reward_to_go(batch.rewards, batch.mask, gamma), batch, reference)


def test_whiten(batch: SimpleNamespace) -> None:
    x = [a for _, _, row in rows_of(batch) for a in row["advantages"]]
    mean = sum(x) / max(len(x), 1)
    variance = sum((a - mean) ** 2 for a in x) / (len(x) - 1) if len(x) > 1 else 1 - 1e-8
    assert_rows(
        advantages.whiten(batch.advantages, batch.mask),
        batch,
        lambda _, row: [(a - mean) / math.sqrt(variance + 1e-8) for a in row["advantages"]],
    )


def test_whiten_nearly_equal_values() -> None:
    found = advantages.whiten(torch.tensor([[0, 2e-4]], dtype=torch.float64), torch.ones(1, 2))
    assert found.tolist() == [pytest.approx([-1e-4 / math.sqrt(3e-8), 1e-4 / math.sqrt(3e-8)])]


def test_whiten_equal_values_in_float32() -> None:
    x = torch.full((7, 13), 100.1)
    assert advantages.whiten(x, torch.ones(7, 13)).abs().max() == 0


GROUPS = {
    "ragged": ([7, -2, 7, 7, -2, 40], [0.3, -1.0, 2.0, 0.7, 5.0, 1.5]),
    "one_sample": ([3], [1.25]),
    "equal_scores": ([1, 1, 1, 0, 0], [0.1, 0.1, 0.1, 2.0, 3.0]),
    "large": ([5] * 4 + [9] * 3, [1e6, 1e6 + 1, 1e6 - 1, 1e6, -3e5, 2e5, 0.0]),
}


def reference_group(estimator: str, i: int, ids: list[int], scores: list[float]) -> float:
    others = [r for j, r in enumerate(scores) if ids[j] == ids[i] and j != i]
    if not others:
        return 0.0
    group = [*others, scores[i]]
    mean = sum(group) / len(group)
    if estimator == "rloo":
        return scores[i] - sum(others) / len(others)
    if estimator == "dr_grpo":
        return scores[i] - mean
    std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
    return 0.0 if len(set(group)) == 1 else (scores[i] - mean) / (std + 1e-6)


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo"])
def test_group_baselines(estimator: str, case: str) -> None:
    ids, scores = GROUPS[case]
    found = getattr(advantages, estimator)(torch.tensor(scores, dtype=torch.float64), torch.tensor(ids))
    expected = torch.tensor([reference_group(estimator, i, ids, scores) for i in range(len(ids))], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_equal_scores_are_exactly_zero_and_counted() -> None:
    scores, ids = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 5.0]), torch.tensor([4, 4, 4, 0, 0, 9])
    assert advantages.grpo(scores, ids)[:3].tolist() == [0, 0, 0]
    assert advantages.zero_std_groups(scores, ids).item() == 2
    large = torch.full((7,), 1e6 + 0.1, dtype=torch.float64)
    assert large.sum() / 7 != large[0]
    assert not advantages.grpo(large, torch.zeros(7, dtype=torch.int64)).any()


def test_a_nan_score_stays_visible() -> None:
    scores, ids = torch.tensor([1.0, torch.nan, 3.0, 3.0]), torch.tensor([0, 0, 1, 1])
    assert advantages.grpo(scores, ids).isnan().tolist() == [True, True, False, False]
    assert advantages.zero_std_groups(scores, ids).item() == 1


def to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def less_at_the_end(rewards: list[float], baseline: float) -> list[float]:
    return [*rewards[:-1], rewards[-1] - baseline] if rewards else []


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_remax(batch: SimpleNamespace, gamma: float) -> None:
    """Algorithm 1 of 2310.10505: the greedy response's score is taken off the return."""
    greedy = torch.arange(len(batch.mask), dtype=batch.rewards.dtype) - 1.5
    assert_rows(
        advantages.remax(batch.rewards, greedy, batch.mask, gamma),
        batch,
        lambda b, row: to_go(less_at_the_end(row["rewards"], float(greedy[b])), gamma),
    )


@pytest.mark.parametrize("with_baseline", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(batch: SimpleNamespace, gamma: float, with_baseline: bool) -> None:
    """2501.03262: rewards to go, minus the group's mean score in the -baseline form, normalised over the batch."""
    ids = [b % 2 for b in range(len(batch.mask))]
    scores = batch.scores.tolist()
    if with_baseline:
        found = advantages.reinforce_plus_plus_baseline(
            batch.rewards, batch.scores, batch.mask, torch.tensor(ids), gamma
        )
    else:
        found = advantages.reinforce_plus_plus(batch.rewards, batch.mask, gamma)

    def returns(b: int, row: Row) -> list[float]:
        group = [s for s, g in zip(scores, ids, strict=True) if g == ids[b]]
        baseline = sum(group) / len(group) if len(group) > 1 else scores[b]
        return to_go(less_at_the_end(row["rewards"], baseline if with_baseline else 0.0), gamma)

    flat = [x for b, _, row in rows_of(batch) for x in returns(b, row)]
    mean = sum(flat) / max(len(flat), 1)
    variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1) if len(flat) > 1 else 1 - 1e-8
    assert_rows(found, batch, lambda b, row: [(x - mean) / math.sqrt(variance + 1e-8) for x in returns(b, row)])


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_what_the_config_names_is_what_is_computed(batch: SimpleNamespace, name: str) -> None:
    """Through the table: the estimator gets the terms that it needs."""
    batch.rewards = torch.where(batch.mask, batch.rewards, 0)  # as token_rewards makes them
    ids = torch.arange(len(batch.mask)) % 2
    greedy = batch.scores - 0.5
    terms = RewardTerms(batch.rewards, batch.scores, batch.mask, ids, batch.values, greedy, gamma=0.9, gae_lambda=0.8)
    found, returns = ADVANTAGE_ESTIMATORS[name](terms)
    totals = torch.tensor([sum(row["rewards"]) for _, _, row in rows_of(batch)], dtype=torch.float64)
    sums = totals.tolist()

    def per_sample(b: int, row: Row) -> list[float]:
        return [reference_group(name, b, ids.tolist(), sums)] * len(row["rewards"])

    references: dict[str, Callable[[int, Row], list[float]]] = {
        "gae": lambda _, row: reference_gae(row, 0.9, 0.8),
        "reinforce": lambda _, row: to_go(row["rewards"], 0.9),
        "remax": lambda b, row: to_go(less_at_the_end(row["rewards"], float(greedy[b])), 0.9),
        "rloo": per_sample,
        "grpo": per_sample,
        "dr_grpo": per_sample,
    }
    if name in references:
        assert_rows(found, batch, references[name])
    assert found.shape == batch.mask.shape
    assert not found[~batch.mask].any()
    assert (returns is not None) == (name == "gae"), "returns are for the critic"


def test_broadcast() -> None:
    scores = torch.tensor([1.0, 4.0])
    assert advantages.broadcast(scores, torch.tensor([[1, 0], [1, 1]])).tolist() == [[1, 0], [4, 4]]


# --- KL


def reference_kl(row: Row, estimator: str) -> tuple[list[float], list[float]]:
    values, gradients = [], []
    for policy, ref, weight in zip_row(row, "logprobs", "ref", "weight"):
        k1 = policy - ref
        if estimator == "k1":
            value, slope = k1, 1.0
        elif estimator == "k2":
            value, slope = k1**2 / 2, k1
        else:
            x = clamp(-k1, -20, 20)
            value, slope = math.exp(x) - 1 - x, 1 - math.exp(x)
            if value > 10:
                value, slope = 10.0, 0.0
        values.append(value)
        gradients.append(weight * slope)
    return values, gradients


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(batch: SimpleNamespace, estimator: kl.Estimator) -> None:
    assert_loss(
        batch,
        lambda x: (kl.kl_estimate(x, batch.ref, estimator, batch.mask), {}),
        lambda row: reference_kl(row, estimator),
    )


def test_k3_limits_and_their_metric() -> None:
    ref = torch.tensor([[0.0, 2.0, 3.0, 90.0, -12.0, -90.0, torch.nan]], dtype=torch.float32)
    policy, mask = torch.zeros(1, 7, requires_grad=True), torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    value = kl.kl_estimate(policy, ref, "k3", mask)
    value.sum().backward()
    torch.testing.assert_close(value[0].detach(), torch.tensor([0, math.exp(2) - 3, 10, 10, 10, 10, 0]))
    torch.testing.assert_close(policy.grad, torch.tensor([[0, 1 - math.exp(2), 0, 0, 0, 0, 0]]))
    assert kl.k3_clamped(policy, ref, mask).tolist() == [[0, 0, 1, 1, 1, 1, 0]]


def test_kl_estimate_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="'k4': expected k1, k2 or k3"):
        kl.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")  # type: ignore[arg-type]


def test_token_rewards(batch: SimpleNamespace) -> None:
    def reference(b: int, row: Row) -> list[float]:
        last = len(row["ref"]) - 1
        return [-0.3 * k + (float(batch.scores[b]) if t == last else 0) for t, k in enumerate(row["ref"])]

    assert_rows(kl.token_rewards(batch.scores, batch.ref, batch.mask, 0.3), batch, reference)


def test_kl_controllers() -> None:
    fixed, adaptive = kl_control.FixedKLController(0.1), kl_control.AdaptiveKLController(0.1, target=6, horizon=100)
    fixed.update(60, 50)
    assert fixed.value == 0.1
    adaptive.update(6.6, 50)
    assert adaptive.value == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    adaptive.update(60, 50)
    assert adaptive.value == pytest.approx(0.105 * 1.1)
    adaptive.update(-1, 10_000)
    assert adaptive.value == pytest.approx(0.1155 * 0.8)
    restored = kl_control.AdaptiveKLController(0.1, target=6, horizon=100)
    restored.load_state_dict(adaptive.state_dict())
    assert restored.value == adaptive.value
    for action in (
        lambda: adaptive.update(math.nan, 1),
        lambda: kl_control.AdaptiveKLController(0.1, target=0, horizon=1),
        lambda: kl_control.FixedKLController(-1),
    ):
        with pytest.raises(ValueError):
            action()
