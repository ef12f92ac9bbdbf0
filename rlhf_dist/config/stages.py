"""The stages beside PPO: SFT, distillation, comparisons, reward model, DPO, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_dist.config.base import Fraction, NonNegative, Section, is_function
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
    ties: Literal["drop", "learn"] = "drop"
    """Pairs of which neither response is better. drop: they are no pairs, and a prompt without any other is left out.
    learn: the loss pulls their scores together."""
    labels: Literal["majority", "share"] = "majority"
    """Where annotators disagree. majority: the response that more of them prefer is better. share: the loss aims at the
    share of them that prefers it."""
    binarize: bool = False
    """For weak preferences, before a second training on people's: each pair A > B becomes `GOOD: A` > `BAD: A` and
    `BAD: B` > `GOOD: B`, of which less has to be unlearned (2112.00861). Needs loss=pairwise."""
    label_noise: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the training comparisons whose label is flipped, to see what wrong labels cost. 0.5 is a control: labels
    then mean nothing, and must not improve anything."""
    center: bool = True
    """Take the mean score of preferred training responses off all scores of the result (InstructGPT, 2203.02155)."""

    @model_validator(mode="after")
    def _noise(self) -> RewardModelConfig:
        if self.label_noise and self.loss == "kwise":
            raise ValueError(
                f"label_noise={self.label_noise} flips the labels of comparisons, and loss=kwise learns from rankings: "
                "use loss=pairwise"
            )
        return self

    @model_validator(mode="after")
    def _binary(self) -> RewardModelConfig:
        if self.binarize and self.loss == "kwise":
            raise ValueError("binarize=true compares a response with itself under another tag: use loss=pairwise")
        return self


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


class CompareConfig(Section):
    """Comparisons of what the policy samples now."""

    prompts: PositiveInt = 4096
    """Training prompts that are sampled, at most."""
    n_samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Responses to each."""
    pairs: PositiveInt | None = None
    """Pairs that are compared, at most; spread evenly over the prompts. Default: all pairs of each prompt."""
    by: str | None = None
    """Who compares; without it nothing is compared. people: the pairs are written to ``to_compare.jsonl`` in the
    stage's folder, and the run ends until ``compared.jsonl`` lies beside it. Or ``package.module:function``, called as
    a reward function: the higher number is the better response, and equal ones are no pair."""
    label_noise: Fraction = 0.0
    """Share of a function's answers that are turned around."""

    @model_validator(mode="after")
    def _by(self) -> CompareConfig:
        if self.by not in (None, "people") and not is_function(self.by):
            raise ValueError(f"by must be `people` or read package.module:function, got {self.by!r}")
        if self.label_noise and self.by in (None, "people"):
            raise ValueError(f"label_noise={self.label_noise} is for a function in `by`; people make their own")
        return self


class EvalMetric(Section):
    """A figure of held-out samples that nothing is trained on. Exactly one of ``model``, ``function``."""

    name: str = "gold_score"
    """Reported as ``eval/NAME``."""
    model: str | None = None
    """Folder or hub name of a reward model, such as one trained on the other half of the data, or the name of the
    pipeline's stage that trains it; ``trained``: the one that is the reward."""
    function: str | None = None
    """``package.module:function``, called as a reward's."""
    timeout: PositiveFloat = 60
    """Seconds for one call of a function."""

    @model_validator(mode="after")
    def _one_source(self) -> EvalMetric:
        given = [k for k in ("model", "function") if getattr(self, k)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, function; got {given or 'none'}")
        if self.function and not is_function(self.function):
            raise ValueError(f"function must read package.module:function, got {self.function!r}")
        return self


class EvaluationConfig(Section):
    """Evaluation on held-out prompts."""

    prompts: PositiveInt = 256
    """Held-out prompts."""
    n_samples_per_prompt: PositiveInt = 1
    """Samples at the training temperature."""
    best_of_n: list[PositiveInt] | None = None
    """What to expect of the sample that the reward prefers among n, for each of these n. Estimated from all samples
    of a prompt, so none may be larger than their number. Default: that number, where it is above 1."""
    greedy: bool = True
    """Also decode greedily."""
    metrics: list[EvalMetric] = []
    """Figures besides the reward and the KL."""
    cpus: NonNegative = 0
    """CPUs of the process that computes ``metrics``; functions need none of their own, models do."""
    gpus: NonNegative = 0
    """GPUs of that process."""
    group_by: str | None = None
    """Field of the prompt rows by which a table is made (the world's ``family``)."""
    show_samples: int = Field(3, ge=0)
    """Samples printed before and after."""

    @property
    def best_of_sizes(self) -> list[int]:
        """``best_of_n`` with its default."""
        if self.best_of_n is not None:
            return self.best_of_n
        return [self.n_samples_per_prompt] if self.n_samples_per_prompt > 1 else []

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationConfig:
        if max(self.best_of_sizes, default=0) > self.n_samples_per_prompt:
            raise ValueError(
                f"best_of_n={self.best_of_n} needs {max(self.best_of_sizes)} samples of each prompt, but "
                f"n_samples_per_prompt={self.n_samples_per_prompt}; raise it, or leave the larger n out"
            )
        return self

    @model_validator(mode="after")
    def _named(self) -> EvaluationConfig:
        names = [m.name for m in self.metrics]
        if len(set(names)) < len(names) or "reward" in names:
            raise ValueError(
                f"metrics must have different names, and none of them reward, which is the reward's; got {names}"
            )
        return self
