"""The stages beside PPO: SFT, reward model, DPO, evaluation, and the pipeline of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_dist.config.base import Section
from rlhf_dist.config.processes import LearnerConfig, OptimConfig


class SupervisedConfig(Section):
    """What every stage that learns from a fixed data set has."""

    epochs: PositiveFloat = 1
    """Passes over the data; fractions allowed."""
    batch_size: PositiveInt = 32
    """Rows (demonstrations, pairs, rankings) per optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward of one rank."""
    max_length: PositiveInt = 1024
    """Rows whose longest sequence has more tokens are left out and counted."""
    packing: bool = False
    """As ``train.packing``."""
    eval_every: int = Field(0, ge=0)
    """Optimizer steps between evaluations on held-out rows; 0: before the first and after the last step only."""
    eval_rows: PositiveInt = 512
    """Held-out rows of an evaluation: at most so many, drawn once from ``seed``."""
    patience: PositiveInt | None = None
    """Evaluations in a row without a lower held-out loss after which the stage ends; the weights with the lowest loss
    are its result. Default: all of ``epochs``, and the last weights."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Placement and ZeRO."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer."""

    @model_validator(mode="after")
    def _stopping(self) -> SupervisedConfig:
        if self.patience is not None and not self.eval_every:
            raise ValueError(
                f"patience={self.patience} counts evaluations, and eval_every=0 makes none while training goes on; "
                "give eval_every"
            )
        return self


class SFTConfig(SupervisedConfig):
    """Supervised finetuning on demonstrations, loss on responses only."""


class RewardModelConfig(SupervisedConfig):
    """Training of the reward model (Bradley-Terry)."""

    path: str | None = None
    """Model that it starts from; default: the SFT model in a pipeline, else ``model.path``."""
    loss: Literal["pairwise", "kwise"] = "pairwise"
    """pairwise: one comparison, one term. kwise: rankings of K responses to a prompt, all their pairs at one forward
    for each response (InstructGPT); ``batch_size`` then counts rankings."""
    shuffle_labels: bool = False
    """Train on random labels: a control, which must not improve anything."""


class DPOConfig(SupervisedConfig):
    """Direct preference optimisation: the policy learns from comparisons, without a reward model."""

    loss: Literal["dpo", "ipo"] = "dpo"
    """dpo (2305.18290) or ipo (2310.12036)."""
    beta: PositiveFloat = 0.1
    """Weight of the KL that is implied: large stays near the start. IPO aims at a log-ratio of 1 / (2 beta)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels believed to be wrong; above 0 the dpo loss is conservative DPO (cDPO)."""
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=5e-7))
    """Optimizer."""

    @model_validator(mode="after")
    def _smoothing(self) -> DPOConfig:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing={self.label_smoothing} belongs to loss=dpo (it makes cDPO), not to ipo")
        return self


class DistillConfig(SupervisedConfig):
    """Distillation of a teacher's next-token distributions on demonstrations; with a context, context distillation
    (2112.00861)."""

    teacher: str | None = None
    """Folder or hub name; default: the model that the stage starts from."""
    context: str = ""
    """Text that the teacher alone reads before each prompt or text, such as the HHH prompt."""
    context_file: str | None = None
    """File that holds the context; newlines at its end do not count."""
    extra: str | None = None
    """More to learn from than demonstrations: a file of plain text, in place and form as ``data.pretrain``."""
    extra_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the rows that come from ``extra``; the source that has too few rows sets the number of both."""
    from_scratch: bool = False
    """The student is the run's initial model, not the one that the stage starts from."""
    top_k: PositiveInt = 50
    """The teacher's most likely tokens that are kept for each position; all others are one class."""

    @model_validator(mode="after")
    def _one_context(self) -> DistillConfig:
        if self.context and self.context_file is not None:
            raise ValueError(
                f"context and context_file={self.context_file} are both given: which one does the teacher read?"
            )
        return self


class PipelineConfig(Section):
    """The stages of recipe pipeline."""

    stages: list[Literal["sft", "distill", "reward_model", "ppo", "dpo"]] | None = None
    """In order, each from the result of the one before. Default: sft, reward_model where a component of the reward is
    ``model: trained``, ppo."""


class EvalMetric(Section):
    """A figure of held-out samples, computed by a function like a reward's."""

    name: str = "gold_score"
    """Reported as ``eval/NAME``."""
    function: str = "rlhf_dist.data.world:gold_score"
    """``package.module:function``."""
    timeout: PositiveFloat = 60
    """Seconds for one call."""


class EvaluationConfig(Section):
    """Evaluation on held-out prompts."""

    prompts: PositiveInt = 256
    """Held-out prompts."""
    n_samples_per_prompt: PositiveInt = 1
    """Samples at the training temperature; with n > 1 also best-of-n by the reward."""
    greedy: bool = True
    """Also decode greedily."""
    metrics: list[EvalMetric] = []
    """Figures besides the reward and the KL."""
    group_by: str | None = None
    """Field of the prompt rows by which a table is made (the world's ``family``)."""
    show_samples: int = Field(3, ge=0)
    """Samples printed before and after."""
