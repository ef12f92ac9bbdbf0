"""Small learners for tests: their models, tables and specs, and a group that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch
from tiny import LLAMA, SPECIAL, comparisons, experience
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.config import AlgoConfig, LearnerConfig, ModelConfig, OptimConfig
from rlhf_dist.data.tokenization import save_tokenizer
from rlhf_dist.data.world import build_tokenizer
from rlhf_dist.models import build_policy

# Wide enough that ZeRO-3 really partitions: it keeps parameters below 10,000 elements whole.
MODEL = {**LLAMA, "hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "initializer_range": 0.1}
VOCAB = 128
SHAPE = [(3, 9), (2, 4), (5, 6), (1, 2), (4, 1), (2, 8), (6, 5)]
BUDGET = 20
ALGO = AlgoConfig(entropy_coef=0.01, use_kl_loss=True, kl_estimator="k3")
# A large epsilon: with Adam's usual one the first step of a parameter whose gradient is rounding noise is a coin toss.
OPTIM = OptimConfig(lr=1e-3, schedule="constant", warmup_ratio=0, eps=1e-3, max_grad_norm=0.5)
SECONDS = 120


def table_of(objective: str) -> pa.Table:
    if objective == "pairwise":
        return comparisons([(3, 4, 2), (1, 1, 3), (2, 5, 1), (4, 2, 2), (2, 2, 6)])
    table = experience(SHAPE, holes=objective != "sft")
    return table.select(["prompt_ids", "response_ids"]) if objective == "sft" else table


def spec_of(folders: Path, objective: str | None, ranks: int, stage: int, dtype: str = "float32") -> LearnerSpec:
    head = "scalar" if objective in ("critic", "pairwise") else "policy"
    return LearnerSpec(
        role=f"{objective}-{ranks}-{stage}",
        model_path=str(folders / head),
        head=head,
        objective=objective,
        model=ModelConfig(path="-", dtype=dtype),
        learner=LearnerConfig(ranks=ranks, zero_stage=stage),
        optim=OPTIM if objective else None,
        micro_batch_tokens=BUDGET,
        total_steps=4,
        temperature=0.8,
        algo=ALGO,
        max_response_length=9,
        shard_mb=0.05,
    )


@contextmanager
def running(spec: LearnerSpec, seconds: float = SECONDS) -> Iterator[LearnerGroup]:
    group = LearnerGroup(spec, "PACK", seconds).start()
    try:
        group.wait_ready()
        yield group
    finally:
        group.release()


def save_models(root: Path) -> Path:
    """``policy/``, ``scalar/`` and ``tokenizer/`` under ``root``."""
    build_policy(MODEL, VOCAB, SPECIAL, seed=0).save_pretrained(root / "policy")
    config = AutoModelForCausalLM.from_pretrained(root / "policy").config
    config.num_labels = 1
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(root / "scalar")
    save_tokenizer(build_tokenizer(), str(root / "tokenizer"))
    return root
