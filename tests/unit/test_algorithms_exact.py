"""Expected gradients by enumeration of every response on a vocabulary of 5: which estimators are unbiased, exactly.

The policy is a table: one row of logits for each prefix. All 125 responses of length 3 are enumerated (with two or
three samples in a group: all tuples of responses), each weighted with its probability. What an estimator does in
expectation is then a number without noise, and is compared with the gradient of the expected score.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.bias import V, World, estimator_rows, kl_rows, table
from rlhf_dist.algorithms import advantages, kl, losses
from rlhf_dist.algorithms.logprobs import entropy_from_logits, token_logprobs
from rlhf_dist.algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, PolicyTerms, RewardTerms


@pytest.fixture(scope="module")
def world() -> World:
    return World(3)


@pytest.fixture(scope="module")
def small_world() -> World:
    return World(2)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def bias(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_reinforce_is_unbiased(world: World) -> None:
    rewards = kl.token_rewards(world.scores, torch.zeros_like(world.logprobs), world.mask, 0.0)
    assert_equal(world.expected(advantages.reward_to_go(rewards, world.mask, 1.0)), world.policy_gradient())


def test_kl_in_the_reward_is_the_gradient_of_the_kl(world: World) -> None:
    """E[score] − β KL(π ‖ q): the term of log π itself vanishes in expectation, so k1 in the reward is exact."""
    k1 = kl.kl_estimate(world.logprobs, world.ref_logprobs, "k1").detach()
    rewards = kl.token_rewards(world.scores, k1, world.mask, 0.3)
    divergence = (world.probability * (world.logprobs - world.ref_logprobs).sum(1)).sum()
    expected = world.policy_gradient() - 0.3 * world.gradient(divergence)
    assert_equal(world.expected(advantages.reward_to_go(rewards, world.mask, 1.0)), expected)


def test_gae_with_lambda_one_is_unbiased_for_any_values(world: World) -> None:
    rewards = kl.token_rewards(world.scores, torch.zeros_like(world.logprobs), world.mask, 0.0)
    values = world.values[world.state]
    exact, _ = advantages.gae(rewards, values, world.mask, 1.0, 1.0)
    assert_equal(world.expected(exact), world.policy_gradient())
    shortened, _ = advantages.gae(rewards, values, world.mask, 1.0, 0.5)
    assert bias(world.expected(shortened), world.policy_gradient()) > 0.1


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_gae_is_unbiased_for_any_lambda_with_the_true_values(world: World, lam: float) -> None:
    weight = world.probability.detach()[:, None].expand_as(world.state)
    states = world.state.flatten()
    size = len(world.values)
    mass = torch.zeros(size, dtype=torch.float64).index_add(0, states, weight.flatten())
    reward_mass = torch.zeros(size, dtype=torch.float64).index_add(
        0, states, (weight * world.scores[:, None]).flatten()
    )
    values = (reward_mass / mass)[world.state]
    rewards = kl.token_rewards(world.scores, torch.zeros_like(world.logprobs), world.mask, 0.0)
    found, _ = advantages.gae(rewards, values, world.mask, 1.0, lam)
    assert_equal(world.expected(found), world.policy_gradient())


def test_rloo_is_unbiased(world: World, small_world: World) -> None:
    assert_equal(world.expected_of_groups(advantages.rloo, 2), world.policy_gradient())
    assert_equal(small_world.expected_of_groups(advantages.rloo, 3), small_world.policy_gradient())


def test_dr_grpo_is_short_by_one_nth(world: World, small_world: World) -> None:
    assert_equal(world.expected_of_groups(advantages.dr_grpo, 2), world.policy_gradient() / 2)
    assert_equal(small_world.expected_of_groups(advantages.dr_grpo, 3), small_world.policy_gradient() * 2 / 3)


def test_remax_is_unbiased(world: World) -> None:
    greedy = world.scores[world.probability.argmax()].expand_as(world.scores)
    rewards = kl.add_to_last_token(torch.zeros_like(world.logprobs), world.scores, world.mask)
    found = advantages.remax(rewards, greedy, world.mask, 1.0)
    assert_equal(world.expected(found), world.policy_gradient())


def test_grpo_of_two_follows_the_win_rate(world: World) -> None:
    """With two samples (r − mean)/std is ±1/√2: the gradient of the chance to win, whatever the size of the scores."""
    chance = (world.scores[:, None] - world.scores).sign() @ world.probability.detach()
    found = world.expected_of_groups(lambda scores, group: advantages.grpo(scores, group, eps=1e-15), 2)
    assert_equal(found, world.policy_gradient(chance) / 2**0.5)
    assert bias(found / found.norm(), world.policy_gradient() / world.policy_gradient().norm()) > 0.01


def per_prefix(world: World, divergence: Tensor) -> Tensor:
    """∇ of Σ over prefixes of P(prefix) · divergence(prefix), the chance of the prefix held fixed."""
    weight = world.probability.detach()[:, None].expand_as(world.state).flatten()
    reach = torch.zeros(len(world.values), dtype=torch.float64).index_add(0, world.state.flatten(), weight)
    return world.gradient((reach * divergence).sum())


def test_gradients_of_the_kl_estimators_in_the_loss(world: World) -> None:
    """On-policy k1 has none, k2 has that of KL(π ‖ q), k3 that of KL(q ‖ π)."""
    policy, ref = world.logits.log_softmax(-1), world.ref_logits.log_softmax(-1)

    def expected(estimator: kl.Estimator) -> Tensor:
        value = kl.kl_estimate(world.logprobs, world.ref_logprobs, estimator, world.mask)
        return world.gradient((world.probability.detach()[:, None] * value).sum())

    assert expected("k1").abs().max() < 1e-12
    assert_equal(expected("k2"), per_prefix(world, (policy.exp() * (policy - ref)).sum(-1)))
    assert_equal(expected("k3"), per_prefix(world, (ref.exp() * (ref - policy)).sum(-1)))


def test_kl_estimators_in_expectation(world: World) -> None:
    divergence = (world.probability * (world.logprobs - world.ref_logprobs).sum(1)).sum()
    for estimator in ("k1", "k3"):
        value = kl.kl_estimate(world.logprobs, world.ref_logprobs, estimator).sum(1)
        torch.testing.assert_close((world.probability * value).sum(), divergence, rtol=1e-9, atol=0)


def test_ppo_kl_is_the_kl_of_old_to_new(world: World) -> None:
    new = token_logprobs(world.ref_logits[world.state], world.tokens)
    _, metrics = losses.ppo_policy_loss(new, world.logprobs.detach(), torch.zeros_like(new), world.mask, 0.2)
    divergence = (world.probability * (world.logprobs - new).sum(1)).sum()
    torch.testing.assert_close((world.probability[:, None] * metrics["ppo_kl"]).sum(), divergence, rtol=1e-9, atol=0)


def test_entropy_is_the_expected_surprise(world: World) -> None:
    entropy = entropy_from_logits(world.logits)[world.state]
    expected = -(world.probability * world.logprobs.sum(1)).sum()
    torch.testing.assert_close((world.probability[:, None] * entropy).sum(), expected, rtol=1e-9, atol=0)


def test_importance_weights_correct_for_the_sampler(world: World) -> None:
    """Responses from another policy μ, weighted by Π π/μ, give the expectation under π."""
    ratio = losses.tis(world.logprobs, world.ref_logprobs, cap=torch.inf).prod(1)
    sampler = world.ref_logprobs.sum(1).exp()
    torch.testing.assert_close(
        (sampler * ratio * world.scores).sum(), (world.probability * world.scores).sum().detach(), rtol=1e-9, atol=0
    )


def test_the_table_of_the_docs_is_what_is_enumerated() -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    rows = estimator_rows()
    assert table(rows, "estimator") in page, "renew it with: python -m benchmarks.bias"
    assert table(kl_rows(), "KL") in page
    bias_of = {name: value for name, value, _, _ in rows}
    for name in ("gae, λ = 1", "reinforce", "remax", "rloo"):
        assert bias_of[name] < 1e-9, "unbiased"
    assert bias_of["dr_grpo"] == pytest.approx(0.5), "short by 1/n"


# --- a bandit with a known optimum


SOLVERS = [(name, "ppo") for name in ADVANTAGE_ESTIMATORS]
SOLVERS += [("rloo", name) for name in POLICY_LOSSES if name != "ppo"]


@pytest.mark.parametrize(("estimator", "loss"), SOLVERS)
def test_a_bandit_is_solved(estimator: str, loss: str) -> None:
    """Five arms, two tokens a response, score = mean of the two arms: the best response is the best arm twice."""
    generator = torch.Generator().manual_seed(0)
    arms = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.2])
    logits = torch.zeros(V, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    mask, group = torch.ones(64, 2, dtype=torch.bool), torch.arange(16).repeat_interleave(4)
    for _ in range(40):
        tokens = torch.multinomial(logits.detach().softmax(-1), 128, replacement=True, generator=generator).view(64, 2)
        scores = arms[tokens].mean(1)
        greedy = arms[logits.argmax()].expand(64)
        old = logits.detach().log_softmax(-1)[tokens]
        rewards = kl.add_to_last_token(torch.zeros(mask.shape, dtype=scores.dtype), scores, mask)
        found, _ = ADVANTAGE_ESTIMATORS[estimator](
            RewardTerms(rewards, scores, mask, group, torch.full(mask.shape, 0.4), greedy, gamma=1.0, gae_lambda=0.95)
        )
        if estimator in ("gae", "reinforce", "remax"):
            found = advantages.whiten(found, mask)
        for _ in range(2):
            terms = PolicyTerms(logits.log_softmax(-1)[tokens], old, old, found, mask, 0.2, None, None)
            optimizer.zero_grad()
            losses.aggregate(POLICY_LOSSES[loss](terms)[0], mask, "token_mean", mask.sum(), 64).backward()
            optimizer.step()
    assert logits.argmax() == arms.argmax()
    assert (logits.softmax(-1) @ arms).item() > 0.8
