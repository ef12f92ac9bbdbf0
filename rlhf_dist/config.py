"""The typed config tree: every key, its meaning, its default.

One YAML file (``--config``) and ``key.path=value`` overrides are merged and
validated here, before anything heavy is imported. :mod:`rlhf_dist.config_io`
reads and merges; this file only says what is valid.

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

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

#: Estimators that compare the samples of one prompt.
GROUP_ESTIMATORS = ("rloo", "grpo", "dr_grpo", "reinforce_plus_plus_baseline")
ADVANTAGE_ESTIMATORS = ("gae", "reinforce", "reinforce_plus_plus", "remax", *GROUP_ESTIMATORS)
POLICY_LOSSES = ("ppo", "a2c", "gspo", "cispo", "decoupled_ppo")
#: Bounds of the ratio π_old / μ that each correction takes by default.
CORRECTION_BOUNDS = {"tis": (0.0, 2.0), "icepop": (0.5, 5.0), "sequence_mask": (0.5, 2.0)}

NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


def _is_function(name: str) -> bool:
    """Whether ``name`` reads package.module:function."""
    return name.count(":") == 1 and all(part.isidentifier() for part in name.replace(":", ".").split("."))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


class RunConfig(Section):
    """The run folder, logging, cadence."""

    root: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the run folder; the recipe and the time if not given. An existing folder is refused."""
    eval_every: int = Field(0, ge=0)
    """PPO steps between evaluations; 0 evaluates before the first and after the last step only."""
    checkpoint_every: int = Field(0, ge=0)
    """PPO steps between exported checkpoints; 0 exports the last policy only."""
    keep_last: PositiveInt = 2
    """Checkpoints that are kept."""
    save_rollouts: bool = True
    """Write every consumed batch to rollouts/step_N.parquet."""
    prometheus_port: int = Field(0, ge=0, le=65535)
    """Port of the metrics endpoint on the driver; 0 turns it off."""
    prometheus_host: str = "127.0.0.1"
    """Address that the metrics endpoint listens on."""
    wait_limit: PositiveFloat = 1800
    """Seconds that the driver waits for any one answer of another process before the run fails."""
    startup_limit: PositiveFloat = 600
    """Seconds until every process of a group must be up."""


class ModelConfig(Section):
    """The policy that training starts from."""

    path: str | None = None
    """Folder or hub name of a Hugging Face model. Empty: build one from ``architecture``, randomly initialised."""
    architecture: dict[str, Any] = {}
    """Keys of the Hugging Face config to build from, with ``model_type``. Vocabulary, special tokens are filled in."""
    tokenizer: str | None = None
    """Folder or hub name; ``model.path`` if not given; else trained on the data (see ``tokenizer_vocab_size``)."""
    tokenizer_vocab_size: PositiveInt = 2048
    """Size of the byte-level BPE that is trained on ``data`` when there is no tokenizer."""
    dtype: Dtype = "float32"
    """Type of weights and activations in every process. Optimizer and gradients stay in float32."""
    attention: str = "sdpa"
    """``attn_implementation`` of transformers: sdpa, eager, flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Allow code from the model's repository to run. Off unless you read that code."""


class DataConfig(Section):
    """Where prompts, demonstrations and comparisons come from."""

    format: Literal["world", "hh", "messages", "preferences", "prompts", "gsm8k"] = "world"
    """world: the embedded miniature world. hh: `chosen`/`rejected` transcripts. messages: chat JSONL.
    preferences: `prompt`/`chosen`/`rejected`. prompts: one `prompt` a row. gsm8k: `question`/`answer`."""
    dir: str | None = None
    """Folder of the files below; or ``hub:NAME[:SUBSET]``: the splits train and test of a hub dataset are read then."""
    train: str | None = None
    """Training file inside ``dir`` (.jsonl, .jsonl.gz, .parquet, .txt), or dataset ``hub:NAME[:SUBSET[:SPLIT]]``."""
    test: str | None = None
    """Held-out file, same forms. Its prompts are never trained on."""
    pretrain: str | None = None
    """Text for ``algo.ptx_coef``, same forms: one text a line, or rows with ``text``. Default: the demonstrations."""
    chat_template: str | None = None
    """Jinja template; by default the tokenizer's own, or the plain `Human:`/`Assistant:` form of HH."""
    on_bad_row: Literal["skip", "fail"] = "skip"
    """A faulty row is skipped, counted and reported with file and line, or stops the run."""
    max_rows: PositiveInt | None = None
    """Read at most so many rows of each file."""
    shuffle: bool = True
    """Shuffle prompts anew in every epoch, from ``seed``."""
    world: WorldConfig = Field(default_factory=lambda: WorldConfig())
    """Sizes of the embedded world; used by ``format: world`` only."""


class WorldConfig(Section):
    """The embedded miniature assistant world."""

    demonstrations: PositiveInt = 24000
    """Imperfect demonstrations for SFT."""
    comparisons: PositiveInt = 16000
    """Preference pairs for the reward model."""
    prompts: PositiveInt = 4096
    """Training prompts for PPO."""
    test_prompts: PositiveInt = 512
    """Held-out prompts, with arguments that never occur in training."""
    label_noise: Fraction = 0.1
    """Share of preference labels that are flipped."""
    sampled_pairs: Fraction = 0.5
    """Share of the pairs whose responses are sampled from the SFT policy; the rest come from demonstrations."""
    ranked_responses: Annotated[int, Field(ge=2)] = 4
    """K of ``reward_model.loss: kwise``; ``comparisons`` counts the pairs, K(K-1)/2 for each ranking."""


class OptimConfig(Section):
    """AdamW, its schedule, gradient clipping."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay from ``lr`` to ``lr * min_lr_ratio`` over the steps of the stage, after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the rate rises linearly from 0."""
    min_lr_ratio: Fraction = 0.0
    """Where the schedule ends, as a share of ``lr``."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's betas."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping by global norm."""


class LearnerConfig(Section):
    """A DeepSpeed group: placement and ZeRO."""

    ranks: PositiveInt = 1
    """Data-parallel processes."""
    cpus: PositiveFloat = 1
    """CPUs of each rank; fractions allowed. The rank computes with that many threads, at least one."""
    gpus: NonNegative = 0
    """GPUs of each rank."""
    zero_stage: Literal[1, 2, 3] = 2
    """ZeRO stage: 1 shards the optimizer, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (GPU only)."""
    offload_params: bool = False
    """Keep parameters in host memory between uses (GPU, ZeRO-3)."""
    resources: dict[str, float] = {}
    """Custom Ray resources of each rank, to pin the group to nodes."""

    @model_validator(mode="after")
    def _offload(self) -> LearnerConfig:
        if (self.offload_optimizer or self.offload_params) and not self.gpus:
            raise ValueError("offload_optimizer and offload_params move data off a GPU, but gpus is 0")
        if self.offload_params and self.zero_stage != 3:
            raise ValueError(f"offload_params needs zero_stage 3, got {self.zero_stage}")
        return self


class ReplicaConfig(Section):
    """A frozen model: replicas, or one ZeRO-3 group where it is too large for a device."""

    replicas: PositiveInt = 1
    """Independent copies; with ``sharded`` the ranks of one group."""
    cpus: NonNegative = 1
    """CPUs of each process."""
    gpus: NonNegative = 0
    """GPUs of each process."""
    sharded: bool = False
    """Run as one DeepSpeed ZeRO-3 group without an optimizer: for models larger than one device."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward of one process."""
    resources: dict[str, float] = {}
    """Custom Ray resources of each process."""


class GeneratorConfig(Section):
    """The vLLM engines. Keys with vLLM's names have vLLM's meaning."""

    replicas: PositiveInt = 1
    """Independent engines."""
    cpus: PositiveFloat = 1
    """CPUs of each engine (of each worker with tensor parallelism)."""
    gpus: NonNegative = 0
    """GPUs of each engine; a fraction shares one, with tensor parallelism at least ``tensor_parallel_size``."""
    tensor_parallel_size: PositiveInt = 1
    """Workers that share one model."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of GPU memory for weights and KV cache."""
    kv_cache_gb: PositiveFloat = 0.25
    """KV cache on a CPU, in GiB."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded at once."""
    enforce_eager: bool = True
    """No graph capture: starts faster, decodes slower on GPUs."""
    enable_prefix_caching: bool = True
    """Share the KV cache of common prefixes. Caches never mix policy versions."""
    resources: dict[str, float] = {}
    """Custom Ray resources of each engine."""


class WeightSyncConfig(Section):
    """How new weights travel from the policy learner to the generators."""

    transport: Literal["object_store", "nccl", "ipc"] = "object_store"
    """object_store: any cluster, a dead generator blocks nobody. nccl: GPUs, vLLM's packed broadcast.
    ipc: learner and generator on one GPU."""
    shard_mb: PositiveFloat = 256
    """ZeRO-3 parameters are gathered, and shards made, in groups of at most about this size."""
    canary_tolerance: PositiveFloat | None = None
    """Largest allowed difference of the canary's log-probabilities; default 1e-4 (float32), 0.15 (bfloat16)."""


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
    chunk_tokens: PositiveInt = 2000
    """Finished groups are sent on in chunks of at least so many tokens."""
    dynamic_sampling: bool = False
    """Replace groups whose scores are all equal by new prompts, which teach something (DAPO)."""
    dynamic_sampling_rounds: PositiveInt = 8
    """Times that a step asks for replacements; then it trains with the groups that it has."""

    @model_validator(mode="after")
    def _unbiased(self) -> RolloutConfig:
        if (self.top_p < 1 or self.top_k > 0) and not self.allow_biased_sampling:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k} sample from another distribution than the learner "
                "computes, which biases the ratio; set rollout.allow_biased_sampling=true to accept that"
            )
        if self.max_staleness > 0:
            raise ValueError(f"max_staleness={self.max_staleness}: only 0 (on-policy) is built so far")
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
            if name not in known and not _is_function(name):
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


class SFTConfig(Section):
    """Supervised finetuning on demonstrations, loss on responses only."""

    epochs: PositiveFloat = 1
    """Passes over the demonstrations; fractions allowed."""
    batch_size: PositiveInt = 32
    """Demonstrations per optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward of one rank."""
    max_length: PositiveInt = 1024
    """Longer demonstrations are left out and counted."""
    packing: bool = False
    """As ``train.packing``."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Placement and ZeRO."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer."""


class RewardModelConfig(Section):
    """Training of the pairwise reward model (Bradley-Terry)."""

    path: str | None = None
    """Model that it starts from; default: the SFT model in a pipeline, else ``model.path``."""
    epochs: PositiveFloat = 1
    """Passes over the comparisons."""
    batch_size: PositiveInt = 32
    """Pairs per optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward of one rank."""
    max_length: PositiveInt = 1024
    """Pairs with a longer side are left out and counted."""
    packing: bool = False
    """As ``train.packing``."""
    loss: Literal["pairwise", "kwise"] = "pairwise"
    """pairwise: one comparison, one term. kwise: rankings of K responses to a prompt, all their pairs at one forward
    for each response (InstructGPT); ``batch_size`` then counts rankings."""
    shuffle_labels: bool = False
    """Train on random labels: a control, which must not improve anything."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Placement and ZeRO."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer."""


class DPOConfig(Section):
    """Direct preference optimisation: the policy learns from comparisons, without a reward model."""

    loss: Literal["dpo", "ipo"] = "dpo"
    """dpo (2305.18290) or ipo (2310.12036)."""
    beta: PositiveFloat = 0.1
    """Weight of the KL that is implied: large stays near the start. IPO aims at a log-ratio of 1 / (2 beta)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels believed to be wrong; above 0 the dpo loss is conservative DPO (cDPO)."""
    epochs: PositiveFloat = 1
    """Passes over the comparisons."""
    batch_size: PositiveInt = 32
    """Pairs per optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward of one rank."""
    max_length: PositiveInt = 1024
    """Pairs with a longer side are left out and counted."""
    packing: bool = False
    """As ``train.packing``."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Placement and ZeRO."""
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=5e-7))
    """Optimizer."""

    @model_validator(mode="after")
    def _smoothing(self) -> DPOConfig:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing={self.label_smoothing} belongs to loss=dpo (it makes cDPO), not to ipo")
        return self


class PipelineConfig(Section):
    """The stages of recipe pipeline."""

    stages: list[Literal["sft", "reward_model", "ppo", "dpo"]] | None = None
    """In order, each from the result of the one before. Default: sft, reward_model where a component of the reward is
    ``model: trained``, ppo."""


class RewardComponent(Section):
    """One term of the reward. Exactly one of ``model``, ``function``, ``url``."""

    name: str = "reward"
    """Name of the column ``score/NAME`` and of its metric."""
    weight: float = 1.0
    """Its factor in the sum."""
    model: str | None = None
    """Folder or hub name of a sequence classifier with one output; ``trained``: the pipeline's reward model."""
    function: str | None = None
    """``package.module:function``, called as f(prompts, responses, fields) -> list of numbers."""
    url: str | None = None
    """HTTP endpoint that takes {prompts, responses, fields} as JSON and answers {scores: [...]}."""
    headers: dict[str, str] = {}
    """HTTP headers; ``$NAME`` in a value is read from the environment."""
    timeout: PositiveFloat = 60
    """Seconds for one call of a function or endpoint; then the call fails."""
    retries: int = Field(3, ge=0)
    """Attempts after a failed HTTP call, with growing pauses."""

    @model_validator(mode="after")
    def _one_source(self) -> RewardComponent:
        given = [k for k in ("model", "function", "url") if getattr(self, k)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, function, url; got {given or 'none'}")
        if self.function and not _is_function(self.function):
            raise ValueError(f"function must read package.module:function, got {self.function!r}")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        return self


class RewardConfig(ReplicaConfig):
    """The reward: a weighted sum of components, computed by ``replicas`` processes."""

    components: list[RewardComponent] = [RewardComponent(name="reward_model", model="trained")]
    """Terms of the sum."""
    normalize: bool = False
    """Subtract mean and divide by standard deviation of the scores of the initial policy."""
    clip: PositiveFloat | None = None
    """Clip the score to [-clip, clip], after normalisation."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response without an end of text."""
    soft_overlong_cache: PositiveInt | None = None
    """Over so many tokens before ``rollout.max_response_length`` the score falls linearly by up to 1 (DAPO)."""

    @model_validator(mode="after")
    def _components(self) -> RewardConfig:
        names = [c.name for c in self.components]
        if not names:
            raise ValueError("components is empty: PPO needs a reward")
        if len(set(names)) < len(names):
            raise ValueError(f"components must have different names, got {names}")
        if self.sharded and (len(names) > 1 or not self.components[0].model):
            raise ValueError("sharded runs one model over all processes: give exactly one component, with `model`")
        if self.sharded and self.components[0].weight != 1:
            raise ValueError(f"sharded knows no weight, got {self.components[0].weight:g}; scale algo.kl_coef instead")
        return self


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


class ClusterConfig(Section):
    """The Ray cluster."""

    address: str | None = None
    """Cluster to join; default: RAY_ADDRESS or the job's cluster, else a local one is started."""
    local_cpus: PositiveInt | None = None
    """CPUs of the local cluster; default: those of the machine."""
    object_store_mb: PositiveInt | None = None
    """Object store of the local cluster in MB; default: Ray's."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Strategy of the placement groups, one for each role."""


class Config(Section):
    """A whole run."""

    recipe: Literal["sft", "reward_model", "ppo", "dpo", "pipeline", "evaluate"] = "pipeline"
    """sft, reward_model, ppo, dpo; pipeline runs several in order; evaluate samples and scores ``model.path``."""
    description: str = ""
    """One line for the reader; printed by --dry-run."""
    seed: int = 0
    """Seed of everything that is random."""
    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    reward_model: RewardModelConfig = Field(default_factory=RewardModelConfig)
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
        differs = self.model.dtype != "float32" or sampled.max_staleness > 0 or sampled.top_p < 1 or sampled.top_k > 0
        correction = "tis" if differs and algo.policy_loss != "decoupled_ppo" else "none"
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
        if self.model.path is None and self.recipe in ("ppo", "evaluate"):
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
        packed = [name for name in ("train", "sft", "reward_model", "dpo") if getattr(self, name).packing]
        if packed and self.model.attention != "flash_attention_2":
            raise ValueError(
                f"{packed[0]}.packing=true needs model.attention=flash_attention_2, got {self.model.attention}; "
                "without it packed samples cost the square of their sum"
            )
