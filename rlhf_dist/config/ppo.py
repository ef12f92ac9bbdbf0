"""The loop of PPO and its kin: what is sampled, what is learned from it, by whom."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_dist.config.base import Fraction, NonNegative, Section, is_function
from rlhf_dist.config.processes import LearnerConfig, OptimConfig

#: Estimators that compare the samples of one prompt.
GROUP_ESTIMATORS = ("rloo", "grpo", "dr_grpo", "reinforce_plus_plus_baseline")
ADVANTAGE_ESTIMATORS = ("gae", "reinforce", "reinforce_plus_plus", "remax", *GROUP_ESTIMATORS)
POLICY_LOSSES = ("ppo", "a2c", "gspo", "cispo", "decoupled_ppo")
#: Bounds of the ratio π_old / μ that each correction takes by default.
CORRECTION_BOUNDS = {"tis": (0.0, 2.0), "icepop": (0.5, 5.0), "sequence_mask": (0.5, 2.0)}


class RolloutConfig(Section):
    """What is sampled in each PPO step."""

    batch_size: PositiveInt = 64
    """Prompts per step."""
    n_samples_per_prompt: PositiveInt = 1
    """Responses per prompt (the size of a group)."""
    max_prompt_length: PositiveInt = 512
    """Longer prompts are left out and counted."""
    max_response_length: PositiveInt = 512
    """Tokens after which a response is truncated."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the learner applies it too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1 it biases the ratio to the policy: needs ``allow_biased_sampling``."""
    top_k: int = Field(0, ge=0)
    """Top-k sampling, 0 is off. The same holds as for ``top_p``."""
    allow_biased_sampling: bool = False
    """Accept top_p < 1 or top_k > 0 in training."""
    stop: list[str] = []
    """Strings that end a response, besides the end-of-text token."""
    max_staleness: int = Field(0, ge=0)
    """Policy versions by which a trained token may be older than the policy; 0 is exactly on-policy."""
    in_flight_updates: Literal["drain", "keep", "recompute"] = "keep"
    """New weights while responses are under way (with staleness). drain: finish them first. keep: go on with the old
    cache under the new weights. recompute: go on with a cache that the new weights compute again."""
    chunk_tokens: PositiveInt = 2000
    """Finished groups are sent on in chunks of at least so many tokens."""
    chunk_seconds: PositiveFloat = 0.1
    """With staleness: a finished group waits no longer than this for others to fill its chunk."""
    dynamic_sampling: bool = False
    """Replace groups whose scores are all equal by new prompts, which teach something (DAPO)."""
    dynamic_sampling_rounds: PositiveInt = 8
    """Times that a step asks for replacements; then it trains with the groups that it has."""

    @property
    def drains(self) -> bool:
        """Whether nothing is under way when weights arrive; without staleness a step ends with its last response."""
        return self.max_staleness == 0 or self.in_flight_updates == "drain"

    @model_validator(mode="after")
    def _unbiased(self) -> RolloutConfig:
        if (self.top_p < 1 or self.top_k > 0) and not self.allow_biased_sampling:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k} sample from another distribution than the learner "
                "computes, which biases the ratio; set rollout.allow_biased_sampling=true to accept that"
            )
        return self


class AlgoConfig(Section):
    """The algorithm: advantages, policy loss, KL. docs/algorithms.md has the formulas."""

    advantage_estimator: str = "gae"
    """gae (needs the critic), reinforce, reinforce_plus_plus, remax; those that compare the samples of a prompt: rloo,
    grpo, dr_grpo, reinforce_plus_plus_baseline; or ``package.module:function`` of your own."""
    gamma: Fraction = 1.0
    """Discount."""
    gae_lambda: Fraction = 0.95
    """GAE's lambda."""
    whiten_advantages: bool | None = None
    """Mean 0 and variance 1 over all trained tokens of the batch. Default: with gae. REINFORCE++ always does."""
    policy_loss: str = "ppo"
    """ppo, a2c, gspo, cispo, decoupled_ppo; or ``package.module:function`` of your own."""
    eps_clip: PositiveFloat = 0.2
    """PPO clips the ratio below 1 - eps_clip."""
    eps_clip_high: PositiveFloat | None = None
    """and above 1 + eps_clip_high; ``eps_clip`` if not given."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the loss for negative advantages (ppo, decoupled_ppo); off if not given."""
    old_logprobs: Literal["learner", "sampler"] = "learner"
    """Where the loss's π_old comes from: the learner before each update, or what the generators reported while
    sampling, whose rounding and age are then taken for the policy's. The learner needs a forward pass of its own for it
    where the KL is in the reward or a step has several optimizer steps; else the update's own pass is that of π_old."""
    rollout_correction: Literal["auto", "none", "tis", "icepop", "sequence_mask"] = "auto"
    """Weight for the gap between the sampler and the learner. auto: tis where the two can differ (bfloat16, staleness,
    nucleus or top-k sampling) and the loss does not correct for it by itself."""
    correction_bounds: tuple[NonNegative, PositiveFloat] | None = None
    """Lowest and highest ratio; default [0, 2] for tis, [0.5, 5] for icepop, [0.5, 2] for sequence_mask."""
    value_clip: PositiveFloat | None = 0.2
    """Clip of the new value around the old one; off if empty."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: NonNegative = 0.0
    """PPO-ptx: weight of the cross entropy on ``data.pretrain`` in each update of the policy; 0 is off."""
    ptx_batch_size: PositiveInt | None = None
    """Pretraining texts per optimizer step; ``train.batch_size`` if not given."""
    mask_truncated: bool = False
    """Do not train on responses that were cut off (DAPO's overlong filtering)."""
    loss_aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Mean over trained tokens of the global batch, over sequences, or sum over a constant length (Dr.GRPO)."""
    kl_coef: NonNegative = 0.05
    """Weight of the KL to the reference; 0 with use_kl_loss=false starts no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL per token."""
    use_kl_loss: bool = False
    """KL as a term of the loss instead of the reward."""
    kl_target: PositiveFloat | None = None
    """Adaptive KL control: the coefficient moves until the KL per sample is at this target (InstructGPT)."""
    kl_horizon: PositiveFloat = 10000
    """Samples over which the adaptive coefficient moves."""

    @property
    def whitens(self) -> bool:
        return self.advantage_estimator == "gae" if self.whiten_advantages is None else self.whiten_advantages

    @model_validator(mode="after")
    def _names(self) -> AlgoConfig:
        for key, known in (("advantage_estimator", ADVANTAGE_ESTIMATORS), ("policy_loss", POLICY_LOSSES)):
            name = getattr(self, key)
            if name not in known and not is_function(name):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"{key}={name}: {hint}expected one of {', '.join(known)}, or package.module:function")
        return self

    @model_validator(mode="after")
    def _kl(self) -> AlgoConfig:
        if self.use_kl_loss and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator=k1 in the loss has an expected gradient of zero; use k2 or k3, or use_kl_loss=false"
            )
        if self.use_kl_loss and self.kl_target is not None:
            raise ValueError("kl_target adapts the KL in the reward; it has no effect with use_kl_loss=true")
        return self

    @model_validator(mode="after")
    def _combinations(self) -> AlgoConfig:
        if self.whiten_advantages is False and self.advantage_estimator.startswith("reinforce_plus_plus"):
            raise ValueError(
                f"whiten_advantages=false, but advantage_estimator={self.advantage_estimator} is REINFORCE with "
                "whitening; use reinforce"
            )
        if self.policy_loss == "decoupled_ppo" and self.rollout_correction not in ("auto", "none"):
            raise ValueError(
                f"rollout_correction={self.rollout_correction} with policy_loss=decoupled_ppo weights twice by "
                "π_old / μ; use one of the two"
            )
        if self.old_logprobs == "sampler" and (
            self.policy_loss == "decoupled_ppo" or self.rollout_correction not in ("auto", "none")
        ):
            raise ValueError(
                "old_logprobs=sampler leaves no gap between π_old and the sampler to correct for, but policy_loss="
                f"{self.policy_loss} and rollout_correction={self.rollout_correction} correct for it; use learner"
            )
        if self.dual_clip is not None and self.policy_loss not in ("ppo", "decoupled_ppo"):
            raise ValueError(f"dual_clip bounds PPO's loss; policy_loss={self.policy_loss} does not know it")
        if self.loss_aggregation == "token_mean" and self.policy_loss == "gspo":
            raise ValueError(
                "policy_loss=gspo weighs sequences, loss_aggregation=token_mean weighs long ones more; "
                "use loss_aggregation=sequence_mean"
            )
        self._check_bounds()
        return self

    def _check_bounds(self) -> None:
        if self.correction_bounds is None:
            return
        low, high = self.correction_bounds
        if self.rollout_correction in ("auto", "none"):
            raise ValueError(
                f"correction_bounds={[low, high]} needs rollout_correction tis, icepop or sequence_mask, "
                f"got {self.rollout_correction}"
            )
        if low >= high:
            raise ValueError(f"correction_bounds={[low, high]}: the first must be below the second")
        if self.rollout_correction == "tis" and low > 0:
            raise ValueError(f"correction_bounds={[low, high]}: tis cuts large ratios only, the first must be 0")


class EarlyStopConfig(Section):
    """PPO ends when a figure of the evaluation no longer rises; the policy of the best evaluation is the result."""

    metric: str | None = None
    """``reward``, or the name of one of ``evaluation.metrics``, such as a reward model that the policy does not learn
    from; off if not given."""
    patience: PositiveInt = 3
    """Evaluations in a row (``run.eval_every``) that are not above the best one before PPO ends. The evaluation before
    the first step does not count."""


class TrainConfig(Section):
    """PPO's updates; policy and critic share them."""

    steps: PositiveInt = 100
    """PPO steps: batches of rollouts."""
    epochs: PositiveInt = 1
    """Passes over each batch of rollouts."""
    batch_size: PositiveInt = 64
    """Samples per optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward of one rank."""
    packing: bool = False
    """Pack samples without padding (needs attention: flash_attention_2 on GPUs); else length buckets."""
    early_stop: EarlyStopConfig = Field(default_factory=EarlyStopConfig)
    """When PPO ends before ``steps``."""


class PolicyConfig(Section):
    """The policy learner of PPO."""

    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Placement and ZeRO."""
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-6))
    """Optimizer."""


class CriticConfig(Section):
    """The critic learner; advantage_estimator gae has one."""

    path: str | None = None
    """Model that the critic starts from; default: the reward model, where there is one, else the policy."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Placement and ZeRO."""
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-5))
    """Optimizer."""
    warmup_steps: int = Field(0, ge=0)
    """PPO steps in which only the critic learns."""
