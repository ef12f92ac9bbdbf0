"""Every loss against slow references in plain Python floats, written from the papers: values, gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from algorithm_batches import CASES, Row, assert_loss, assert_rows, clamp, make_batch, rows_of, zip_row

from rlhf_dist.algorithms import logprobs, losses, preferences, supervised


@pytest.fixture(params=CASES)
def batch(request: pytest.FixtureRequest) -> SimpleNamespace:
    return make_batch(request.param)


# --- policy losses


def reference_clip(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> tuple[float, float]:
    """Loss and d loss / d ratio of one token (or sequence)."""
    clipped = clamp(ratio, 1 - low, 1 + high)
    objective, slope = ratio * advantage, advantage
    if clipped * advantage < objective:
        objective, slope = clipped * advantage, 0.0
    if dual is not None and advantage < 0 and dual * advantage > objective:
        objective, slope = dual * advantage, 0.0
    return -objective, -slope


def reference_ppo(row: Row, low: float, high: float, dual: float | None = None) -> tuple[list[float], list[float]]:
    values, gradients = [], []
    for policy, old, advantage, weight in zip_row(row, "logprobs", "old", "advantages", "weight"):
        ratio = math.exp(clamp(policy - old, -20, 20))
        value, slope = reference_clip(ratio, advantage, low, high, dual)
        values.append(value)
        gradients.append(weight * slope * ratio if abs(policy - old) <= 20 else 0.0)
    return values, gradients


@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, None, None), (0.2, 0.28, None), (0.1, 0.3, 1.5), (0.2, None, 3)]
)
def test_ppo(batch: SimpleNamespace, low: float, high: float | None, dual: float | None) -> None:
    metrics = assert_loss(
        batch,
        lambda x: losses.ppo_policy_loss(x, batch.old, batch.advantages, batch.mask, low, high, dual),
        lambda row: reference_ppo(row, low, high or low, dual),
    )

    def clip_frac(_: int, row: Row) -> list[float]:
        pairs = zip_row(row, "logprobs", "old", "advantages")
        return [p - o > math.log(1 + (high or low)) if a > 0 else p - o < math.log(1 - low) for p, o, a in pairs]

    assert_rows(metrics["clip_frac"], batch, clip_frac)
    ratios = {
        b: [math.exp(clamp(p - o, -20, 20)) for p, o in zip_row(r, "logprobs", "old")] for b, _, r in rows_of(batch)
    }
    assert_rows(metrics["ratio"], batch, lambda b, _: ratios[b])
    assert_rows(metrics["ppo_kl"], batch, lambda b, _: [min(10, r - 1 - math.log(r)) for r in ratios[b]])
    if dual is not None:
        assert_rows(
            metrics["dual_clip_frac"],
            batch,
            lambda b, row: [a < 0 and r > dual for r, a in zip(ratios[b], row["advantages"], strict=True)],
        )


def test_a2c(batch: SimpleNamespace) -> None:
    def reference(row: Row) -> tuple[list[float], list[float]]:
        tokens = list(zip_row(row, "logprobs", "advantages", "weight"))
        return [-a * p for p, a, _ in tokens], [-a * w for _, a, w in tokens]

    assert_loss(batch, lambda x: losses.a2c_policy_loss(x, batch.advantages, batch.mask), reference)


def test_gspo(batch: SimpleNamespace) -> None:
    def reference(row: Row) -> tuple[list[float], list[float]]:
        n = len(row["old"])
        terms = [p - o for p, o in zip_row(row, "logprobs", "old")]
        ratio = math.exp(sum(clamp(x, -20, 20) for x in terms) / n) if n else 1.0
        tokens = [reference_clip(ratio, a, 0.1, 0.2, None) for a in row["advantages"]]
        slope = sum(w * s for w, (_, s) in zip(row["weight"], tokens, strict=True))
        return [value for value, _ in tokens], [slope * ratio / n if abs(x) <= 20 else 0.0 for x in terms]

    assert_loss(
        batch, lambda x: losses.gspo_policy_loss(x, batch.old, batch.advantages, batch.mask, 0.1, 0.2), reference
    )


@pytest.mark.parametrize("low", [0.2, 1.0])
def test_cispo(batch: SimpleNamespace, low: float) -> None:
    def reference(row: Row) -> tuple[list[float], list[float]]:
        values, gradients = [], []
        for policy, old, advantage, weight in zip_row(row, "logprobs", "old", "advantages", "weight"):
            factor = -clamp(math.exp(clamp(policy - old, -20, 20)), 1 - low, 1.3) * advantage
            values.append(factor * policy)
            gradients.append(weight * factor)
        return values, gradients

    assert_loss(
        batch, lambda x: losses.cispo_policy_loss(x, batch.old, batch.advantages, batch.mask, low, 0.3), reference
    )


def test_decoupled_ppo(batch: SimpleNamespace) -> None:
    def reference(row: Row) -> tuple[list[float], list[float]]:
        behaviour = [math.exp(clamp(o - r, -20, 20)) for o, r in zip_row(row, "old", "rollout")]
        values, gradients = reference_ppo(row, 0.2, 0.3, 2)
        return [b * v for b, v in zip(behaviour, values, strict=True)], [
            b * g for b, g in zip(behaviour, gradients, strict=True)
        ]

    assert_loss(
        batch,
        lambda x: losses.decoupled_ppo_loss(x, batch.old, batch.rollout, batch.advantages, batch.mask, 0.2, 0.3, 2),
        reference,
    )


def test_value_loss(batch: SimpleNamespace) -> None:
    def reference(row: Row) -> tuple[list[float], list[float]]:
        values, gradients = [], []
        for value, old, target, weight in zip_row(row, "values", "old_values", "returns", "weight"):
            error, cut = value - target, clamp(value, old - 0.4, old + 0.4) - target
            values.append(max(error**2, cut**2) / 2)
            gradients.append(weight * error if error**2 >= cut**2 else 0.0)
        return values, gradients

    metrics = assert_loss(
        batch,
        lambda x: losses.value_loss(x, batch.old_values, batch.returns, batch.mask, 0.4),
        reference,
        variable="values",
    )
    clipped = {b: [g == 0 for g in reference(row)[1]] for b, _, row in rows_of(batch)}
    assert_rows(metrics["value_clip_frac"], batch, lambda b, _: clipped[b])


def test_value_loss_without_clip(batch: SimpleNamespace) -> None:
    def reference(row: Row) -> tuple[list[float], list[float]]:
        errors = [(v - r, w) for v, r, w in zip_row(row, "values", "returns", "weight")]
        return [e**2 / 2 for e, _ in errors], [w * e for e, w in errors]

    assert_loss(
        batch,
        lambda x: losses.value_loss(x, batch.old_values, batch.returns, batch.mask),
        reference,
        variable="values",
    )


def test_cross_entropy(batch: SimpleNamespace) -> None:
    assert_loss(
        batch,
        lambda x: supervised.sft_loss(x, batch.mask),
        lambda row: ([-p for p in row["logprobs"]], [-w for w in row["weight"]]),
    )


# --- corrections, penalty, reduction


def test_corrections(batch: SimpleNamespace) -> None:
    def ratios(row: Row) -> list[float]:
        return [math.exp(clamp(o - r, -20, 20)) for o, r in zip_row(row, "old", "rollout")]

    old = batch.old.clone().requires_grad_()
    tis = losses.tis(old, batch.rollout, 1.1, batch.mask)
    icepop = losses.icepop(old, batch.rollout, 0.8, 1.2, batch.mask)
    kept = losses.sequence_mask(old, batch.rollout, batch.mask, 0.95, 1.1)
    assert not any(x.requires_grad for x in (tis, icepop, kept))
    assert_rows(tis, batch, lambda _, row: [min(r, 1.1) for r in ratios(row)])
    assert_rows(icepop, batch, lambda _, row: [r if 0.8 <= r <= 1.2 else 0 for r in ratios(row)])

    def reference(_: int, row: Row) -> list[float]:
        found = ratios(row)
        mean = math.exp(math.fsum(map(math.log, found)) / max(len(found), 1))
        return [float(0.95 <= mean <= 1.1)] * len(found)

    assert_rows(kept, batch, reference)


def test_corrections_by_hand() -> None:
    old, rollout = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[-3.0, 0.1, 3.0]])
    expected = [math.exp(3), math.exp(-0.1), math.exp(-3)]
    assert losses.tis(old, rollout)[0].tolist() == pytest.approx([2, expected[1], expected[2]])
    assert losses.icepop(old, rollout, 0.5, 5)[0].tolist() == pytest.approx([0, expected[1], 0])


def test_soft_overlong_penalty() -> None:
    found = losses.soft_overlong_penalty(torch.tensor([0, 80, 85, 90, 100, 101, 500]), max_length=100, cache=20)
    torch.testing.assert_close(found, torch.tensor([0, 0, -0.25, -0.5, -1, -1, -1]))
    with pytest.raises(ValueError, match="cache=0"):
        losses.soft_overlong_penalty(torch.tensor([1]), 100, 0)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant"])
def test_aggregate(batch: SimpleNamespace, how: losses.Aggregation) -> None:
    x = batch.advantages.clone().requires_grad_()
    rows = [row["advantages"] for _, _, row in rows_of(batch)]
    tokens, length = sum(map(len, rows)), 11
    expected = {
        "token_mean": sum(map(sum, rows)) / max(tokens, 1),
        "sequence_mean": sum(sum(row) / len(row) for row in rows if row) / len(rows),
        "constant": sum(map(sum, rows)) / (len(rows) * length),
    }[how]
    slope = {
        "token_mean": lambda n: 1 / tokens,
        "sequence_mean": lambda n: 1 / n / len(rows),
        "constant": lambda n: 1 / (len(rows) * length),
    }[how]
    found = losses.aggregate(x, batch.mask, how, batch.mask.sum(), len(rows), length)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    found.backward()
    assert_rows(x.grad, batch, lambda _, row: [slope(len(row["old"])) for _ in row["old"]])


def test_aggregate_refuses_what_it_cannot_do() -> None:
    x = torch.ones(1, 1)
    with pytest.raises(ValueError, match="max_length"):
        losses.aggregate(x, x, "constant", 1, 1)
    with pytest.raises(ValueError, match="'mean': expected token_mean"):
        losses.aggregate(x, x, "mean", 1, 1)  # type: ignore[arg-type]


# --- logits


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    return [p / sum(powers) for p in powers]


def test_token_logprobs_and_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 7, (2, 3), generator=generator)
    found, entropy = logprobs.token_logprobs(logits, labels, temperature=0.7), logprobs.entropy_from_logits(logits)
    by_label, by_entropy = (torch.autograd.grad(x.sum(), logits)[0] for x in (found, entropy))
    for b in range(2):
        for t in range(3):
            row, label = logits[b, t].tolist(), int(labels[b, t])
            cool, p = softmax([x / 0.7 for x in row]), softmax(row)
            h = -sum(q * math.log(q) for q in p)
            assert found[b, t].item() == pytest.approx(math.log(cool[label]), abs=1e-9)
            assert entropy[b, t].item() == pytest.approx(h, abs=1e-9)
            assert by_label[b, t].tolist() == pytest.approx([((i == label) - q) / 0.7 for i, q in enumerate(cool)])
            assert by_entropy[b, t].tolist() == pytest.approx([-q * (math.log(q) + h) for q in p], abs=1e-9)


def test_logits_of_half_precision_and_minus_infinity() -> None:
    logits = torch.tensor([[[0.5, -torch.inf, 0.5, -torch.inf]]], dtype=torch.bfloat16, requires_grad=True)
    entropy = logprobs.entropy_from_logits(logits)
    assert entropy.dtype == torch.float32
    assert entropy.item() == pytest.approx(math.log(2))
    assert logprobs.token_logprobs(logits, torch.tensor([[2]])).item() == pytest.approx(-math.log(2))
    entropy.sum().backward()
    assert logits.grad.abs().max() < 1e-6
    with pytest.raises(ValueError, match="temperature=0"):
        logprobs.token_logprobs(logits, torch.tensor([[2]]), 0)


def test_sequence_logprobs(batch: SimpleNamespace) -> None:
    found = logprobs.sequence_logprobs(batch.logprobs, batch.mask)
    assert found.tolist() == pytest.approx([sum(row["logprobs"]) for _, _, row in rows_of(batch)])


@pytest.mark.parametrize("k", [1, 3, 6])
def test_distillation(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    teacher, student = 2 * torch.randn(2, 2, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])
    top, ids = teacher.log_softmax(-1).topk(k)
    student[0, 2], top[0, 2], ids[1] = torch.nan, torch.nan, -1
    student.requires_grad_()
    loss, _ = supervised.distillation_loss(student, ids, top, mask)
    loss.sum().backward()
    for b, t in mask.logical_not().nonzero().tolist():
        assert loss[b, t] == 0
        assert not student.grad[b, t].any()
    for b, t in mask.nonzero().tolist():
        p, q, kept = softmax(teacher[b, t].tolist()), softmax(student[b, t].tolist()), ids[b, t].tolist()
        kl = sum(p[i] * math.log(p[i] / q[i]) for i in kept)
        p_rest, q_rest = (sum(x for i, x in enumerate(xs) if i not in kept) for xs in (p, q))
        kl += p_rest * math.log(p_rest / q_rest) if k < 6 else 0
        slope = [q[i] - (p[i] if i in kept else p_rest * q[i] / q_rest) for i in range(6)]
        assert loss[b, t].item() == pytest.approx(kl, abs=1e-9)
        assert student.grad[b, t].tolist() == pytest.approx(slope, abs=1e-9)


# --- preferences


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


@pytest.mark.parametrize("margin", [None, [0.0, 1.0, -0.5, 2.0]])
@pytest.mark.parametrize("preference", [[1.0, 1.0, 1.0, 1.0], [0.5, 0.75, 0.0, 1.0]])
def test_pairwise(preference: list[float], margin: list[float] | None) -> None:
    chosen, rejected = [1.0, 0.5, -40.0, 3.0], [0.0, 0.5, 40.0, 2.5]
    x = torch.tensor(chosen, dtype=torch.float64, requires_grad=True)
    given = {} if margin is None else {"margin": torch.tensor(margin)}
    other, p = (torch.tensor(values, dtype=torch.float64) for values in (rejected, preference))
    loss, metrics = preferences.pairwise_loss(x, other, p, **given)
    loss.sum().backward()
    h = [c - r - m for c, r, m in zip(chosen, rejected, margin or [0.0] * 4, strict=True)]
    expected = [-p * log_sigmoid(d) - (1 - p) * log_sigmoid(-d) for d, p in zip(h, preference, strict=True)]
    assert loss.tolist() == pytest.approx(expected)
    assert x.grad.tolist() == pytest.approx([1 / (1 + math.exp(-d)) - p for d, p in zip(h, preference, strict=True)])
    labels_agree = preference[0] == 1
    assert metrics["accuracy"].tolist() == ([1, 0.5, 0, 1] if labels_agree else [0.5, 0.5, 1, 1])
    assert metrics["margin"].tolist() == ([1, 0, -80, 0.5] if labels_agree else [0, 0, 80, 0.5])


def test_a_tie_is_learned_as_equal_scores() -> None:
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    loss, _ = preferences.pairwise_loss(x, torch.zeros_like(x), torch.full_like(x, 0.5))
    assert loss.argmin() == 20
    assert loss[20].item() == pytest.approx(math.log(2))


def test_kwise() -> None:
    scores = [0.3, 2.0, 0.1, -1.0, 1.0, 7.0, 0.5, 0.5]
    # Prompt 8 prefers 2 to 0, 0 to 3 and 3 to 2, which no ranking can say; 9 has a share, 3 a tie; 5 has no pair.
    pairs = {8: [(2, 0, 1.0), (3, 0, 0.0), (2, 3, 0.0)], 9: [(7, 6, 0.75)], 3: [(1, 4, 0.5)]}
    rows = [(9, 7, 6, 0.75), (8, 2, 0, 1.0), (3, 1, 4, 0.5), (8, 3, 0, 0.0), (8, 2, 3, 0.0)]
    x = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    prompt, first, second, share = (torch.tensor(column) for column in zip(*rows, strict=True))
    loss, metrics = preferences.kwise_loss(x, torch.stack([first, second], 1), share, prompt)
    loss.backward()
    slope = [0.0] * len(scores)
    expected = 0.0
    for of_prompt in pairs.values():
        for i, j, p in of_prompt:
            weight, d = 1 / len(of_prompt) / len(pairs), scores[i] - scores[j]
            expected -= weight * (p * log_sigmoid(d) + (1 - p) * log_sigmoid(-d))
            slope[i] += weight * (1 / (1 + math.exp(-d)) - p)
            slope[j] -= weight * (1 / (1 + math.exp(-d)) - p)
    assert loss.item() == pytest.approx(expected)
    assert x.grad.tolist() == pytest.approx(slope)
    # In the order 3, 8, 9.
    assert metrics["accuracy"].tolist() == pytest.approx([0.5, 1 / 3, 0.5])
    assert metrics["margin"].tolist() == pytest.approx([0, (-0.2 + 1.3 - 1.1) / 3, 0])


def test_kwise_without_a_pair_is_zero() -> None:
    x = torch.ones(2, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    loss, _ = preferences.kwise_loss(x, none.view(0, 2), none.float(), none)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.tolist() == [0, 0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_and_ipo(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    columns = [x.requires_grad_() for x in -10 * torch.rand(4, 5, generator=generator, dtype=torch.float64)]
    beta = 0.3
    dpo, metrics = preferences.dpo_loss(*columns, beta=beta, label_smoothing=smoothing)
    ipo, _ = preferences.ipo_loss(*columns, beta=beta)
    by_dpo, by_ipo = (torch.autograd.grad(x.sum(), columns[0])[0].tolist() for x in (dpo, ipo))
    for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        h = (chosen - ref_chosen) - (rejected - ref_rejected)
        expected = -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)
        slope = beta * (1 / (1 + math.exp(-beta * h)) - (1 - smoothing))
        assert dpo[i].item() == pytest.approx(expected)
        assert by_dpo[i] == pytest.approx(slope)
        assert ipo[i].item() == pytest.approx((h - 1 / (2 * beta)) ** 2)
        assert by_ipo[i] == pytest.approx(2 * (h - 1 / (2 * beta)))
        assert metrics["margin"][i].item() == pytest.approx(beta * h)
        assert metrics["chosen_reward"][i].item() == pytest.approx(beta * (chosen - ref_chosen))
        assert metrics["rejected_reward"][i].item() == pytest.approx(beta * (rejected - ref_rejected))
        assert metrics["accuracy"][i].item() == (h > 0)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
        preferences.dpo_loss(*columns, beta=beta, label_smoothing=0.5)
    with pytest.raises(ValueError, match="beta=0"):
        preferences.ipo_loss(*columns, beta=0)


def test_float32_agrees_with_float64() -> None:
    narrow, wide = (make_batch("random", dtype) for dtype in (torch.float32, torch.float64))
    for function in (losses.ppo_policy_loss, losses.gspo_policy_loss, losses.cispo_policy_loss):
        low, high = (function(b.logprobs, b.old, b.advantages, b.mask, 0.2)[0] for b in (narrow, wide))
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-5)
