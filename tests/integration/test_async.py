"""Generators that run ahead of the learner, by whole runs of the program; and that staleness 0 adds nothing of its own.

``plain_loop`` is what a synchronous trainer would do, without stream, ledger, dispatch, chunks or weight sync: every
step a bare vLLM samples from the exported policy, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from jobs import Job
from transformers import AutoModelForCausalLM

from rlhf_dist import schema
from rlhf_dist.actors.data import load_table
from rlhf_dist.actors.generator import sample_seed
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import Config
from rlhf_dist.config_io import load
from rlhf_dist.data.experience import ScoreScale, estimate_advantages, join
from rlhf_dist.data.prompts import PromptOrder, minibatches
from rlhf_dist.data.ragged import Ragged
from rlhf_dist.data.tokenization import load_tokenizer

STEPS = 3
EXACT = [f"train.steps={STEPS}", "algo.kl_coef=0", "algo.use_kl_loss=false", "train.batch_size=16"]


@ray.remote(num_cpus=0.2)
class BareVLLM:
    """``LLM.generate`` on a checkpoint; no step loop of ours, no chunks, no weight update."""

    def sample(self, folder: str, prompts: list[list[int]], seeds: list[int], eos_id: int, cfg: Config) -> list[Any]:
        import os

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams

        r = cfg.rollout
        llm = LLM(
            model=folder,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=r.max_prompt_length + r.max_response_length,
            kv_cache_memory_bytes=2**26,
            enable_chunked_prefill=False,
            max_num_batched_tokens=8192,
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
        )
        params = [
            SamplingParams(
                max_tokens=r.max_response_length, stop_token_ids=[eos_id], seed=seed, logprobs=0, detokenize=False
            )
            for seed in seeds
        ]
        outs = [out.outputs[0] for out in llm.generate([{"prompt_token_ids": p} for p in prompts], params)]
        chosen = lambda out: [step[t].logprob for step, t in zip(out.logprobs, out.token_ids, strict=True)]
        return [(list(out.token_ids), chosen(out), out.finish_reason) for out in outs]


def plain_loop(cfg: Config, folder: Path) -> tuple[list[pa.Table], list[list[dict[str, float]]]]:
    """Rollouts and losses of every step; the final policy is exported to ``folder/policy``."""
    model_path = str(cfg.model.path)
    tokenizer = load_tokenizer(model_path)
    reference, report = load_table("prompts", cfg, model_path, "train")
    prompts = Ragged.of(ray.get(reference), "prompt_ids")
    prompt_id = ray.get(reference)["prompt_id"].to_numpy()
    order = PromptOrder(report["rows"], cfg.seed, cfg.data.shuffle)
    spec = LearnerSpec(
        role="policy",
        model_path=model_path,
        head="policy",
        objective="policy",
        model=cfg.model,
        learner=cfg.policy.learner,
        optim=cfg.policy.optim,
        micro_batch_tokens=cfg.train.micro_batch_tokens,
        total_steps=cfg.updates_per_step * STEPS,
        algo=cfg.resolved_algo,
        max_response_length=cfg.rollout.max_response_length,
    )
    policy = LearnerGroup(spec, "PACK", 300).start()
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    sampler = BareVLLM.options(runtime_env=environment).remote()
    policy.wait_ready()
    n, tables, losses = cfg.rollout.n_samples_per_prompt, [], []
    for step in range(1, STEPS + 1):
        policy.export(str(folder / "policy"), model_path)
        groups = [(step - 1) * cfg.rollout.batch_size + i for i in range(cfg.rollout.batch_size)]
        rows = order.take(len(groups))
        samples = [(g, row, i) for g, row in zip(groups, rows, strict=True) for i in range(n)]
        seeds = [sample_seed(cfg.seed, g, i) for g, _, i in samples]
        texts = [prompts[row].tolist() for _, row, _ in samples]
        outs = wait_for(
            sampler.sample.remote(str(folder / "policy"), texts, seeds, tokenizer.eos_token_id, cfg), "vLLM"
        )
        lengths = np.array([len(ids) for ids, _, _ in outs])
        ragged = lambda parts, dtype, lengths=lengths: Ragged.to_arrow(np.concatenate(parts).astype(dtype), lengths)
        table = pa.table(
            {
                "prompt_id": pa.array([prompt_id[row] for _, row, _ in samples], pa.int64()),
                "group_id": pa.array([g for g, _, _ in samples], pa.int64()),
                "sample_index": pa.array([i for _, _, i in samples], pa.int32()),
                "prompt_ids": pa.array(texts, pa.list_(pa.int32())),
                "response_ids": ragged([ids for ids, _, _ in outs], np.int32),
                "rollout_logprobs": ragged([logprobs for _, logprobs, _ in outs], np.float32),
                "policy_version": ragged([[step - 1] * k for k in lengths], np.int32),
                "finish_reason": pa.array([reason for _, _, reason in outs]).dictionary_encode(),
                "response_mask": ragged([[1] * k for k in lengths], np.uint8),
            }
        ).cast(schema.ROLLOUT)
        old = wait_for(policy.ranks[0].logprobs.remote(table, "old_logprobs"), "policy")
        table = join(table, [old], "policy")
        texts = tokenizer.batch_decode(table["response_ids"].to_pylist(), skip_special_tokens=True)
        table = table.append_column("score", pa.array([len(t) / 10 for t in texts], pa.float32()))
        table, _ = estimate_advantages(table, cfg.algo, cfg.reward, 0.0, ScoreScale(), cfg.rollout.max_response_length)
        parts = minibatches(cfg.samples_per_step, cfg.train.batch_size, cfg.updates_per_step, [cfg.seed, step])
        losses.append(policy.update(table, parts).steps())
        tables.append(table)
    policy.export(str(folder / "policy"), model_path)
    policy.release()
    ray.kill(sampler)
    return tables, losses


def rollouts(job: Job) -> list[pa.Table]:
    """Every batch that was trained, by group and sample."""
    by = [("group_id", "ascending"), ("sample_index", "ascending")]
    return [pq.read_table(file).sort_by(by) for file in sorted((job.folder / "rollouts").iterdir())]


@pytest.mark.usefixtures("cluster")
def test_staleness_0_is_a_plain_synchronous_loop_bit_for_bit(
    start: Callable[..., Job], config: str, tmp_path: Path
) -> None:
    job = start("--config", config, *EXACT).wait()
    assert job.code == 0, job.output
    tables, losses = plain_loop(load(config, EXACT), tmp_path)
    found = rollouts(job)
    assert len(found) == STEPS
    for expected, table in zip(tables, found, strict=True):
        for column in ("prompt_id", "group_id", "sample_index", "response_ids", "policy_version", "score"):
            assert table[column].to_pylist() == expected[column].to_pylist(), column
        for column in ("rollout_logprobs", "old_logprobs", "advantages"):
            assert np.array_equal(Ragged.of(table, column).values, Ragged.of(expected, column).values), column
    for steps, record in zip(losses, job.metrics("ppo"), strict=True):
        for name in ("policy_loss", "loss", "grad_norm", "entropy"):
            assert record[f"train/{name}"] == sum(s[name] for s in steps) / len(steps), name
    weights = [AutoModelForCausalLM.from_pretrained(f / "policy").state_dict() for f in (job.folder, tmp_path)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


@pytest.mark.parametrize("serve", [pytest.param("merged", marks=pytest.mark.slow), "adapters"])
def test_adapters_reach_the_generators_in_flight(start: Callable[..., Job], config: str, serve: str) -> None:
    """LoRA under ZeRO-3 on two ranks; each sync sends the adapters alone, and every version passes the gate."""
    job = start(
        "--config",
        config,
        "train.steps=4",
        "rollout.max_staleness=1",
        f"model.lora={{rank: 4, target_modules: [q_proj, v_proj], serve: {serve}}}",
        "policy={learner: {ranks: 2, zero_stage: 3, cpus: 0.2}, optim: {lr: 0.01}}",
        "algo.old_logprobs=sampler",
    ).wait()
    assert job.code == 0, job.output
    model = AutoModelForCausalLM.from_pretrained(job.folder / "policy")
    initial = AutoModelForCausalLM.from_pretrained(Path(config).parent)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, initial.get_parameter(n))}
    assert moved == {n for n, _ in initial.named_parameters() if "q_proj" in n or "v_proj" in n}
    sent = {r["weight_sync/bytes"] for r in job.metrics("ppo") if "weight_sync/bytes" in r}
    adapters = sum(4 * 4 * sum(initial.get_parameter(n).shape) for n in moved)
    assert sent == {adapters}
    assert job.summary["weight_sync"]["max_canary_diff"] < 1e-4
    assert job.summary["weight_sync"]["versions"] == 5


@pytest.mark.parametrize(
    ("staleness", "mode"),
    [
        pytest.param(1, "drain", marks=pytest.mark.slow),
        (2, "keep"),
        pytest.param(3, "recompute", marks=pytest.mark.slow),
    ],
)
def test_generators_that_run_ahead_stay_within_the_bound(
    start: Callable[..., Job], config: str, staleness: int, mode: str
) -> None:
    steps = 8
    job = start(
        "--config",
        config,
        f"train.steps={steps}",
        f"rollout.max_staleness={staleness}",
        f"rollout.in_flight_updates={mode}",
        "generator={replicas: 2, cpus: 0.2, max_num_seqs: 4}",
        "train.batch_size=16",  # two optimizer steps: π_old, and with it the gap by age, are known before them
        "run.eval_every=5",
    ).wait()
    assert job.code == 0, job.output
    tables = rollouts(job)
    trained = [g for table in tables for g in table["group_id"].to_pylist()[::4]]
    assert sorted(trained) == list(range(8 * steps)), "every group once, none dropped"
    records = job.metrics("ppo")
    ages = []
    for step, (table, record) in enumerate(zip(tables, records, strict=True), 1):
        versions = table["policy_version"].to_pylist()
        ages += [step - 1 - v for row in versions for v in row]
        assert all(row == sorted(row) for row in versions)
        assert min(ages) >= 0
        assert max(ages) <= staleness
        assert record["train/policy_age_max"] <= staleness
    assert max(ages) > 0, "the generators did run ahead"
    assert job.summary["weight_sync"]["versions"] == steps + 1
    assert job.summary["weight_sync"]["max_canary_diff"] < 1e-4
    gaps = [r for r in records if "train/rollout_logprob_abs_diff/age_1" in r]
    assert gaps, "the gap between sampler and learner is reported by age"
    job.assert_nothing_left()
