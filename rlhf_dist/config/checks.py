"""What must hold between the sections of the config; what must hold in one of them is in its own file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_dist.config.data import COMPARISON_FORMATS, RANKING_FORMATS
from rlhf_dist.config.pipeline import Stage
from rlhf_dist.config.ppo import GROUP_ESTIMATORS

if TYPE_CHECKING:
    from rlhf_dist.config import Config


def check(cfg: Config, *, stages: bool) -> None:
    """Refuse what is valid by itself and makes no sense together.

    Args:
        stages: look at every stage with its own keys, too.

    Raises:
        ValueError: says what contradicts what, and what to do.
    """
    if cfg.recipe == "evaluate_reward" and cfg.reward_model.path is None:
        raise ValueError("recipe evaluate_reward needs a reward model: give its folder, reward_model.path")
    if cfg.initial_model is None and not cfg.model.architecture:
        raise ValueError("model.path and model.architecture are both empty: give a model, or say what to build")
    if cfg.model.path is not None and cfg.model.architecture:
        raise ValueError("model.path and model.architecture are both given: which one is it?")
    if cfg.model.path is None and cfg.recipe in ("distill", "ppo", "dpo", "evaluate"):
        raise ValueError(f"recipe {cfg.recipe} needs a trained policy: give model.path (or use recipe: pipeline)")
    evaluates = cfg.recipe in ("evaluate", "evaluate_reward")
    if cfg.data.format != "world" and cfg.data.train is None and not (evaluates and cfg.data.test):
        missing = "neither data.test nor data.train is given" if evaluates else "data.train is not given"
        raise ValueError(f"data.format is {cfg.data.format}, but {missing}")
    if stages:
        check_stages(cfg)
    check_devices(cfg)


def check_stages(cfg: Config) -> None:
    """What must hold between stages, and in each of them."""
    stages, recipes = cfg.stages, cfg.recipes
    names = [stage.name for stage in stages]
    if not stages:
        raise ValueError("pipeline.stages is empty: give at least one stage")
    uses_trained = False
    for stage in stages:
        own = cfg.of(stage)
        check_stage(own, stage)
        judged_by = [metric.model for metric in own.evaluation.metrics]
        uses_trained |= own.trains_reward or bool({"trained", *names} & set(judged_by))
        if cfg.recipe == "pipeline" and stage.recipe == "ppo" and own.trains_reward and stage.reward is None:
            raise ValueError(
                f"pipeline.stages={names}: {stage.name} needs the reward model that reward.components asks for "
                "(`model: trained`); put reward_model before it, or give its folder"
            )
    if "reward_model" in recipes and "ppo" in recipes and not uses_trained:
        raise ValueError(
            f"pipeline.stages={names} trains a reward model that nobody uses: no component of "
            "reward.components, and none of evaluation.metrics, is `model: trained`"
        )


def check_stage(cfg: Config, stage: Stage) -> None:
    """What must hold in one stage, whose own keys are set."""
    match stage.recipe:
        case "compare":
            if cfg.compare.by is None:
                raise ValueError(f"compare.by must say who compares what {stage.name} samples")
        case "distill":
            d = cfg.distill
            if not (d.context or d.context_file or d.teacher or d.from_scratch):
                raise ValueError(
                    "distill: teacher and student are the same model and read the same text, so there is nothing "
                    "to learn; give distill.context or context_file, distill.teacher or distill.from_scratch=true"
                )
        case "reward_model" | "dpo":
            check_comparisons(cfg, stage)
        case "evaluate_reward":
            if cfg.data.format not in COMPARISON_FORMATS:
                raise ValueError(
                    f"evaluate_reward judges by comparisons, and data.format={cfg.data.format} has none; formats "
                    f"that do: {', '.join(COMPARISON_FORMATS)}"
                )
        case "ppo":
            check_ppo(cfg)
            check_metrics(cfg, stage)
            check_early_stop(cfg)


def check_comparisons(cfg: Config, stage: Stage) -> None:
    rm, found = cfg.reward_model, cfg.data.format
    if found not in COMPARISON_FORMATS and not stage.comparisons:
        raise ValueError(
            f"{stage.recipe} learns from comparisons, and data.format={found} has none; formats that do: "
            f"{', '.join(COMPARISON_FORMATS)}"
        )
    if stage.recipe == "reward_model" and rm.loss == "kwise" and found not in RANKING_FORMATS:
        raise ValueError(
            f"reward_model.loss=kwise needs rankings, and data.format={found} has none; formats that do: "
            f"{', '.join(RANKING_FORMATS)}"
        )
    if rm.binarize and stage.comparisons:
        raise ValueError(f"reward_model.binarize is for the data; {stage.name} also learns {stage.comparisons}")
    if stage.recipe == "dpo" and (rm.ties, rm.labels, rm.binarize) != ("drop", "majority", False):
        raise ValueError(
            f"reward_model.ties={rm.ties}, labels={rm.labels}, binarize={str(rm.binarize).lower()}: dpo reads the "
            "same pairs and needs the better side of each; use drop, majority and false"
        )


def check_metrics(cfg: Config, stage: Stage) -> None:
    for metric in cfg.evaluation.metrics:
        if metric.model == "trained" and stage.reward is None:
            raise ValueError(
                f"evaluation.metrics: {metric.name} is `model: trained`, the reward model that a pipeline trains "
                f"before {stage.name}, and there is none; give its folder"
            )
        if metric.name in [c.name for c in cfg.reward.components] and len(cfg.reward.components) > 1:
            raise ValueError(
                f"evaluation.metrics and reward.components both have the name {metric.name}; give one another"
            )


def check_early_stop(cfg: Config) -> None:
    metric, known = cfg.train.early_stop.metric, ["reward", *(m.name for m in cfg.evaluation.metrics)]
    if metric is None:
        return
    if metric not in known:
        raise ValueError(
            f"train.early_stop.metric={metric} is no figure of the evaluation; expected one of {', '.join(known)}, "
            "or add it to evaluation.metrics"
        )
    if not 0 < cfg.run.eval_every < cfg.train.steps:
        raise ValueError(
            f"train.early_stop.metric={metric} is read every run.eval_every={cfg.run.eval_every} steps of "
            f"train.steps={cfg.train.steps}; set run.eval_every to 1 or more, and less than the steps"
        )
    if not cfg.run.checkpoint_every:
        raise ValueError(
            f"train.early_stop.metric={metric} goes back to the checkpoint of the best evaluation, but "
            "run.checkpoint_every=0 saves none; set it to 1 or more"
        )


def check_ppo(cfg: Config) -> None:
    if cfg.samples_per_step % cfg.train.batch_size:
        raise ValueError(
            f"train.batch_size={cfg.train.batch_size} does not divide the {cfg.samples_per_step} samples of a "
            f"step (rollout.batch_size={cfg.rollout.batch_size} * rollout.n_samples_per_prompt="
            f"{cfg.rollout.n_samples_per_prompt})"
        )
    estimator, n = cfg.algo.advantage_estimator, cfg.rollout.n_samples_per_prompt
    if estimator in GROUP_ESTIMATORS and n < 2:
        raise ValueError(
            f"algo.advantage_estimator={estimator} compares samples of one prompt, but "
            f"rollout.n_samples_per_prompt={n}; use 2 or more"
        )
    if cfg.rollout.dynamic_sampling and n < 2:
        raise ValueError(
            f"rollout.dynamic_sampling=true looks for groups whose scores differ, but "
            f"rollout.n_samples_per_prompt={n}; use 2 or more"
        )
    if cfg.algo.policy_loss == "a2c" and cfg.updates_per_step > 1:
        raise ValueError(
            f"algo.policy_loss=a2c has no ratio, so only one update of each batch is right, but train.epochs="
            f"{cfg.train.epochs} and train.batch_size={cfg.train.batch_size} make {cfg.updates_per_step}; "
            f"use train.batch_size={cfg.samples_per_step} and train.epochs=1, or policy_loss=ppo"
        )
    cache = cfg.reward.soft_overlong_cache
    if cache is not None and cache > cfg.rollout.max_response_length:
        raise ValueError(
            f"reward.soft_overlong_cache={cache} is more than rollout.max_response_length="
            f"{cfg.rollout.max_response_length}"
        )
    if cfg.critic.warmup_steps and not cfg.uses_critic:
        raise ValueError(
            f"critic.warmup_steps={cfg.critic.warmup_steps}, but algo.advantage_estimator={estimator} has no critic"
        )
    if cfg.critic.warmup_steps >= cfg.train.steps:
        raise ValueError(
            f"critic.warmup_steps={cfg.critic.warmup_steps} leaves the policy none of train.steps={cfg.train.steps}"
        )
    if cfg.algo.use_kl_loss and cfg.algo.kl_coef == 0:
        raise ValueError("algo.use_kl_loss=true with algo.kl_coef=0 has no effect")
    if cfg.recipe == "ppo" and cfg.trains_reward:
        raise ValueError(
            "reward.components: `model: trained` is the reward model of a pipeline; recipe ppo trains none. "
            "Give its folder"
        )


def check_devices(cfg: Config) -> None:
    if 0 < cfg.generator.gpus < cfg.generator.tensor_parallel_size and cfg.generator.tensor_parallel_size > 1:
        raise ValueError(
            f"generator.gpus={cfg.generator.gpus} is less than "
            f"generator.tensor_parallel_size={cfg.generator.tensor_parallel_size}"
        )
    if cfg.weight_sync.transport != "object_store" and not (cfg.policy.learner.gpus and cfg.generator.gpus):
        raise ValueError(
            f"weight_sync.transport={cfg.weight_sync.transport} needs GPUs in policy.learner and generator; "
            "on CPUs use object_store"
        )
    lora, transport = cfg.model.lora, cfg.weight_sync.transport
    if lora.rank and lora.serve == "adapters" and transport != "object_store":
        raise ValueError(
            f"model.lora.serve=adapters needs weight_sync.transport=object_store: {transport} sends whole weights, "
            "with the adapters merged in"
        )
    packed = [name for name in ("train", "sft", "distill", "reward_model", "dpo") if getattr(cfg, name).packing]
    if packed and cfg.model.attention != "flash_attention_2":
        raise ValueError(
            f"{packed[0]}.packing=true needs model.attention=flash_attention_2, got {cfg.model.attention}; "
            "without it packed samples cost the square of their sum"
        )
