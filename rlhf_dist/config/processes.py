"""Where things run and how they are stepped: the run folder, the cluster, groups of processes, the optimizer."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_dist.config.base import Dtype, Fraction, NonNegative, Section


class RunConfig(Section):
    """The run folder, logging, cadence."""

    root: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the run folder; the recipe and the time if not given."""
    resume: Literal["auto", "never", "changed"] = "auto"
    """auto: a run folder of this name that is not finished is gone on with, and refused if a key has changed that says
    what is learnt. changed: gone on with all the same. never: refused."""
    eval_every: int = Field(0, ge=0)
    """PPO steps between evaluations; 0 evaluates before the first and after the last step only."""
    checkpoint_every: int = Field(20, ge=0)
    """PPO steps between checkpoints, written while training goes on; 0 saves nothing but the last policy."""
    checkpoint_dir: str | None = None
    """Where checkpoints go; any URL that fsspec knows, such as s3://bucket/name. Default: in the run folder."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: int = Field(0, ge=0)
    """Checkpoints that are kept beside them because their evaluation has the highest reward, or the highest
    ``train.early_stop.metric`` where that is given; they need an evaluation in the same step (``eval_every``)."""
    term_limit: NonNegative = 60
    """Seconds that a run may take after SIGTERM to finish its step and save; then it stops at once."""
    save_rollouts: bool = True
    """Write every consumed batch to rollouts/step_N.parquet."""
    prometheus_port: int = Field(0, ge=0, le=65535)
    """Port of the metrics endpoint on the driver; 0 turns it off."""
    prometheus_host: str = "127.0.0.1"
    """Address that the metrics endpoint listens on."""
    max_restarts: int = Field(10, ge=0)
    """How often processes of one role may be started anew within an hour after they died; then the run fails."""
    wait_limit: PositiveFloat = 1800
    """Seconds that the driver waits for any one answer of another process; then see ``on_hang``."""
    on_hang: Literal["fail", "restart"] = "restart"
    """When a wait passes its limit. restart: processes that do not answer are killed, and started anew as if they had
    died. fail: the run ends. Either way it says who waited for what, and where every process stands."""
    startup_limit: PositiveFloat = 600
    """Seconds until every process of a group must be up."""


class ClusterConfig(Section):
    """The Ray cluster."""

    address: str | None = None
    """Cluster to join; default: RAY_ADDRESS or the job's cluster, else a local one is started."""
    local_cpus: PositiveInt | None = None
    """CPUs of the local cluster; default: those of the machine."""
    object_store_mb: PositiveInt | None = None
    """Object store of the local cluster in MB; default: Ray's."""
    node_memory_gb: PositiveFloat | None = None
    """Memory of one node in GB, for --dry-run; default: this machine's, where the run would start a local cluster."""
    gpu_memory_gb: PositiveFloat | None = None
    """Memory of one GPU in GB, for --dry-run."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Strategy of the placement groups, one for each role."""

    @property
    def joined(self) -> str | None:
        """Address of the cluster to join, if any: ``address``, else RAY_ADDRESS, which Ray sets for its jobs."""
        return self.address or os.environ.get("RAY_ADDRESS")


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
    """No compilation and no graph capture: starts faster, decodes slower (much on GPUs, by some percent on CPUs)."""
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
    wire_dtype: Dtype | None = None
    """Type of the weights on their way; default ``model.dtype``. bfloat16 halves the bytes of a float32 model, and the
    generators then sample from rounded weights."""
    canary_tolerance: PositiveFloat | None = None
    """Largest allowed difference of the canary's log-probabilities, more for tokens that are very unlikely; default
    1e-4 (float32), 0.3 (bfloat16)."""
