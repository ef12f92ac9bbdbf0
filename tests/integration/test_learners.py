"""Real DeepSpeed groups: two ranks, whatever the ZeRO stage, compute what one rank computes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from learners import ALGO, BUDGET, OPTIM, SECONDS, running, save_models, spec_of, table_of
from tiny import rollouts
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist import schema
from rlhf_dist.actors.group import Group, Resources
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.rollouts import Chunk, ChunkInfo, RolloutBatch, Slice
from rlhf_dist.actors.scorer import Reference, ReferenceGroup, Scorer
from rlhf_dist.actors.transport import PulledWeights
from rlhf_dist.adapters import merged
from rlhf_dist.config import LearnerConfig, LoRAConfig, ModelConfig, RewardComponent
from rlhf_dist.data.batching import collate, collate_pairs, micro_batches, sequence_lengths
from rlhf_dist.data.experience import join
from rlhf_dist.engines.objectives import PairwiseObjective, PolicyObjective, SFTObjective
from rlhf_dist.models import PolicyModule, ScalarModule, load_policy, load_scalar

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@dataclass
class Outcome:
    """What a group did in two optimizer steps."""

    steps: list[dict[str, float]]
    exported: dict[str, torch.Tensor]
    published: dict[str, torch.Tensor]
    names: list[str]
    canary: np.ndarray | None


def train(spec: LearnerSpec, folders: Path, out: Path) -> Outcome:
    table = ray.put(table_of(spec.objective))
    everything = np.arange(ray.get(table).num_rows)
    with running(spec) as group:
        steps = group.update(table, [everything, everything[::-2]]).steps()
        group.export(str(out), str(folders / "tokenizer"))
        weights = group.weights(1) if spec.head == "policy" else PulledWeights(1, [], [])
        shards = [shard for of_rank in ray.get(weights.parts) for shard in of_rank]
        canaries = [c for c in ray.get(weights.canaries) if c is not None]
    auto = AutoModelForCausalLM if spec.head == "policy" else AutoModelForSequenceClassification
    exported = {n: p.detach() for n, p in auto.from_pretrained(out).named_parameters()}
    for shard in shards:
        shard.verify(1)
    named = list(merged(lambda: (pair for shard in shards for pair in shard.tensors())))
    return Outcome(steps, exported, dict(named), [n for n, _ in named], canaries[0][1] if canaries else None)


@pytest.fixture(scope="module")
def one_rank(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one rank makes of an objective; computed once."""
    done: dict[str, Outcome] = {}

    def of(objective: str) -> Outcome:
        if objective not in done:
            out = tmp_path_factory.mktemp(objective)
            done[objective] = train(spec_of(folders, objective, 1, 2), folders, out)
        return done[objective]

    return of


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("objective", "stage"),
    [
        ("policy", 1),
        ("policy", 2),
        ("policy", 3),
        ("sft", 2),
        ("critic", 3),
        pytest.param("sft", 1, marks=SLOW),
        pytest.param("sft", 3, marks=SLOW),
        pytest.param("critic", 1, marks=SLOW),
        pytest.param("critic", 2, marks=SLOW),
        pytest.param("pairwise", 1, marks=SLOW),
        pytest.param("pairwise", 2, marks=SLOW),
        pytest.param("pairwise", 3, marks=SLOW),
    ],
)
def test_two_ranks_do_what_one_does(objective: str, stage: int, one_rank: Any, folders: Path, tmp_path: Path) -> None:
    expected = one_rank(objective)
    found = train(spec_of(folders, objective, 2, stage), folders, tmp_path)
    for step, (ours, theirs) in enumerate(zip(found.steps, expected.steps, strict=True)):
        assert ours == pytest.approx(theirs, abs=1e-4), f"optimizer step {step}"
    assert expected.steps[0]["grad_norm"] > 10 * OPTIM.max_grad_norm or objective != "policy", "clipping took part"
    assert_close(found.exported, expected.exported)
    assert_close(found.published, expected.published)
    assert len(found.names) == len(set(found.names)), "every tensor once"
    if objective in ("policy", "sft"):
        assert set(found.names) == set(found.exported)
        assert_close(found.published, found.exported)
        np.testing.assert_allclose(found.canary, expected.canary, atol=1e-5)


def test_adapters_alone_are_trained_and_sent(folders: Path, tmp_path: Path) -> None:
    """One rank with ZeRO-2 and two with ZeRO-3, which has to gather weight and factors together."""
    lora = ModelConfig(path="-", lora=LoRAConfig(rank=4))
    initial = dict(AutoModelForCausalLM.from_pretrained(folders / "policy").named_parameters())
    one, two = (
        train(replace(spec_of(folders, "policy", ranks, stage), model=lora), folders, tmp_path / str(ranks))
        for ranks, stage in ((1, 2), (2, 3))
    )
    for step, (ours, theirs) in enumerate(zip(two.steps, one.steps, strict=True)):
        assert ours == pytest.approx(theirs, abs=1e-4), f"optimizer step {step}"
    assert_close(two.exported, one.exported)
    np.testing.assert_allclose(two.canary, one.canary, atol=1e-5)
    for outcome in (one, two):
        assert set(outcome.names) == set(outcome.exported)
        assert_close(outcome.published, outcome.exported)
        moved = {n for n, p in outcome.exported.items() if not torch.equal(p, initial[n])}
        assert moved == {n for n in initial if "_proj" in n}, "the linear layers, and nothing else"


@pytest.mark.parametrize(("objective", "ranks", "stage"), [("sft", 1, 2), ("sft", 2, 3), ("pairwise", 2, 1)])
def test_evaluating_says_what_torch_says_and_going_back_undoes_steps(
    objective: str, ranks: int, stage: int, folders: Path, tmp_path: Path
) -> None:
    table = table_of(objective)
    everything, some = np.arange(table.num_rows), np.arange(0, table.num_rows, 2)
    module, loss = (
        (PolicyModule(load_policy(str(folders / "policy"), "float32", "sdpa"), 0.8), SFTObjective())
        if objective == "sft"
        else (ScalarModule(load_scalar(str(folders / "scalar"), "float32", "sdpa")), PairwiseObjective())
    )
    with torch.no_grad():
        _, expected = loss.loss(module, loss.collate(table, some.tolist(), 0, False), loss.totals(table, some))
    ref = ray.put(table)
    with running(spec_of(folders, objective, ranks, stage)) as group:
        before = group.evaluate(ref, some)
        assert before == pytest.approx({name: float(x) for name, x in expected.items()}, abs=1e-5)
        group.update(ref, [everything]).steps()
        after = group.evaluate(ref, some)
        assert after["loss"] < before["loss"]
        group.keep(str(tmp_path))
        second = group.update(ref, [everything, everything[::-2]]).steps()
        assert group.evaluate(ref, some) != after
        group.go_back(str(tmp_path))
        assert group.evaluate(ref, some) == after
        for ours, theirs in zip(group.update(ref, [everything, everything[::-2]]).steps(), second, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6), "the optimizer went back too"


def test_the_micro_batches_of_these_tests_are_unequal_in_number() -> None:
    """Else nothing here would exercise the dummies."""
    table = table_of("policy")
    lengths = sequence_lengths(table, np.arange(table.num_rows))
    plans = [micro_batches(lengths, 2, rank, BUDGET) for rank in range(2)]
    assert [] in plans[0] + plans[1]


def test_the_first_step_is_that_of_plain_torch(one_rank: Any, folders: Path) -> None:
    """No Ray and no DeepSpeed: one batch, autograd, clipping, AdamW."""
    table = table_of("policy")
    rows = np.arange(table.num_rows)
    module = PolicyModule(load_policy(str(folders / "policy"), "float32", "sdpa"), temperature=0.8)
    objective = PolicyObjective(ALGO, 9)
    loss, _ = objective.loss(module, objective.collate(table, rows, 0, False), objective.totals(table, rows))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9)
    step = one_rank("policy").steps[0]
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert step["grad_norm"] == pytest.approx(norm.item(), abs=1e-4)


def one_chunk(table: pa.Table) -> RolloutBatch:
    groups, none = tuple(range(table.num_rows)), (0,) * table.num_rows
    batch = RolloutBatch(len(groups))
    batch.add(Slice(Chunk(0, ChunkInfo(0, groups, 1, none, none), ray.put(table)), groups))
    return batch


def test_a_sharded_reference_gives_what_a_replica_gives(folders: Path) -> None:
    table = table_of("policy").drop_columns("ref_logprobs")
    arguments = (str(folders / "policy"), ModelConfig(path="-"), 0.8, BUDGET, 0)
    replica = Group("reference", Reference, 1, Resources(1), lambda _: arguments, strategy="PACK", seconds=SECONDS)
    replica.wait_ready()
    part = ReferenceGroup(replica).logprobs(one_chunk(table)).parts[0]
    one = join(table, ray.get(part), "reference")
    replica.release()
    with running(spec_of(folders, None, 2, 3)) as group:
        parts = group.logprobs(one_chunk(table), "ref_logprobs").parts[0]
        tables = ray.get(parts)
    assert all(t.num_rows for t in tables), "both ranks took part"
    two = join(table, tables, "reference")
    module = PolicyModule(load_policy(str(folders / "policy"), "float32", "sdpa"), temperature=0.8)
    batch = collate(table, range(table.num_rows))
    with torch.no_grad():
        expected = batch.gather(module(batch)[0])
    trained = [any(row) for row in table["response_mask"].to_pylist()]
    assert not all(trained)
    expected *= np.repeat(trained, [len(x) for x in table["response_ids"].to_pylist()])  # the others need no forward
    for found in (one, two):
        np.testing.assert_allclose(np.concatenate(found["ref_logprobs"].to_pylist()), expected, atol=1e-5)


def test_centered_scores_have_mean_zero_wherever_the_folder_is_loaded(folders: Path, tmp_path: Path) -> None:
    """Two ranks with ZeRO-3 center and export; a scorer and a sharded reward model load what they wrote."""
    chunk = rollouts([(3, 9), (2, 4), (5, 6), (1, 2), (4, 1)])
    reference = ray.put(chunk.select(["prompt_ids", "response_ids"]))
    module = ScalarModule(load_scalar(str(folders / "scalar"), "float32", "sdpa"))
    with torch.no_grad():
        expected = module.scores(collate(chunk, range(5))).numpy()
    assert abs(expected.mean()) > 0.01
    with running(spec_of(folders, "pairwise", 2, 3)) as group:
        assert group.center(reference) == pytest.approx(expected.mean(), abs=1e-5)
        assert group.center(reference) == pytest.approx(0, abs=1e-6)
        group.export(str(tmp_path), str(folders / "tokenizer"))
    components = [RewardComponent(name="r", model=str(tmp_path))]
    scorer = Scorer.__ray_metadata__.modified_class(
        "reward", components, ModelConfig(path="-"), str(folders / "tokenizer"), BUDGET, 0
    )
    prompts = pa.table({"prompt_id": range(5), "prompt_ids": [[1]] * 5, "prompt": ["p"] * 5, "fields": ["{}"] * 5})
    found = scorer.score(chunk, prompts.cast(schema.PROMPT), True)[0]
    np.testing.assert_allclose(found["score"].to_numpy(), expected - expected.mean(), atol=1e-5)
    frozen = replace(spec_of(folders, None, 2, 3), head="scalar", model_path=str(tmp_path))
    with running(frozen) as group:
        sharded = join(chunk, ray.get(group.scores(one_chunk(chunk), "score/r").parts[0]), "reward")
    np.testing.assert_allclose(sharded["score"].to_numpy(), expected - expected.mean(), atol=1e-5)


def test_outcomes_of_pairs_come_in_order_from_all_ranks(folders: Path) -> None:
    table = table_of("pairwise")
    module = ScalarModule(load_scalar(str(folders / "scalar"), "float32", "sdpa"))
    with torch.no_grad():
        scores = module.scores(collate_pairs(table, range(5))).numpy()
    with running(spec_of(folders, "pairwise", 2, 2)) as group:
        found = group.pair_outcomes(ray.put(table))
    assert found["row"].to_pylist() == list(range(5))
    np.testing.assert_allclose(found["difference"].to_numpy(), scores[0::2] - scores[1::2], atol=1e-5)
    assert found["longer"].to_pylist() == [2, -2, 4, 0, -4]
    assert found["preference"].to_pylist() == table["preference"].to_pylist()


def test_bfloat16_learns(folders: Path) -> None:
    table = table_of("policy")
    rows = np.arange(table.num_rows)
    with running(spec_of(folders, "policy", 1, 1, dtype="bfloat16")) as group:
        steps = group.update(table, [rows] * 3).steps()
        [shards] = ray.get(group.weights(1).parts)
    assert all(np.isfinite(list(step.values())).all() for step in steps)
    assert len({step["loss"] for step in steps}) == 3, "the weights move"
    assert {dtype for shard in shards for dtype in shard.dtypes} == {"bfloat16"}


def test_threads_are_those_of_the_resources(folders: Path) -> None:
    """OMP_NUM_THREADS must be in the actor's environment before it imports torch; the shell's own must not win."""
    spec = spec_of(folders, None, 1, 3)
    # OpenMP gives no more threads than there are cores.
    for cpus, threads in ((0.4, 1), (2.0, min(2, os.cpu_count() or 1))):
        group = LearnerGroup(replace(spec, learner=LearnerConfig(cpus=cpus, zero_stage=3)), "PACK", SECONDS).start()
        [about] = group.wait_ready()
        group.release()
        assert about["threads"] == threads
        assert about["pid"] != os.getpid()
