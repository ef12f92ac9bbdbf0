"""What a DeepSpeed group holds and learns, and where it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_dist.config import AlgoConfig, DPOConfig, LearnerConfig, ModelConfig, OptimConfig

ObjectiveName = Literal["sft", "distill", "pairwise", "kwise", "dpo", "policy", "critic"]

#: Tokens of the canary prompt.
CANARY_LENGTH = 16


@dataclass(frozen=True)
class Restore:
    """The state of a learner in a checkpoint."""

    folder: str
    """``learner/ROLE`` in a checkpoint, or what was converted from it; any URL."""
    converted: bool
    """Whether it was written by another number of ranks."""


@dataclass(frozen=True)
class LearnerSpec:
    """What one group holds and learns."""

    role: str
    model_path: str
    head: Literal["policy", "scalar"]
    objective: ObjectiveName | None
    """None: a frozen model, ZeRO-3 without an optimizer."""
    model: ModelConfig
    learner: LearnerConfig
    optim: OptimConfig | None
    micro_batch_tokens: int
    packing: bool = False
    total_steps: int = 1
    temperature: float = 1.0
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    max_response_length: int = 1
    shard_mb: float = 256
    wire_dtype: str | None = None
    """Of the weights that are sent; None: that of the model."""
    pad_id: int = 0
    seed: int = 0
    canary_length: int = CANARY_LENGTH
    transport: str = "object_store"
    generator_workers: int = 1
    """Tensor-parallel workers of each generator."""
    restore: Restore | None = None
    """Where to go on; default: from ``model_path``."""
