"""Losses, metrics and gradients do not depend on the split into micro-batches and ranks; dummies change nothing."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import VOCAB, comparisons, experience, rankings, tiny_llama
from transformers import AutoModelForSequenceClassification

from rlhf_dist import schema
from rlhf_dist.config import AlgoConfig, DPOConfig
from rlhf_dist.data.batching import micro_batches
from rlhf_dist.data.shares import add_up
from rlhf_dist.engines.objectives import (
    CriticObjective,
    DistillObjective,
    DPOObjective,
    KWiseObjective,
    PairwiseObjective,
    PolicyObjective,
    SFTObjective,
    Totals,
    pair_logprobs,
)
from rlhf_dist.models import PolicyModule, ScalarModule

SHAPE = [(3, 4), (1, 6), (5, 0), (2, 1), (4, 5), (2, 2), (3, 3)]
NAN = float("nan")
#: Everything that adds a term to the loss.
FULL = AlgoConfig(entropy_coef=0.01, use_kl_loss=True, kl_estimator="k3", kl_coef=0.1, dual_clip=3.0)


def scalar_module() -> ScalarModule:
    config = copy.deepcopy(tiny_llama().config)
    config.num_labels = 1
    torch.manual_seed(0)
    return ScalarModule(AutoModelForSequenceClassification.from_config(config))


REFERRED = comparisons([(2, 3, 1), (1, 1, 4), (3, 2, 2), (1, 5, 5)])
for _side, _shift in (("ref_chosen", 0.5), ("ref_rejected", -0.5)):
    REFERRED = REFERRED.append_column(_side, pa.array([-10.0 + _shift * i for i in range(4)], pa.float32()))


def taught(k: int) -> pa.Table:
    """Demonstrations with the k most likely tokens of a random teacher at each response token."""
    table = experience(SHAPE).select(["prompt_ids", "response_ids"])
    generator = torch.Generator().manual_seed(5)
    top = [torch.randn(q, VOCAB, generator=generator).log_softmax(-1).topk(k) for _, q in SHAPE]
    ids, logprobs = [t.indices.flatten().tolist() for t in top], [t.values.flatten().tolist() for t in top]
    table = table.append_column("teacher_ids", pa.array(ids, schema.STAGE_COLUMNS["teacher_ids"]))
    return table.append_column("teacher_logprobs", pa.array(logprobs, schema.STAGE_COLUMNS["teacher_logprobs"]))


CASES: dict[str, tuple[Any, Any, pa.Table]] = {
    "sft": (SFTObjective(), PolicyModule(tiny_llama()), experience(SHAPE).select(["prompt_ids", "response_ids"])),
    "policy, token mean": (PolicyObjective(FULL, 8), PolicyModule(tiny_llama()), experience(SHAPE, holes=True)),
    "policy, sequence mean": (
        PolicyObjective(FULL.model_copy(update={"loss_aggregation": "sequence_mean"}), 8),
        PolicyModule(tiny_llama(), temperature=0.7),
        experience(SHAPE, holes=True),
    ),
    "policy, constant": (
        PolicyObjective(AlgoConfig(loss_aggregation="constant"), 8),
        PolicyModule(tiny_llama()),
        experience(SHAPE).drop_columns("ref_logprobs"),
    ),
    "gspo, sequence mask": (
        PolicyObjective(
            AlgoConfig(
                policy_loss="gspo",
                loss_aggregation="sequence_mean",
                rollout_correction="sequence_mask",
                correction_bounds=(0.6, 1.4),
            ),
            8,
        ),
        PolicyModule(tiny_llama()),
        experience(SHAPE, holes=True),
    ),
    "cispo, tis": (
        PolicyObjective(AlgoConfig(policy_loss="cispo", rollout_correction="tis"), 8),
        PolicyModule(tiny_llama()),
        experience(SHAPE, holes=True),
    ),
    "decoupled": (
        PolicyObjective(AlgoConfig(policy_loss="decoupled_ppo"), 8),
        PolicyModule(tiny_llama()),
        experience(SHAPE, holes=True),
    ),
    "a2c, icepop": (
        PolicyObjective(AlgoConfig(policy_loss="a2c", rollout_correction="icepop"), 8),
        PolicyModule(tiny_llama()),
        experience(SHAPE, holes=True),
    ),
    "policy, one optimizer step": (
        PolicyObjective(FULL.model_copy(update={"rollout_correction": "tis"}), 8),
        PolicyModule(tiny_llama()),
        experience(SHAPE, holes=True).drop_columns("old_logprobs"),
    ),
    "critic": (CriticObjective(AlgoConfig()), scalar_module(), experience(SHAPE, holes=True)),
    "kwise": (
        KWiseObjective(),
        scalar_module(),
        rankings(
            [(2, [3, 1, 2]), (1, [4, 4, 1, 2]), (3, [2, 5]), (1, [1, 2, 3])],
            [[1, 1, 0.5], [0, 1, NAN, 0.75, 0.5, 1], [0], [NAN, NAN, NAN]],
        ),
    ),
    "distill": (DistillObjective(), PolicyModule(tiny_llama()), taught(4)),
    "dpo": (DPOObjective(DPOConfig(label_smoothing=0.1)), PolicyModule(tiny_llama()), REFERRED),
    "ipo": (DPOObjective(DPOConfig(loss="ipo")), PolicyModule(tiny_llama(), temperature=0.5), REFERRED),
    "pairwise": (PairwiseObjective(), scalar_module(), comparisons([(2, 3, 1), (1, 1, 4), (3, 2, 2), (1, 5, 5)])),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "_"))
def case(request: pytest.FixtureRequest) -> tuple[Any, torch.nn.Module, pa.Table]:
    objective, module, table = CASES[request.param]
    return objective, copy.deepcopy(module).double(), table


def accumulate(
    objective: Any, module: torch.nn.Module, table: pa.Table, parts: list[list[int]], packing: bool = False
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Sums of loss, metrics and gradients over ``parts``, as a group of ranks makes them."""
    module.zero_grad()
    rows = np.arange(table.num_rows)
    totals = objective.totals(table, rows)
    shares = []
    for part in parts:
        batch = objective.collate(table, part, 0, packing)
        loss, metrics = objective.loss(module, batch, totals)
        loss.backward()
        shares.append({name: float(value) for name, value in {**metrics, "loss": loss.detach()}.items()})
    return add_up(shares), [p.grad.clone() for p in module.parameters()]


def assert_same(a: tuple[dict[str, float], list[torch.Tensor]], b: tuple[dict[str, float], list[torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], abs=1e-6)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-5)


def test_the_split_does_not_matter(case: tuple[Any, torch.nn.Module, pa.Table]) -> None:
    objective, module, table = case
    whole = accumulate(objective, module, table, [list(range(table.num_rows))])
    assert whole[0]["loss"] != 0
    assert sum(float(g.abs().sum()) for g in whole[1]) > 0
    one_by_one = accumulate(objective, module, table, [[row] for row in range(table.num_rows)])
    assert_same(whole, one_by_one)
    lengths = objective.lengths(table, np.arange(table.num_rows))
    for ranks, budget in ((2, 12), (3, 30)):
        parts = [part for rank in range(ranks) for part in micro_batches(lengths, ranks, rank, budget)]
        assert_same(whole, accumulate(objective, module, table, parts))


def test_packing_does_not_matter(case: tuple[Any, torch.nn.Module, pa.Table]) -> None:
    """Losses that look at whole samples (sequence means, GSPO's ratio) must not mix those that share a row."""
    objective, module, table = case
    padded = accumulate(objective, module, table, [[0, 1, 2], [3]])
    assert_same(padded, accumulate(objective, module, table, [[0, 1, 2], [3]], packing=True))
    assert_same(padded, accumulate(objective, module, table, [[2, 3], [0, 1]], packing=True))


def test_dummies_change_nothing_and_keep_the_graph(case: tuple[Any, torch.nn.Module, pa.Table]) -> None:
    objective, module, table = case
    whole = accumulate(objective, module, table, [list(range(table.num_rows))])
    assert_same(whole, accumulate(objective, module, table, [[], list(range(table.num_rows)), []]))
    totals = objective.totals(table, np.arange(table.num_rows))
    module.zero_grad()
    loss, metrics = objective.loss(module, objective.collate(table, [], 0, False), totals)
    assert loss.requires_grad
    loss.backward()
    # ZeRO's hooks fire on gradients: every parameter must have one, of zeros.
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    assert {*metrics, "loss"} == set(whole[0])
    assert not any(float(value) for value in metrics.values())


def test_totals_count_trained_tokens() -> None:
    table = pa.table(
        {
            "prompt_ids": pa.array([[1]] * 4, pa.list_(pa.int32())),
            "response_ids": pa.array([[5, 6, 7], [], [5], []], pa.list_(pa.int32())),
            "response_mask": pa.array([[1, 0, 1], [], [1], []], pa.list_(pa.uint8())),
        }
    )
    policy = PolicyObjective(AlgoConfig(), 8)
    assert policy.totals(table, np.arange(4)) == Totals(tokens=3, sequences=4)
    assert policy.totals(table, np.array([0, 1])) == Totals(tokens=2, sequences=2)
    assert policy.totals(table, np.array([1, 3])) == Totals(tokens=1, sequences=2), "never divides by 0"
    assert SFTObjective().totals(table.drop_columns("response_mask"), np.arange(4)) == Totals(tokens=4, sequences=4)


def test_the_loss_of_sft_is_the_mean_over_all_response_tokens() -> None:
    objective, module, table = CASES["sft"]
    totals = objective.totals(table, np.arange(table.num_rows))
    batch = objective.collate(table, range(table.num_rows), 0, False)
    loss, _ = objective.loss(module, batch, totals)
    expected = -module(batch)[0][batch.response].mean()
    torch.testing.assert_close(loss, expected)


def test_a_policy_loss_of_ones_own() -> None:
    objective = PolicyObjective(AlgoConfig(policy_loss="test_objectives:surprise", kl_coef=0), 8)
    module, table = PolicyModule(tiny_llama()), experience(SHAPE)
    found, _ = accumulate(objective, module, table, [list(range(len(SHAPE)))])
    sft, _ = accumulate(SFTObjective(), module, table, [list(range(len(SHAPE)))])
    assert found["loss"] == pytest.approx(sft["loss"])
    assert found["tokens_seen"] == 1.0


def surprise(terms: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -torch.where(terms.mask, terms.logprobs, 0), {"tokens_seen": terms.mask.float()}


def test_pretraining_text_is_read_at_temperature_one() -> None:
    module, table = (
        PolicyModule(tiny_llama(), temperature=0.5),
        experience(SHAPE).select(["prompt_ids", "response_ids"]),
    )
    rows = [list(range(len(SHAPE)))]
    plain, gradients = accumulate(SFTObjective(), PolicyModule(module.model), table, rows)
    mixed, scaled = accumulate(SFTObjective(3.0, "ptx_loss"), module, table, rows)
    assert mixed["ptx_loss"] == pytest.approx(plain["loss"])
    for a, b in zip(gradients, scaled, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_unchanged_weights_give_the_gradient_of_the_advantage() -> None:
    """At ratio 1 PPO's gradient is that of −A log π, and nothing is clipped."""
    table = experience(SHAPE)
    module = PolicyModule(tiny_llama()).double()
    objective = PolicyObjective(AlgoConfig(kl_coef=0.0), 8)
    batch = objective.collate(table, range(len(SHAPE)), 0, False)
    with torch.no_grad():
        batch.columns["old_logprobs"] = module(batch)[0]
    totals = objective.totals(table, np.arange(len(SHAPE)))
    loss, metrics = objective.loss(module, batch, totals)
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    (-(batch.columns["advantages"] * module(batch)[0])[batch.mask].sum() / totals.tokens).backward()
    for a, p in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-9, rtol=1e-6)
    assert metrics["clip_frac"] == 0
    assert abs(float(metrics["ppo_kl"])) < 1e-12


@pytest.mark.parametrize("correction", ["none", "tis", "icepop", "sequence_mask"])
def test_without_old_logprobs_the_pass_itself_has_them(correction: str) -> None:
    """The first optimizer step of a batch gives the same loss, gradient and figures with and without a pass before."""
    table = experience(SHAPE, holes=True)
    module = PolicyModule(tiny_llama()).double()
    objective = PolicyObjective(FULL.model_copy(update={"rollout_correction": correction}), 8)
    rows = list(range(len(SHAPE)))
    batch = objective.collate(table, rows, 0, False)
    with torch.no_grad():
        before, _ = module(batch)
    # What sampled differs from the policy by a known gap at every token.
    lengths = [q for _, q in SHAPE]
    old = np.split(before[batch.response].float().numpy(), np.cumsum(lengths)[:-1])
    i = table.column_names.index("rollout_logprobs")
    gaps = np.linspace(-0.4, 0.4, sum(lengths), dtype=np.float32)
    sampled = [(a + b).tolist() for a, b in zip(old, np.split(gaps, np.cumsum(lengths)[:-1]), strict=True)]
    table = table.drop_columns("old_logprobs").set_column(
        i, "rollout_logprobs", pa.array(sampled, pa.list_(pa.float32()))
    )
    with_column = table.append_column("old_logprobs", pa.array([x.tolist() for x in old], pa.list_(pa.float32())))
    without = accumulate(objective, module, table, [rows])
    trained = np.concatenate(table["response_mask"].to_pylist()) == 1
    assert without[0].pop("rollout_logprob_abs_diff") == pytest.approx(np.abs(gaps[trained]).mean(), rel=1e-5)
    assert without[0].pop("rollout_logprob_abs_diff_max") == pytest.approx(np.abs(gaps[trained]).max(), rel=1e-5)
    assert_same(without, accumulate(objective, module, with_column, [rows]))


def test_the_critics_moments_give_the_explained_variance() -> None:
    objective, module, table = CASES["critic"]
    batch = objective.collate(table, range(len(SHAPE)), 0, False)
    _, m = objective.loss(module, batch, objective.totals(table, np.arange(len(SHAPE))))
    returns, old = (batch.columns[name][batch.mask].double() for name in ("returns", "values"))
    variance = float(m["_r2"] - m["_r1"] ** 2)
    residual = float(m["_e2"] - m["_e1"] ** 2)
    assert variance == pytest.approx(float(returns.var(correction=0)), rel=1e-4)
    assert residual == pytest.approx(float((returns - old).var(correction=0)), rel=1e-4)


def sequences_read(module: ScalarModule) -> list[int]:
    """Filled with the number of sequences of each forward from now on."""
    counts: list[int] = []
    backbone = getattr(module.model, module.model.base_model_prefix)
    backbone.register_forward_pre_hook(lambda _, __, x: counts.append(len(x["input_ids"])), with_kwargs=True)
    return counts


def test_rankings_are_the_sum_of_their_pairs_at_one_forward_for_each_response() -> None:
    """With ties, a share, two responses that nobody compared, and A > B > C > A: loss, metrics and gradient."""
    module = scalar_module().double()
    ranked = rankings([(2, [3, 1, 2, 4]), (1, [2, 5, 1])], [[1, 0, 0.5, 1, NAN, 0.25], [1, 0, 1]])
    read = sequences_read(module)
    kwise = accumulate(KWiseObjective(), module, ranked, [[0, 1]])
    assert sum(read) == 4 + 3
    read.clear()
    by_prompt = []
    for row in ranked.to_pylist():
        prompt = {"prompt_ids": row["prompt_ids"], "margin": 0, "source": ""}
        labelled = zip(itertools.combinations(row["responses"], 2), row["preferences"], strict=True)
        pairs = [prompt | {"chosen_ids": a, "rejected_ids": b, "preference": p} for (a, b), p in labelled if p == p]
        table = pa.Table.from_pylist(pairs, schema=schema.COMPARISON)
        by_prompt.append(accumulate(PairwiseObjective(), module, table, [list(range(len(pairs)))]))
    assert sum(read) == 2 * (5 + 3)
    (a, slopes_a), (b, slopes_b) = by_prompt
    assert kwise[0] == pytest.approx({name: (a[name] + b[name]) / 2 for name in a}, abs=1e-6)
    for slope, x, y in zip(kwise[1], slopes_a, slopes_b, strict=True):
        torch.testing.assert_close(slope, (x + y) / 2, atol=1e-6, rtol=1e-4)  # scores are float32


def test_distillation_is_the_kl_of_whole_distributions() -> None:
    """With all tokens kept, against torch's own KL of the model's logits, row by row."""
    module, table = PolicyModule(tiny_llama()), taught(VOCAB)
    found, _ = accumulate(DistillObjective(), module, table, [[0, 1, 2], [3, 4], [5, 6]])
    total = 0.0
    for row in table.to_pylist():
        if not row["response_ids"]:
            continue
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logits = module.model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        order = torch.tensor(row["teacher_ids"]).view(-1, VOCAB)
        teacher = torch.empty(order.shape).scatter_(1, order, torch.tensor(row["teacher_logprobs"]).view(-1, VOCAB))
        total += torch.nn.functional.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum").item()
    assert found["loss"] == pytest.approx(total / sum(q for _, q in SHAPE), rel=1e-4)


def test_before_the_first_step_dpo_knows_nothing() -> None:
    """With the policy's own log-probabilities as reference every pair has logit 0 and loss log 2."""
    module, table = PolicyModule(tiny_llama()), comparisons([(2, 3, 1), (1, 1, 4)])
    with torch.no_grad():
        sums = pair_logprobs(module, PairwiseObjective().collate(table, [0, 1], 0, False)).tolist()
    for name, side in (("ref_chosen", sums[0::2]), ("ref_rejected", sums[1::2])):
        table = table.append_column(name, pa.array(side, pa.float32()))
    found, gradients = accumulate(DPOObjective(DPOConfig()), module, table, [[0, 1]])
    assert found["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


def test_a_margin_asks_for_more_distance() -> None:
    objective, module, table = CASES["pairwise"]
    totals = Totals(1, 1)
    batch = objective.collate(table, [0], 0, False)
    assert batch.columns["margin"].tolist() == pytest.approx([table["margin"][0].as_py()])
    batch.columns["preference"] = torch.ones(1)
    with_margin, _ = objective.loss(module, batch, totals)
    batch.columns["margin"] = torch.zeros(1)
    without, metrics = objective.loss(module, batch, totals)
    chosen, rejected = module.scores(batch).tolist()
    assert without.item() == pytest.approx(np.log1p(np.exp(rejected - chosen)), rel=1e-5)
    assert with_margin > without
    assert float(metrics["accuracy"]) == float(chosen > rejected)


def test_deepspeed_still_lists_the_operation_that_is_switched_off() -> None:
    """``engines.deepspeed.init_distributed`` writes to a table of DeepSpeed's that has no public name."""
    import deepspeed

    from rlhf_dist.engines.deepspeed import SHM_OP

    assert SHM_OP in deepspeed.ops.__compatible_ops__
    source = inspect.getsource(importlib.import_module("deepspeed.comm.torch"))
    assert "ShareMemCommBuilder" in source
    assert "__compatible_ops__.get(builder.NAME" in source
