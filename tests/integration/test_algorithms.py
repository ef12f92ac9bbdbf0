"""Algorithms as the config names them, end to end through Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from jobs import Job
from pyarrow import feather
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.config import Config
from rlhf_dist.data import load
from rlhf_dist.data.prompts import some_rows
from rlhf_dist.engines.objectives import SFTObjective
from rlhf_dist.models import PolicyModule, load_policy

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "algorithms").glob("*.yaml"))
#: The embedded world's configs, small: what they compute, not what they learn.
SMALL_RUN = [
    "model.architecture={hidden_size: 64, intermediate_size: 128, num_attention_heads: 2, num_key_value_heads: 2}",
    "data.world={demonstrations: 320, comparisons: 144, prompts: 96, test_prompts: 16}",
    "compare.pairs=48",
    "train.steps=2",
    "critic.warmup_steps=0",
    "evaluation={prompts: 8, n_samples_per_prompt: 1, greedy: false}",
    "cluster={local_cpus: 2, object_store_mb: 100}",
]


def test_sampled_baselines_replacements_and_pretraining_text(start: Callable[..., Job], config: str) -> None:
    """ReMax's greedy responses, DAPO's dynamic sampling, CISPO, IcePop and PPO-ptx in one run."""
    job = start(
        "--config",
        config,
        "algo={advantage_estimator: remax, use_kl_loss: false, kl_estimator: k1, policy_loss: cispo}",
        "algo={rollout_correction: icepop, ptx_coef: 0.1, ptx_batch_size: 16}",
        "rollout.dynamic_sampling=true",
        "data.world.demonstrations=64",
        "reward.components=[{name: long, function: 'my_rewards:long_enough'}]",
    ).wait()
    assert job.code == 0, job.output
    records = job.metrics("ppo")
    for record in records:
        assert record["train/ptx_loss"] > 1, "nats for each token of text that the policy does not know"
        assert record["train/correction_weight"] == pytest.approx(1, abs=1e-3), "float32: sampler and learner agree"
    assert sum(r["rollout/groups_left_out"] for r in records) > 0
    seen: list[int] = []
    for step in (1, 2):
        table = pq.read_table(job.folder / "rollouts" / f"step_{step:06d}.parquet")
        assert table.num_rows == 32, "as many as without replacements"
        assert set(table["sample_index"].to_pylist()) == {0, 1, 2, 3}, "greedy responses are scored, not trained"
        groups = table["group_id"].to_pylist()
        seen += dict.fromkeys(groups)
        if records[step - 1]["rollout/zero_std_groups"] == 0:
            assert all(
                len({s for s, g in zip(table["score"].to_pylist(), groups, strict=True) if g == i}) > 1 for i in groups
            )
    assert seen == sorted(set(seen)), "no group is trained twice"
    assert max(seen) >= 16, "prompts after those of the first two batches"


def test_preferences_without_sampling(start: Callable[..., Job], config: str) -> None:
    """A reward model from rankings, then DPO from the same policy."""
    job = start(
        "--config",
        config,
        "recipe=pipeline",
        "pipeline.stages=[reward_model,dpo]",
        "data.world={comparisons: 96, demonstrations: 64}",
        "reward_model={loss: kwise, batch_size: 8, learner: {cpus: 0.5}}",
        "dpo={batch_size: 16, learner: {cpus: 0.5}, optim: {lr: 1.0e-3, warmup_ratio: 0}}",
        "evaluation.metrics=[{name: gold_score, function: 'rlhf_dist.data.world:gold_score'}]",
    ).wait()
    assert job.code == 0, job.output
    first = job.metrics("dpo")[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-3), "the policy is still its own reference"
    assert job.metrics("dpo")[-1]["train/margin"] != 0
    assert job.summary["reward_model"]["rankings"] >= 12
    assert 0 <= job.summary["reward_model"]["accuracy"] <= 1
    assert job.summary["eval"]["sft"]["kl"] == pytest.approx(0, abs=1e-3)
    assert job.summary["eval"]["dpo"]["gold_score"] >= 0
    assert (job.folder / "dpo" / "model.safetensors").exists()


@pytest.mark.slow  # test_learners.py evaluates and goes back, test_early_stop.py stops PPO
def test_sft_stops_early_and_keeps_the_best_weights(start: Callable[..., Job], config: str) -> None:
    """32 demonstrations are learnt by heart: the held-out loss turns."""
    job = start(
        "--config",
        config,
        "recipe=sft",
        "data.world={demonstrations: 32, test_prompts: 64}",
        "sft={batch_size: 16, epochs: 150, eval_every: 10, eval_rows: 50, patience: 2, learner: {cpus: 0.5}}",
        "sft.optim={lr: 5.0e-3, warmup_ratio: 0, schedule: constant}",
    ).wait()
    assert job.code == 0, job.output
    summary = job.summary["sft"]
    losses = {r["step"]: r["eval/loss"] for r in job.metrics("sft") if "eval/loss" in r}
    best = min(losses, key=lambda step: losses[step])
    assert list(losses) == list(range(10, best + 21, 10)), "two more evaluations after the best one"
    assert summary["stopped_at"] == best + 20 == job.metrics("sft")[-1]["step"] < 300
    assert summary["eval_loss"] == losses[best] < summary["eval_loss_before"]
    assert f"back to step {best}" in job.output
    assert not (job.folder / "best_sft").exists()
    cfg = Config.model_validate(yaml.safe_load((job.folder / "config.yaml").read_text()))
    table, _ = load.load_demonstrations(cfg, str(job.folder / "tokenizer"), "test", 1024)
    objective, rows = SFTObjective(), some_rows(64, 50, cfg.seed)
    module = PolicyModule(load_policy(str(job.folder / "sft"), "float32", "sdpa"))
    batch, totals = objective.collate(table, rows.tolist(), 0, False), objective.totals(table, rows)
    assert objective.loss(module, batch, totals)[0].item() == pytest.approx(losses[best], abs=1e-5)


def test_a_teacher_with_a_context(start: Callable[..., Job], config: str) -> None:
    """The same model without a context agrees with its own distributions from vLLM; with one it has to learn."""
    world = "data.world={demonstrations: 96, test_prompts: 32}"
    options = ["recipe=distill", world, "distill={batch_size: 48, learner: {cpus: 0.5}}"]
    teacher = f"distill.teacher={Path(config).parent}"
    same = start("--config", config, *options, teacher, "distill.top_k=8", folder="same").wait()
    assert same.code == 0, same.output
    assert same.metrics("distill")[0]["train/loss"] == pytest.approx(0, abs=1e-5), "vLLM and the learner agree"
    context = ["distill.context='you fool !'", "distill.top_k=64"]
    long = "distill={batch_size: 16, epochs: 20, eval_every: 20, optim: {lr: 2.0e-3, warmup_ratio: 0}}"
    told = start("--config", config, *options, *context, long, folder="told")
    told.wait_for_step(1, stage="distill").process.send_signal(signal.SIGTERM)
    assert told.wait().code == 130, told.output
    told = start("--config", config, *options, *context, long, folder="told").wait()
    assert told.code == 0, told.output
    assert f"distill_teacher is there already: {told.folder / 'distill_teacher'}" in told.output
    summary = told.summary["distill"]
    assert summary["demonstrations"] == 96
    assert 1e-3 < summary["kl"] < summary["kl_before"] / 2, "the student answers as if it had been told"
    assert 0.5 < summary["kept_probability"] < 1
    assert (told.folder / "distill" / "model.safetensors").exists()
    assert_told(told.folder / "distill_teacher" / "test.arrow", Path(config).parent, 32)


def assert_told(file: Path, teacher: Path, rows: int) -> None:
    """The file has what transformers finds most likely behind the context."""
    table = feather.read_table(file)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    assert table.num_rows == rows
    for row in table.slice(0, 3).to_pylist():
        assert tokenizer.decode(row["teacher_prompt_ids"]).startswith("<bos> you fool ! Human:")
        n = len(row["response_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([row["teacher_prompt_ids"] + row["response_ids"]])).logits[0, -n - 1 : -1]
        expected = logits.log_softmax(-1)
        ids, found = (torch.tensor(row[f"teacher_{name}"]).view(n, 64) for name in ("ids", "logprobs"))
        torch.testing.assert_close(found, expected.topk(64).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(found, expected.gather(1, ids), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_runs(file: Path, start: Callable[..., Job]) -> None:
    job = start("--config", str(file), *SMALL_RUN, *([] if file.stem == "dapo" else ["critic.warmup_steps=0"])).wait(
        900
    )
    assert job.code == 0, job.output
    assert job.summary["status"] == "finished"
    assert all(math.isfinite(v) for r in job.metrics("ppo") for v in r.values() if isinstance(v, float))
