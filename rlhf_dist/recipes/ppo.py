"""PPO, and everything that shares its loop: GRPO, RLOO, REINFORCE++, ReMax, A2C ...; the config says which.

    python -m rlhf_dist.main recipe=ppo model.path=... reward.components=[...]

Each step samples ``rollout.batch_size`` prompts from the newest policy, scores
the responses chunk by chunk while others are still being generated, estimates
advantages over the whole batch, updates policy and critic, and sends the new
weights back to the generators, which serve nothing before the sync is verified.

Every name below holds references: the driver reads no tokens and no tensors.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from ray import ObjectRef

from rlhf_dist.actors.data import load_table
from rlhf_dist.actors.dispatch import Columns, RolloutBatch, RolloutStream
from rlhf_dist.actors.experience import ExperienceGroup
from rlhf_dist.actors.stats import PendingStats
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.data.experience import ScoreScale
from rlhf_dist.data.prompts import PromptOrder, minibatches
from rlhf_dist.observability.trace import Trace
from rlhf_dist.recipes import groups
from rlhf_dist.recipes.evaluate import Evaluator, show
from rlhf_dist.run import Run


def ppo(run: Run, model_path: str, reward_model_path: str | None = None) -> str:
    """Train the policy in ``model_path``; returns the folder of the result, ``policy/`` in the run folder."""
    cfg = run.cfg
    policy, critic = groups.policy_and_critic(run, model_path, cfg.critic.path or reward_model_path or model_path)
    generators = groups.GeneratorGroup(run, model_path, from_learner=True)
    reward = groups.reward(run, reward_model_path)
    reference = groups.reference(run, model_path) if cfg.uses_reference else None
    experience = groups.experience(run)
    metrics = groups.evaluation_metrics(run)
    pretrain = PretrainText(run) if cfg.algo.ptx_coef else None
    run.start(
        generator=generators,
        policy=policy,
        critic=critic,
        reward=reward,
        reference=reference,
        experience=experience,
        metrics=metrics,
    )

    prompts, report = load_table("prompts", cfg, run.tokenizer_dir, "train")
    run.note_rows("prompts", report)
    stream = RolloutStream(
        generators.actors,
        prompts,
        PromptOrder(report["rows"], cfg.seed, cfg.data.shuffle),
        batch_size=cfg.rollout.batch_size,
        n_samples_per_prompt=cfg.rollout.n_samples_per_prompt,
        greedy=cfg.uses_greedy,
        max_staleness=cfg.rollout.max_staleness,
    )
    stream.publish(policy.weights(version=0))
    log_sync(run, 0, stream.wait_published())
    evaluate = Evaluator(run, generators, experience, reward, reference, metrics)
    before = evaluate("sft", step=0)
    scale = ScoreScale(before["metrics"]["reward"], before["std"]["reward"]) if cfg.reward.normalize else ScoreScale()

    with run.terminal.stage("ppo", cfg.train.steps) as bar:
        for step in run.steps():
            clock = StepClock(run.trace)
            rollouts = stream.next_batch()
            scores = reward.score(rollouts, prompts)  # } the stages run at once, chunk by chunk,
            old = policy.logprobs(rollouts)  # } each chunk as soon as it is generated
            ref = reference.logprobs(rollouts) if reference else None
            values = critic.values(rollouts) if critic else None
            rollouts.wait(cfg.run.wait_limit)
            if cfg.rollout.dynamic_sampling:
                replace_groups_without_spread(run, stream, rollouts, experience, scores)
            clock.lap("generate")

            columns = [c for c in (scores, old, ref, values) if c is not None]
            batch, figures = experience.build(step, rollouts, columns, scale)
            figures = wait_for(figures, "experience, estimating advantages")
            clock.lap("score")

            rows = minibatches(cfg.samples_per_step, cfg.train.batch_size, cfg.updates_per_step, [cfg.seed, step])
            stats = PendingStats()
            if step > cfg.critic.warmup_steps:
                stats |= policy.update(batch, rows, pretrain.minibatches(step) if pretrain else None)
            if critic:
                stats |= critic.update(batch, rows)
            figures |= stats.result()
            stream.trained(rollouts)
            clock.lap("update")

            stream.publish(policy.weights(version=step))
            figures |= log_sync(run, step, stream.wait_published())
            clock.lap("push_weights")

            run.log("ppo", step, figures | clock.figures(rollouts))
            bar.update(step, shown(figures, rollouts, clock))
            if cfg.run.eval_every and step % cfg.run.eval_every == 0 and step < cfg.train.steps:
                evaluate("ppo", step)
            run.checkpoint_if_due(step, policy)

    after = evaluate("ppo", step=cfg.train.steps)
    show(run, {"sft": before, "ppo": after})
    policy.export(run.path("policy"), run.tokenizer_dir)
    experience.flush()
    run.collect_spans()
    run.finish_stage()
    return run.path("policy")


def replace_groups_without_spread(
    run: Run, stream: RolloutStream, rollouts: RolloutBatch, experience: ExperienceGroup, scores: Columns
) -> None:
    """Dynamic sampling (DAPO, 2503.14476): new prompts for groups whose scores are all equal and teach nothing.

    What the rounds do not replace stays in the batch, with advantage 0.
    """
    for _ in range(run.cfg.rollout.dynamic_sampling_rounds):
        equal = experience.without_spread(rollouts, scores)
        if not equal:
            return
        stream.replace(rollouts, equal)
        rollouts.wait(run.cfg.run.wait_limit)


class PretrainText:
    """The text of PPO-ptx (2203.02155, section 3.5) and which rows of it each step reads."""

    def __init__(self, run: Run) -> None:
        self.cfg = run.cfg
        self.table, report = load_table("pretrain", run.cfg, run.tokenizer_dir)
        self.rows = report["rows"]
        run.note_rows("pretraining text", report)

    def minibatches(self, step: int) -> tuple[ObjectRef, list[np.ndarray]]:
        """The table and its rows for each optimizer step of a PPO step."""
        size = min(self.cfg.algo.ptx_batch_size or self.cfg.train.batch_size, self.rows)
        return self.table, minibatches(self.rows, size, self.cfg.updates_per_step, [self.cfg.seed, step, 1])


class StepClock:
    """Seconds of the phases of one step, as the driver sees them."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.began = self.last = time.time()
        self.phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The phase that just ended."""
        now = time.time()
        self.phases[phase] = now - self.last
        self.trace.add([{"name": phase, "process": "driver", "start": self.last, "end": now, "args": {}}])
        self.last = now

    @property
    def seconds(self) -> float:
        return self.last - self.began

    def figures(self, rollouts: RolloutBatch) -> dict[str, float]:
        return {
            **{f"timing/{phase}": seconds for phase, seconds in self.phases.items()},
            "timing/step": self.seconds,
            "perf/throughput": rollouts.tokens / self.seconds,
            "perf/samples_per_second": rollouts.samples / self.seconds,
            "rollout/groups_left_out": float(len(rollouts.left_out)),
        }


def log_sync(run: Run, version: int, records: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of a weight sync; the largest canary difference of the run goes into the summary."""
    worst = max(r["canary_diff"] for r in records)
    run.summary.set("weight_sync.max_canary_diff", max(worst, run.summary.get("weight_sync.max_canary_diff", 0.0)))
    run.summary.set("weight_sync.versions", version + 1)
    return {
        "weight_sync/canary_diff": worst,
        "weight_sync/canary_tells_apart": float(all(r["tells_apart"] for r in records)),
        "weight_sync/bytes": float(records[0]["nbytes"]),
        "weight_sync/load_seconds": max(r["load_seconds"] for r in records),
        "weight_sync/verify_seconds": max(r["verify_seconds"] for r in records),
        "weight_sync/pull_seconds": max(r["pull_seconds"] for r in records),
    }


def shown(figures: dict[str, float], rollouts: RolloutBatch, clock: StepClock) -> dict[str, float]:
    """What the progress bar says."""
    shown = {"reward": figures["rollout/reward_mean"]}
    if "rollout/kl" in figures:
        shown["kl"] = figures["rollout/kl"]
    return shown | {"tokens/s": rollouts.tokens / clock.seconds}
