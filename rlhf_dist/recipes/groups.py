"""From the config to groups of actors: the one place where roles meet models and sizes."""

from __future__ import annotations

from typing import Literal

from rlhf_dist.actors.dispatch import GeneratorGroup
from rlhf_dist.actors.experience import ExperienceGroup
from rlhf_dist.actors.generator import Generator
from rlhf_dist.actors.group import Group, Resources
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import CANARY_LENGTH, LearnerSpec, ObjectiveName
from rlhf_dist.actors.restoring import learner_state
from rlhf_dist.actors.scorer import (
    Reference,
    ReferenceGroup,
    ScorerGroup,
    ShardedReference,
    ShardedReward,
    scorer_group,
)
from rlhf_dist.checkpoint import Checkpoint
from rlhf_dist.config import LearnerConfig, OptimConfig, ReplicaConfig, RewardComponent
from rlhf_dist.run import Run


def generators(run: Run, model_path: str, from_learner: bool, context: int | None = None) -> GeneratorGroup:
    """The vLLM engines.

    Args:
        context: tokens that a request may have in all; by default the longest prompt and response.
    """
    g, r = run.cfg.generator, run.cfg.rollout
    tokens = context or r.max_prompt_length + r.max_response_length
    group = Group(
        "generator",
        Generator,
        g.replicas,
        Resources(g.cpus * g.tensor_parallel_size, g.gpus, g.resources),
        lambda i: (i, model_path, run.cfg, [run.eos_id], from_learner, tokens),
        strategy=run.cfg.cluster.placement,
        seconds=run.cfg.run.startup_limit,
        # Calls of one engine overlap: the one that waits for chunks, groups that are submitted, weights that load.
        concurrency=8,
    )
    return GeneratorGroup(group, g.max_num_seqs)


def learner(
    run: Run,
    role: str,
    model_path: str,
    *,
    head: Literal["policy", "scalar"],
    objective: ObjectiveName | None,
    placement: LearnerConfig,
    optim: OptimConfig | None,
    micro_batch_tokens: int,
    packing: bool = False,
    total_steps: int = 1,
    saved: Checkpoint | None = None,
) -> LearnerGroup:
    """A DeepSpeed group that starts to load at once.

    Args:
        saved: where it goes on, instead of at ``model_path`` with a fresh optimizer.
    """
    cfg = run.cfg
    spec = LearnerSpec(
        role=role,
        model_path=model_path,
        head=head,
        objective=objective,
        model=cfg.model,
        learner=placement,
        optim=optim,
        micro_batch_tokens=micro_batch_tokens,
        packing=packing,
        total_steps=total_steps,
        temperature=cfg.rollout.temperature,
        algo=cfg.resolved_algo,
        dpo=cfg.dpo,
        max_response_length=cfg.rollout.max_response_length,
        shard_mb=cfg.weight_sync.shard_mb,
        wire_dtype=cfg.weight_sync.wire_dtype,
        pad_id=run.pad_id,
        seed=cfg.seed,
        transport=cfg.weight_sync.transport,
        generator_workers=cfg.generator.tensor_parallel_size,
        # The canary and the token after it must fit into the generator's context.
        restore=learner_state(saved.folder, saved.manifest, role, placement) if saved else None,
        canary_length=min(CANARY_LENGTH, cfg.rollout.max_prompt_length + cfg.rollout.max_response_length - 1),
    )
    # After a fault a node may be missing, and another one on its way.
    patient = bool(run.faults.faults)
    return LearnerGroup(spec, cfg.cluster.placement, cfg.run.startup_limit, patient).start()


def policy_and_critic(
    run: Run, model_path: str, critic_path: str, saved: Checkpoint | None = None
) -> tuple[LearnerGroup, LearnerGroup | None]:
    """PPO's learners; the critic only where the estimator needs one."""
    cfg = run.cfg
    policy = learner(
        run,
        "policy",
        model_path,
        head="policy",
        objective="policy",
        placement=cfg.policy.learner,
        optim=cfg.policy.optim,
        total_steps=cfg.updates_per_step * (cfg.train.steps - cfg.critic.warmup_steps),
        micro_batch_tokens=cfg.train.micro_batch_tokens,
        packing=cfg.train.packing,
        saved=saved,
    )
    if not cfg.uses_critic:
        return policy, None
    critic = learner(
        run,
        "critic",
        critic_path,
        head="scalar",
        objective="critic",
        placement=cfg.critic.learner,
        optim=cfg.critic.optim,
        total_steps=cfg.updates_per_step * cfg.train.steps,
        micro_batch_tokens=cfg.train.micro_batch_tokens,
        packing=cfg.train.packing,
        saved=saved,
    )
    return policy, critic


def reference(run: Run, model_path: str) -> ReferenceGroup | ShardedReference:
    """The frozen initial policy."""
    cfg, r = run.cfg, run.cfg.reference
    if r.sharded:
        return ShardedReference(_frozen(run, "reference", model_path, "policy", r))
    arguments = (model_path, cfg.model, cfg.rollout.temperature, r.micro_batch_tokens, run.pad_id)
    return ReferenceGroup(
        Group(
            "reference",
            Reference,
            r.replicas,
            Resources(r.cpus, r.gpus, r.resources),
            lambda _: arguments,
            strategy=cfg.cluster.placement,
            seconds=cfg.run.startup_limit,
            ray_restarts=True,
        )
    )


def reward(run: Run, reward_model_path: str | None) -> ScorerGroup | ShardedReward:
    """The reward; ``model: trained`` stands for ``reward_model_path``."""
    r = run.cfg.reward
    components = [
        c.model_copy(update={"model": reward_model_path}) if c.model == "trained" else c for c in r.components
    ]
    if r.sharded:
        assert components[0].model is not None
        return ShardedReward(_frozen(run, "reward", components[0].model, "scalar", r), components[0])
    return _scorers(run, "reward", components, r)


def evaluation_metrics(run: Run, reward_model_path: str | None) -> ScorerGroup | None:
    """The evaluation's own figures; ``model: trained`` is ``reward_model_path``, and is left out without one."""
    e = run.cfg.evaluation
    components = [
        RewardComponent(
            name=m.name,
            model=reward_model_path if m.model == "trained" else _model(run, m.model),
            function=m.function,
            timeout=m.timeout,
        )
        for m in e.metrics
        if m.model != "trained" or reward_model_path is not None
    ]
    return _scorers(run, "metrics", components, ReplicaConfig(cpus=e.cpus, gpus=e.gpus)) if components else None


def _model(run: Run, name: str | None) -> str | None:
    """The folder of the stage's result that ``name`` says, or ``name`` itself."""
    return str(run.results[name]) if name in run.results else name


def experience(run: Run) -> ExperienceGroup:
    """The process that joins a batch."""
    cfg = run.cfg
    folder = run.beside("rollouts") if cfg.run.save_rollouts else None
    return ExperienceGroup(
        cfg.algo,
        cfg.reward,
        cfg.rollout.max_response_length,
        run.tokenizer_dir,
        cfg.rollout.max_staleness,
        folder,
        cfg.cluster.placement,
        cfg.run.startup_limit,
    )


def _scorers(run: Run, role: str, components: list[RewardComponent], placement: ReplicaConfig) -> ScorerGroup:
    return scorer_group(
        role,
        components,
        run.cfg.model,
        run.tokenizer_dir,
        replicas=placement.replicas,
        resources=Resources(placement.cpus, placement.gpus, placement.resources),
        max_tokens=placement.micro_batch_tokens,
        pad_id=run.pad_id,
        strategy=run.cfg.cluster.placement,
        seconds=run.cfg.run.startup_limit,
    )


def _frozen(run: Run, role: str, path: str, head: Literal["policy", "scalar"], r: ReplicaConfig) -> LearnerGroup:
    placement = LearnerConfig(ranks=r.replicas, cpus=r.cpus, gpus=r.gpus, zero_stage=3, resources=r.resources)
    return learner(
        run,
        role,
        path,
        head=head,
        objective=None,
        placement=placement,
        optim=None,
        micro_batch_tokens=r.micro_batch_tokens,
    )
