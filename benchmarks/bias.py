"""How far the expected gradient of each estimator is from the policy gradient, exactly, on a tiny world.

    python -m benchmarks.bias

A tabular policy writes two tokens from a vocabulary of five. Every batch of two responses to the one prompt is
enumerated, so the expectation has no noise: bias is ‖E[g] − ∇J‖ / ‖∇J‖, scale and cosine compare length and
direction. The table is the one of docs/algorithms.md; a test compares them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_dist.algorithms import advantages, kl, losses
from rlhf_dist.algorithms.logprobs import token_logprobs
from rlhf_dist.algorithms.registry import ADVANTAGE_ESTIMATORS, RewardTerms

V = 5


class World:
    """Every response of one length: probabilities under a tabular policy, a reference, scores."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(length)
        self.tokens = torch.tensor(list(itertools.product(range(V), repeat=length)))
        prefixes = [tuple(s[:t].tolist()) for s in self.tokens for t in range(length)]
        number = {prefix: i for i, prefix in enumerate(dict.fromkeys(prefixes))}
        self.state = torch.tensor([number[p] for p in prefixes]).view(len(self.tokens), length)
        self.logits = torch.randn(len(number), V, generator=generator, dtype=torch.float64).requires_grad_()
        # Near enough that no ratio reaches the limit of k3.
        self.ref_logits = self.logits.detach() + 0.4 * torch.randn(
            len(number), V, generator=generator, dtype=torch.float64
        )
        self.values = torch.randn(len(number), generator=generator, dtype=torch.float64)
        self.scores = torch.randn(len(self.tokens), generator=generator, dtype=torch.float64)
        self.mask = torch.ones_like(self.tokens)
        self.logprobs = token_logprobs(self.logits[self.state], self.tokens)
        self.ref_logprobs = token_logprobs(self.ref_logits[self.state], self.tokens)
        self.probability = self.logprobs.sum(1).exp()

    def gradient(self, x: Tensor) -> Tensor:
        return torch.autograd.grad(x, self.logits, retain_graph=True)[0]

    def policy_gradient(self, scores: Tensor | None = None) -> Tensor:
        """∇ E[score], straight from the definition of the expectation."""
        return self.gradient((self.probability * (self.scores if scores is None else scores)).sum())

    def expected(self, token_advantages: Tensor) -> Tensor:
        """E[−∇ Σ_t loss_t] of the policy loss, one response per group."""
        loss, _ = losses.a2c_policy_loss(self.logprobs, token_advantages, self.mask)
        return -self.gradient((self.probability.detach()[:, None] * loss).sum())

    def expected_of_groups(self, estimator: Callable[[Tensor, Tensor], Tensor], n: int) -> Tensor:
        """E of the gradient's mean over a group of ``n`` independent responses, over all N^n groups."""
        members = torch.cartesian_prod(*[torch.arange(len(self.tokens))] * n)
        probability = self.probability.detach()[members].prod(1)
        group = torch.arange(len(members)).repeat_interleave(n)
        found = estimator(self.scores[members.flatten()], group).view(-1, n)
        weight = torch.zeros_like(self.scores).index_add(0, members.flatten(), (probability[:, None] * found).flatten())
        return self.gradient((weight / n * self.logprobs.sum(1)).sum())

    def expected_of_batches(self, name: str, gae_lambda: float, whiten: bool = False) -> Tensor:
        """E of the gradient's mean over a batch of two responses, through the table that the config chooses from."""
        weight = torch.zeros(self.tokens.shape, dtype=torch.float64)
        greedy = self.scores[self.probability.argmax()].expand(2)
        mask = torch.ones(2, self.tokens.shape[1], dtype=torch.bool)
        for pair in itertools.product(range(len(self.tokens)), repeat=2):
            members, scores = list(pair), self.scores[list(pair)]
            terms = RewardTerms(
                rewards=kl.add_to_last_token(torch.zeros(mask.shape, dtype=scores.dtype), scores, mask),
                scores=scores,
                mask=mask,
                group_id=torch.zeros(2, dtype=torch.int64),
                values=self.values[self.state[members]],
                greedy_scores=greedy,
                gamma=1.0,
                gae_lambda=gae_lambda,
            )
            found, _ = ADVANTAGE_ESTIMATORS[name](terms)
            found = advantages.whiten(found, mask) if whiten else found
            weight.index_add_(0, torch.tensor(members), self.probability.detach()[members].prod() / 2 * found)
        return self.gradient((weight * self.logprobs).sum())


def estimator_rows() -> list[tuple[str, float, float, float]]:
    """Name, bias, scale and cosine of each estimator, in the order of the config's names."""
    world = World(2)
    exact = world.policy_gradient()
    rows = []
    for name in ADVANTAGE_ESTIMATORS:
        variants = [("", 1.0, False)]
        if name == "gae":
            variants = [(", λ = 1", 1.0, False), (", λ = 0.95", 0.95, False), (", λ = 0.95, whitened", 0.95, True)]
        for label, lam, whiten in variants:
            rows.append((name + label, *_compare(world.expected_of_batches(name, lam, whiten), exact)))
    return rows


def kl_rows() -> list[tuple[str, float, float, float]]:
    """The same for the KL in the loss, against the gradient of KL(π ‖ q) of whole responses."""
    world = World(2)
    exact = world.gradient((world.probability * (world.logprobs - world.ref_logprobs).sum(1)).sum())
    rows = []
    for estimator in ("k1", "k2", "k3"):
        value = kl.kl_estimate(world.logprobs, world.ref_logprobs, estimator).sum(1)
        found = world.gradient((world.probability.detach() * value).sum())
        rows.append((f"{estimator} in the loss", *_compare(found, exact)))
    reward = -kl.kl_estimate(world.logprobs, world.ref_logprobs, "k1").detach()
    rows.append(
        ("k1 in the reward", *_compare(-world.expected(advantages.reward_to_go(reward, world.mask, 1.0)), exact))
    )
    return rows


def table(rows: list[tuple[str, float, float, float]], title: str) -> str:
    """Markdown."""
    lines = [f"| {title} | bias | scale | cosine |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {b:.3f} | {s:.3f} | {c:.3f} |" for name, b, s, c in rows)])


def _compare(found: Tensor, exact: Tensor) -> tuple[float, float, float]:
    found, exact = found.flatten(), exact.flatten()
    scale = found.norm() / exact.norm()
    cosine = torch.dot(found, exact) / (found.norm() * exact.norm()) if scale > 1e-12 else torch.tensor(0.0)
    return ((found - exact).norm() / exact.norm()).item(), scale.item(), cosine.item()


if __name__ == "__main__":
    print(table(estimator_rows(), "estimator"))
    print()
    print(table(kl_rows(), "KL"))
