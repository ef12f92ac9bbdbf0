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

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.config.base import Section
from rlhf_dist.config.data import DataConfig, LoRAConfig, ModelConfig, WorldConfig
from rlhf_dist.config.ppo import (
    ADVANTAGE_ESTIMATORS,
    CORRECTION_BOUNDS,
    GROUP_ESTIMATORS,
    POLICY_LOSSES,
    AlgoConfig,
    CriticConfig,
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
    DistillConfig,
    DPOConfig,
    EvalMetric,
    EvaluationConfig,
    PipelineConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedConfig,
)

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "CORRECTION_BOUNDS",
    "GROUP_ESTIMATORS",
    "POLICY_LOSSES",
    "AlgoConfig",
    "ClusterConfig",
    "Config",
    "CriticConfig",
    "DPOConfig",
    "DataConfig",
    "DistillConfig",
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
    "SupervisedConfig",
    "TrainConfig",
    "WeightSyncConfig",
    "WorldConfig",
]


class Config(Section):
    """A whole run."""

    recipe: Literal["sft", "distill", "reward_model", "ppo", "dpo", "pipeline", "evaluate"] = "pipeline"
    """One stage, or pipeline, which runs several in order; evaluate samples and scores ``model.path``."""
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
    def stages(self) -> tuple[str, ...]:
        """What the recipe runs, in order."""
        if self.recipe != "pipeline":
            return (self.recipe,)
        if self.pipeline.stages is not None:
            return tuple(self.pipeline.stages)
        return ("sft", "reward_model", "ppo") if self.trains_reward else ("sft", "ppo")

    @property
    def trains_reward(self) -> bool:
        """Whether a component of the reward is the pipeline's own reward model."""
        return any(c.model == "trained" for c in self.reward.components)

    @property
    def samples_comparisons(self) -> bool:
        """Only the embedded world can label new samples; elsewhere comparisons come from the data."""
        learns = "reward_model" in self.stages or "dpo" in self.stages
        return (
            self.recipe == "pipeline" and learns and self.data.format == "world" and self.data.world.sampled_pairs > 0
        )

    @property
    def runs_ppo(self) -> bool:
        return "ppo" in self.stages

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
    def _contradictions(self) -> Config:
        if self.model.path is None and not self.model.architecture:
            raise ValueError("model.path and model.architecture are both empty: give a model, or say what to build")
        if self.model.path is not None and self.model.architecture:
            raise ValueError("model.path and model.architecture are both given: which one is it?")
        if self.model.path is None and self.recipe in ("distill", "ppo", "dpo", "evaluate"):
            raise ValueError(f"recipe {self.recipe} needs a trained policy: give model.path (or use recipe: pipeline)")
        if self.data.format != "world" and self.data.train is None and self.recipe != "evaluate":
            raise ValueError(f"data.format is {self.data.format}, but data.train is not given")
        self._check_stages()
        if self.runs_ppo:
            self._check_ppo()
        self._check_devices()
        return self

    def _check_stages(self) -> None:
        stages = self.stages
        if not stages or len(set(stages)) < len(stages):
            raise ValueError(f"pipeline.stages={list(stages)}: give at least one stage, and each only once")
        before_ppo = stages[: stages.index("ppo")] if "ppo" in stages else ("reward_model",)
        if self.recipe == "pipeline" and self.trains_reward and "reward_model" not in before_ppo:
            raise ValueError(
                f"pipeline.stages={list(stages)}: ppo needs the reward model that reward.components asks for "
                "(`model: trained`); put reward_model before it, or give its folder"
            )
        if "reward_model" in stages and "ppo" in stages and not self.trains_reward:
            raise ValueError(
                f"pipeline.stages={list(stages)} trains a reward model that nobody uses: no component of "
                "reward.components is `model: trained`"
            )
        if "dpo" in stages and self.data.format not in ("world", "hh", "preferences"):
            raise ValueError(f"dpo learns from comparisons, and data.format={self.data.format} has none")
        d = self.distill
        if "distill" in stages and not (d.context or d.context_file or d.teacher or d.from_scratch):
            raise ValueError(
                "distill: teacher and student are the same model and read the same text, so there is nothing to learn; "
                "give distill.context or context_file, distill.teacher or distill.from_scratch=true"
            )
        if self.reward_model.loss == "kwise" and "reward_model" in stages and self.data.format != "world":
            raise ValueError(f"reward_model.loss=kwise needs rankings, and data.format={self.data.format} has none")

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
        if self.trains_reward and self.data.format not in ("world", "hh", "preferences"):
            raise ValueError(
                f"reward.components: `model: trained` needs comparisons, and data.format={self.data.format} has none; "
                "give a function, a url or the folder of a reward model"
            )
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
