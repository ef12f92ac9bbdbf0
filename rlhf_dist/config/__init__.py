"""The typed config tree: every key, its meaning, its default.

One YAML file (``--config``) and ``key.path=value`` overrides are merged and
validated here, before anything heavy is imported. :mod:`rlhf_dist.config_io`
reads and merges; this package only says what is valid: each section in its
file, what must hold between sections in :mod:`rlhf_dist.config.checks`.

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
from rlhf_dist.config.checks import check
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
    def recomputes_logprobs(self) -> bool:
        """Whether π_old takes a forward pass of the learner before the update.

        Not where the generators' figures stand for it, nor where the only optimizer step sees the policy as it was
        before: then its own pass has them, unless the KL in the reward needs them earlier.
        """
        kl_in_reward = self.uses_reference and not self.algo.use_kl_loss
        return self.algo.old_logprobs == "learner" and (kl_in_reward or self.updates_per_step > 1)

    @property
    def samples_per_step(self) -> int:
        return self.rollout.batch_size * self.rollout.n_samples_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in each PPO step."""
        return self.train.epochs * (self.samples_per_step // self.train.batch_size)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Config:
        check(self, stages=not info.context)  # with a context, this is the config of one stage
        return self
