"""PPO, and everything that shares its loop: GRPO, RLOO, REINFORCE++, ReMax, A2C ...; the config says which.

    python -m rlhf_dist.main recipe=ppo model.path=... reward.components=[...]

Each step trains on ``rollout.batch_size`` prompts. Their responses are scored
chunk by chunk while others are still being generated; advantages are estimated
over the whole batch; policy and critic are updated; the new weights go back to
the generators, which serve nothing before the sync is verified. With
``rollout.max_staleness`` 0 every response is sampled from the newest policy;
with S > 0 the generators run ahead, and no token is older than S updates.

Every name below holds references: the driver reads no tokens and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import ObjectRef

from rlhf_dist.actors.data import load_table
from rlhf_dist.actors.dispatch import GeneratorGroup
from rlhf_dist.actors.experience import ExperienceGroup
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.rewards import GivenUp
from rlhf_dist.actors.rollouts import Columns, RolloutBatch
from rlhf_dist.actors.scorer import ReferenceGroup, ScorerGroup, ShardedReference, ShardedReward
from rlhf_dist.actors.stats import PendingStats
from rlhf_dist.actors.stream import RolloutStream
from rlhf_dist.actors.waiting import WaitLimitExceeded, WorkerDied, wait_for
from rlhf_dist.algorithms.kl_control import kl_controller
from rlhf_dist.data.experience import ScoreScale
from rlhf_dist.data.prompts import minibatches
from rlhf_dist.data.trained import TrainedLedger, TrainedStep
from rlhf_dist.recipes import groups
from rlhf_dist.recipes.evaluate import Evaluator, show
from rlhf_dist.recipes.history import History
from rlhf_dist.recipes.progress import StepClock, log_given_up, log_syncs, shown
from rlhf_dist.recipes.saving import Saver, TrainState
from rlhf_dist.run import Run


@dataclass(frozen=True)
class Workers:
    """The groups of processes beside the learners. They keep no state of the training, and outlive a learner."""

    generators: GeneratorGroup
    reward: ScorerGroup | ShardedReward
    reference: ReferenceGroup | ShardedReference | None
    experience: ExperienceGroup
    prompts: ObjectRef
    """``schema.PROMPT``."""
    prompt_rows: int
    evaluate: Evaluator
    pretrain: PretrainText | None


def ppo(run: Run, model_path: str, reward_model_path: str | None = None, reference_path: str | None = None) -> str:
    """Train the policy in ``model_path``; returns the folder of the result.

    Goes on from the newest checkpoint of the stage, if there is one; also when a learner dies on the way.

    Args:
        reference_path: the policy to stay near to; default: ``model_path``.
    """
    saver = Saver(run)
    saved = saver.newest()
    critic_path = run.cfg.critic.path or reward_model_path or model_path
    policy, critic = groups.policy_and_critic(run, model_path, critic_path, saved)
    workers = start_workers(run, model_path, reward_model_path, reference_path or model_path, policy, critic)
    while True:
        try:
            train(run, saver, TrainState.of(saved), workers, policy, critic)
        except (WorkerDied, WaitLimitExceeded) as error:
            saver.wait()
            run.give_up([policy, critic] if critic else [policy], error)
            workers.generators.reset()
            saved = saver.newest()
            policy, critic = groups.policy_and_critic(run, model_path, critic_path, saved)
            run.start(policy=policy, critic=critic)
        else:
            run.finish_stage()
            return run.result


def start_workers(
    run: Run,
    model_path: str,
    reward_model_path: str | None,
    reference_path: str,
    policy: LearnerGroup,
    critic: LearnerGroup | None,
) -> Workers:
    """Everybody else; returns when they and the learners, which load side by side, are up."""
    cfg = run.cfg
    generators = groups.generators(run, model_path, from_learner=True)
    reward = groups.reward(run, reward_model_path)
    reference = groups.reference(run, reference_path) if cfg.uses_reference else None
    experience = groups.experience(run)
    metrics = groups.evaluation_metrics(run, reward_model_path)
    # Data are read while the processes start.
    prompts, report = load_table("prompts", cfg, run.tokenizer_dir, "train")
    run.note_rows("prompts", report)
    evaluate = Evaluator(run, generators, experience, reward, reference, metrics)
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
    return Workers(generators, reward, reference, experience, prompts, report["rows"], evaluate, pretrain)


def train(
    run: Run, saver: Saver, state: TrainState, workers: Workers, policy: LearnerGroup, critic: LearnerGroup | None
) -> None:
    """From ``state`` to the exported policy.

    Raises:
        WorkerDied: what died took a part of the training with it, which has to go on from a checkpoint.
    """
    cfg, label = run.cfg, run.stage.label
    first = "sft" if label == "ppo" else f"{label} start"
    generators, reward, reference = workers.generators, workers.reward, workers.reference
    experience, evaluate, pretrain = workers.experience, workers.evaluate, workers.pretrain
    ledger = TrainedLedger(run.beside("ledger.jsonl"))
    stream = RolloutStream(
        generators,
        workers.prompts,
        run.prompt_order(workers.prompt_rows),
        batch_size=cfg.rollout.batch_size,
        n_samples_per_prompt=cfg.rollout.n_samples_per_prompt,
        steps=cfg.train.steps - state.step,
        greedy=cfg.uses_greedy,
        max_staleness=cfg.rollout.max_staleness,
        version=ledger.begin(state.step),
        state=state.stream,
    )
    scores = reward.score(stream, workers.prompts)  # of every chunk, the moment it is generated
    ref = reference.logprobs(stream) if reference else None
    log_syncs(run, stream.publish(policy.weights(stream.version)))
    run.faults.works_again()
    before = state.before or evaluate(first, step=0)
    history = History(run, before, state.history)
    scale = initial_scale(before) if cfg.reward.normalize else ScoreScale()
    kl_control = kl_controller(cfg.algo.kl_coef, cfg.algo.kl_target, cfg.algo.kl_horizon, state.kl_control)

    with run.saving(), run.terminal.stage(label, cfg.train.steps) as bar:
        for step in run.steps(done=state.step):
            if history.ended:
                break
            clock = StepClock(run.trace)
            rollouts = stream.next_batch()
            old = policy.logprobs(rollouts) if cfg.recomputes_logprobs else None
            values = critic.values(rollouts) if critic else None
            rollouts.wait(cfg.run.wait_limit)
            replaced = replace_groups(run, stream, rollouts, experience, reward, scores)
            clock.lap("generate")

            columns = [c for c in (scores, ref, old, values) if c is not None]
            batch, figures = experience.build(step, stream.version, rollouts, columns, scale, kl_control.value)
            figures = wait_for(figures, "experience, estimating advantages")
            if reference:
                kl_control.update(figures["rollout/kl"], cfg.samples_per_step)
            clock.lap("score")

            rows = minibatches(cfg.samples_per_step, cfg.train.batch_size, cfg.updates_per_step, [cfg.seed, step])
            stats = PendingStats()
            if step > cfg.critic.warmup_steps:
                stats |= policy.update(batch, rows, pretrain.minibatches(step) if pretrain else None)
            if critic:
                stats |= critic.update(batch, rows)
            with run.keeping_failed_batch(label, [policy, critic], step):
                figures |= stats.result()
            ledger.trained(TrainedStep(step, stream.version + 1, stream.trained(rollouts)))
            clock.lap("update")

            figures |= log_syncs(run, stream.publish(policy.weights(stream.version + 1)))
            clock.lap("push_weights")

            run.log(label, step, figures | replaced | clock.figures(rollouts) | saver.figures())
            bar.update(step, shown(figures, rollouts, clock))
            due = cfg.run.eval_every and step % cfg.run.eval_every == 0 and step < cfg.train.steps
            score = history.add(step, evaluate(label, step)) if due else None
            state = TrainState(step, stream.state_dict(), kl_control.state_dict(), before, history.state_dict())
            saver.save_if_due(state, [policy, critic] if critic else [policy], score, keep=history.best_step == step)

    log_syncs(run, generators.wait_published(stream.version))
    if not history.ended:
        history.add(cfg.train.steps, evaluate(label, step=cfg.train.steps))
    saver.wait()
    after = history.export(policy, saver, ledger, evaluate)
    show(run, {first: before, label: after})
    experience.flush()
    run.collect_spans()


def initial_scale(evaluation: dict[str, Any]) -> ScoreScale:
    """Mean and standard deviation of the held-out scores of the initial policy.

    Raises:
        ValueError: no sample got a reward.
    """
    if "reward" not in evaluation["std"]:
        raise ValueError("reward.normalize needs scores of the initial policy, and no held-out sample got a reward")
    return ScoreScale(evaluation["metrics"]["reward"], evaluation["std"]["reward"])


def replace_groups(
    run: Run,
    stream: RolloutStream,
    rollouts: RolloutBatch,
    experience: ExperienceGroup,
    reward: ScorerGroup | ShardedReward,
    scores: Columns,
) -> dict[str, float]:
    """New prompts for the groups of a complete batch that cannot teach; returns figures of the step.

    Groups in which a sample has no reward (``on_failure: skip``) are all replaced. With dynamic sampling (DAPO,
    2503.14476) those whose scores are all equal are too; what its rounds do not replace stays, with advantage 0.

    Raises:
        ValueError: an endpoint's failure ends the run, or groups are without a reward after ``reward.skip_rounds``.
    """
    cfg = run.cfg
    if not (cfg.reward.uses_endpoints or cfg.rollout.dynamic_sampling):
        return {}
    rounds = cfg.rollout.dynamic_sampling_rounds if cfg.rollout.dynamic_sampling else 0
    unscored: list[int] = []
    given_up: list[GivenUp] = []
    while True:
        without_reward, equal = experience.unfit(rollouts, scores)
        given_up += log_given_up(run, reward)
        if without_reward:
            unscored.append(len(without_reward))
        if len(unscored) > cfg.reward.skip_rounds:
            raise ValueError(
                f"{sum(unscored)} groups in {len(unscored)} rounds got no reward (reward.skip_rounds="
                f"{cfg.reward.skip_rounds}). The last: {given_up[-1].message if given_up else 'see given_up.jsonl'}"
            )
        if rounds == 0:
            equal = []
        if not without_reward and not equal:
            break
        rounds -= bool(equal)
        stream.replace(rollouts, without_reward + equal)
        rollouts.wait(cfg.run.wait_limit)
    if unscored:
        last = f"; the last: {given_up[-1].endpoint}: {given_up[-1].cause}" if given_up else ""
        run.terminal.warn(f"{sum(unscored)} groups without a reward were replaced{last}")
    return {"rollout/unscored_groups": float(sum(unscored))} if cfg.reward.uses_endpoints else {}


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
