"""The typed config tree: every key, its meaning, its default.

One YAML file (``--config``) and ``key.path=value`` overrides are merged and
validated here, before anything heavy is imported. :mod:`rlhf_dist.config_io`
reads and merges; this package only says what is valid: each section in its
file, what must hold between sections here.

Batch sizes, once and for all:

* ``rollout.batch_size``             prompts per PPO step
* ``rollout.n_samples_per_prompt``   responses per prompt; a PPO step trains on
  ``rollout.batch_size * rollout.n_samples_per_prompt`` samples
* ``train.batch_size``               samples per optimizer step, over all ranks
  (must divide the samples of a PPO step); in ``sft`` and ``reward_model`` the
  same: demonstrations or pairs per optimizer step
* ``micro_batch_tokens``             tokens (with padding) per forward and
  backward of one rank. It changes memory and speed, never the result.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from rlhf_dist.config.base import Section
from rlhf_dist.config.data import (
    COMPARISON_FORMATS,
    RANKING_FORMATS,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    WorldConfig,
)
from rlhf_dist.config.pipeline import PipelineConfig, Recipe, Stage, StageConfig, resolve
from rlhf_dist.config.ppo import (
    ADVANTAGE_ESTIMATORS,
    CORRECTION_BOUNDS,
    GROUP_ESTIMATORS,
    POLICY_LOSSES,
    AlgoConfig,
    CriticConfig,
    EarlyStopConfig,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
)
from rlhf_dist.config.processes import (
    ClusterConfig,
    GeneratorConfig,
    LearnerConfig,
    OptimConfig,
    ReplicaConfig,
    RunConfig,
    WeightSyncConfig,
)
from rlhf_dist.config.reward import RewardComponent, RewardConfig
from rlhf_dist.config.stages import (
    CompareConfig,
    DistillConfig,
    DPOConfig,
    EvalMetric,
    EvaluationConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedConfig,
)

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "COMPARISON_FORMATS",
    "CORRECTION_BOUNDS",
    "GROUP_ESTIMATORS",
    "POLICY_LOSSES",
    "RANKING_FORMATS",
    "AlgoConfig",
    "ClusterConfig",
    "CompareConfig",
    "Config",
    "CriticConfig",
    "DPOConfig",
    "DataConfig",
    "DistillConfig",
    "EarlyStopConfig",
    "EvalMetric",
    "EvaluationConfig",
    "GeneratorConfig",
    "LearnerConfig",
    "LoRAConfig",
    "ModelConfig",
    "OptimConfig",
    "PipelineConfig",
    "PolicyConfig",
    "ReplicaConfig",
    "RewardComponent",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "Section",
    "Stage",
    "StageConfig",
    "SupervisedConfig",
    "TrainConfig",
    "WeightSyncConfig",
    "WorldConfig",
]


class Config(Section):
    """A whole run."""

    recipe: Literal[
        "sft", "distill", "compare", "reward_model", "ppo", "dpo", "pipeline", "evaluate", "evaluate_reward"
    ] = "pipeline"
    """One stage, or pipeline, which runs several in order; evaluate samples and scores ``model.path``; evaluate_reward
    judges the reward model in ``reward_model.path`` on held-out comparisons."""
    description: str = ""
    """One line for the reader; printed by --dry-run."""
    seed: int = 0
    """Seed of everything that is random."""
    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    reward_model: RewardModelConfig = Field(default_factory=RewardModelConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    dpo: DPOConfig = Field(default_factory=DPOConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algo: AlgoConfig = Field(default_factory=AlgoConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    reference: ReplicaConfig = Field(default_factory=ReplicaConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    weight_sync: WeightSyncConfig = Field(default_factory=WeightSyncConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the run makes, in order."""
        p = self.pipeline
        if self.recipe != "pipeline":
            return resolve([StageConfig(recipe=self.recipe)])
        if p.stages is not None:
            return resolve(p.stages, p.round, p.rounds)
        names: list[Recipe] = ["sft"]
        if self.trains_reward:
            names += ["compare", "reward_model"] if self.compare.by else ["reward_model"]
        return resolve([StageConfig(recipe=name) for name in (*names, "ppo")], p.round, p.rounds)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Those of the stages, in order."""
        return tuple(stage.recipe for stage in self.stages)

    def of(self, stage: Stage) -> Config:
        """The config as it is in a stage, whose own keys are set.

        Raises:
            ValueError: they make no valid config; names the stage.
        """
        if not stage.set:
            return self
        tree = self.model_dump(mode="json")
        for one in [*(tree["pipeline"]["stages"] or []), *tree["pipeline"]["round"]]:
            if isinstance(one, dict):
                one.pop("set", None)
        for key, value in stage.set.items():
            *path, last = key.split(".")
            node: Any = tree
            for part in path:
                node = node.get(part) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                raise ValueError(f"pipeline.stages: stage {stage.name} sets {key}, and there is no such key")
            node[last] = value
        try:
            return Config.model_validate(tree, context={"stage": stage.name})
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
            raise ValueError(f"pipeline.stages: what stage {stage.name} sets is not valid: {faults}") from None

    @property
    def initial_model(self) -> str | None:
        """The model that the run begins with, and whose tokenizer it uses if no other is given; None: it builds one."""
        return self.reward_model.path if self.recipe == "evaluate_reward" else self.model.path

    @property
    def trains_reward(self) -> bool:
        """Whether a component of the reward is the pipeline's own reward model."""
        return any(c.model == "trained" for c in self.reward.components)

    @property
    def runs_ppo(self) -> bool:
        return "ppo" in self.recipes

    @property
    def uses_critic(self) -> bool:
        return self.algo.advantage_estimator == "gae"

    @property
    def uses_greedy(self) -> bool:
        """A greedy response to each prompt is sampled too: ReMax's baseline."""
        return self.algo.advantage_estimator == "remax"

    @property
    def resolved_algo(self) -> AlgoConfig:
        """``algo`` with ``rollout_correction: auto`` resolved."""
        algo, sampled = self.algo, self.rollout
        if algo.rollout_correction != "auto":
            return algo
        rounded = "bfloat16" in (self.model.dtype, self.weight_sync.wire_dtype)
        differs = rounded or sampled.max_staleness > 0 or sampled.top_p < 1 or sampled.top_k > 0
        by_itself = algo.policy_loss == "decoupled_ppo" or algo.old_logprobs == "sampler"
        correction = "tis" if differs and not by_itself else "none"
        return algo.model_copy(update={"rollout_correction": correction})

    @property
    def uses_reference(self) -> bool:
        """The KL needs a reference; evaluation reports the KL whenever there is one."""
        return self.algo.kl_coef > 0

    @property
    def samples_per_step(self) -> int:
        return self.rollout.batch_size * self.rollout.n_samples_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in each PPO step."""
        return self.train.epochs * (self.samples_per_step // self.train.batch_size)

    @model_validator(mode="after")
    def _contradictions(self, info: ValidationInfo) -> Config:
        if self.recipe == "evaluate_reward" and self.reward_model.path is None:
            raise ValueError("recipe evaluate_reward needs a reward model: give its folder, reward_model.path")
        if self.initial_model is None and not self.model.architecture:
            raise ValueError("model.path and model.architecture are both empty: give a model, or say what to build")
        if self.model.path is not None and self.model.architecture:
            raise ValueError("model.path and model.architecture are both given: which one is it?")
        if self.model.path is None and self.recipe in ("distill", "ppo", "dpo", "evaluate"):
            raise ValueError(f"recipe {self.recipe} needs a trained policy: give model.path (or use recipe: pipeline)")
        evaluates = self.recipe in ("evaluate", "evaluate_reward")
        if self.data.format != "world" and self.data.train is None and not (evaluates and self.data.test):
            missing = "neither data.test nor data.train is given" if evaluates else "data.train is not given"
            raise ValueError(f"data.format is {self.data.format}, but {missing}")
        if not info.context:  # else this is the config of one stage
            self._check_stages()
        self._check_devices()
        return self

    def _check_stages(self) -> None:
        """What must hold between stages, and in each of them."""
        stages, recipes = self.stages, self.recipes
        names = [stage.name for stage in stages]
        if not stages:
            raise ValueError("pipeline.stages is empty: give at least one stage")
        uses_trained = False
        for stage in stages:
            own = self.of(stage)
            own._check_stage(stage)
            judged_by = [metric.model for metric in own.evaluation.metrics]
            uses_trained |= own.trains_reward or bool({"trained", *names} & set(judged_by))
            if self.recipe == "pipeline" and stage.recipe == "ppo" and own.trains_reward and stage.reward is None:
                raise ValueError(
                    f"pipeline.stages={names}: {stage.name} needs the reward model that reward.components asks for "
                    "(`model: trained`); put reward_model before it, or give its folder"
                )
        if "reward_model" in recipes and "ppo" in recipes and not uses_trained:
            raise ValueError(
                f"pipeline.stages={names} trains a reward model that nobody uses: no component of "
                "reward.components, and none of evaluation.metrics, is `model: trained`"
            )

    def _check_stage(self, stage: Stage) -> None:
        """What must hold in one stage, whose own keys are set."""
        match stage.recipe:
            case "compare":
                if self.compare.by is None:
                    raise ValueError(f"compare.by must say who compares what {stage.name} samples")
            case "distill":
                d = self.distill
                if not (d.context or d.context_file or d.teacher or d.from_scratch):
                    raise ValueError(
                        "distill: teacher and student are the same model and read the same text, so there is nothing "
                        "to learn; give distill.context or context_file, distill.teacher or distill.from_scratch=true"
                    )
            case "reward_model" | "dpo":
                self._check_comparisons(stage)
            case "evaluate_reward":
                if self.data.format not in COMPARISON_FORMATS:
                    raise ValueError(
                        f"evaluate_reward judges by comparisons, and data.format={self.data.format} has none; formats "
                        f"that do: {', '.join(COMPARISON_FORMATS)}"
                    )
            case "ppo":
                self._check_ppo()
                self._check_metrics(stage)
                self._check_early_stop()

    def _check_comparisons(self, stage: Stage) -> None:
        rm, found = self.reward_model, self.data.format
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

    def _check_metrics(self, stage: Stage) -> None:
        for metric in self.evaluation.metrics:
            if metric.model == "trained" and stage.reward is None:
                raise ValueError(
                    f"evaluation.metrics: {metric.name} is `model: trained`, the reward model that a pipeline trains "
                    f"before {stage.name}, and there is none; give its folder"
                )
            if metric.name in [c.name for c in self.reward.components] and len(self.reward.components) > 1:
                raise ValueError(
                    f"evaluation.metrics and reward.components both have the name {metric.name}; give one another"
                )

    def _check_early_stop(self) -> None:
        metric, known = self.train.early_stop.metric, ["reward", *(m.name for m in self.evaluation.metrics)]
        if metric is None:
            return
        if metric not in known:
            raise ValueError(
                f"train.early_stop.metric={metric} is no figure of the evaluation; expected one of {', '.join(known)}, "
                "or add it to evaluation.metrics"
            )
        if not 0 < self.run.eval_every < self.train.steps:
            raise ValueError(
                f"train.early_stop.metric={metric} is read every run.eval_every={self.run.eval_every} steps of "
                f"train.steps={self.train.steps}; set run.eval_every to 1 or more, and less than the steps"
            )
        if not self.run.checkpoint_every:
            raise ValueError(
                f"train.early_stop.metric={metric} goes back to the checkpoint of the best evaluation, but "
                "run.checkpoint_every=0 saves none; set it to 1 or more"
            )

    def _check_ppo(self) -> None:
        if self.samples_per_step % self.train.batch_size:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} does not divide the {self.samples_per_step} samples of a "
                f"step (rollout.batch_size={self.rollout.batch_size} * rollout.n_samples_per_prompt="
                f"{self.rollout.n_samples_per_prompt})"
            )
        estimator, n = self.algo.advantage_estimator, self.rollout.n_samples_per_prompt
        if estimator in GROUP_ESTIMATORS and n < 2:
            raise ValueError(
                f"algo.advantage_estimator={estimator} compares samples of one prompt, but "
                f"rollout.n_samples_per_prompt={n}; use 2 or more"
            )
        if self.rollout.dynamic_sampling and n < 2:
            raise ValueError(
                f"rollout.dynamic_sampling=true looks for groups whose scores differ, but "
                f"rollout.n_samples_per_prompt={n}; use 2 or more"
            )
        if self.algo.policy_loss == "a2c" and self.updates_per_step > 1:
            raise ValueError(
                f"algo.policy_loss=a2c has no ratio, so only one update of each batch is right, but train.epochs="
                f"{self.train.epochs} and train.batch_size={self.train.batch_size} make {self.updates_per_step}; "
                f"use train.batch_size={self.samples_per_step} and train.epochs=1, or policy_loss=ppo"
            )
        cache = self.reward.soft_overlong_cache
        if cache is not None and cache > self.rollout.max_response_length:
            raise ValueError(
                f"reward.soft_overlong_cache={cache} is more than rollout.max_response_length="
                f"{self.rollout.max_response_length}"
            )
        if self.critic.warmup_steps and not self.uses_critic:
            raise ValueError(
                f"critic.warmup_steps={self.critic.warmup_steps}, but algo.advantage_estimator={estimator} "
                "has no critic"
            )
        if self.critic.warmup_steps >= self.train.steps:
            raise ValueError(
                f"critic.warmup_steps={self.critic.warmup_steps} leaves the policy none of "
                f"train.steps={self.train.steps}"
            )
        if self.algo.use_kl_loss and self.algo.kl_coef == 0:
            raise ValueError("algo.use_kl_loss=true with algo.kl_coef=0 has no effect")
        if self.recipe == "ppo" and self.trains_reward:
            raise ValueError(
                "reward.components: `model: trained` is the reward model of a pipeline; recipe ppo trains none. "
                "Give its folder"
            )

    def _check_devices(self) -> None:
        if 0 < self.generator.gpus < self.generator.tensor_parallel_size and self.generator.tensor_parallel_size > 1:
            raise ValueError(
                f"generator.gpus={self.generator.gpus} is less than "
                f"generator.tensor_parallel_size={self.generator.tensor_parallel_size}"
            )
        if self.weight_sync.transport != "object_store" and not (self.policy.learner.gpus and self.generator.gpus):
            raise ValueError(
                f"weight_sync.transport={self.weight_sync.transport} needs GPUs in policy.learner and generator; "
                "on CPUs use object_store"
            )
        lora, transport = self.model.lora, self.weight_sync.transport
        if lora.rank and lora.serve == "adapters" and transport != "object_store":
            raise ValueError(
                f"model.lora.serve=adapters needs weight_sync.transport=object_store: {transport} sends whole weights, "
                "with the adapters merged in"
            )
        packed = [name for name in ("train", "sft", "distill", "reward_model", "dpo") if getattr(self, name).packing]
        if packed and self.model.attention != "flash_attention_2":
            raise ValueError(
                f"{packed[0]}.packing=true needs model.attention=flash_attention_2, got {self.model.attention}; "
                "without it packed samples cost the square of their sum"
            )
