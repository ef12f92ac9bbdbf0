"""A learner group and generators, as a run makes them: train a little, publish, gate, for a few versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from learners import running
from sync_models import build
from tiny import experience

from rlhf_dist.actors.generator import Generator
from rlhf_dist.actors.group import Group, Resources
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import Config, LearnerConfig, OptimConfig

SECONDS = 300


def config(folder: Path, transport: str, dtype: str, gpus: float, workers: int = 1) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "rollout": {"max_prompt_length": 32, "max_response_length": 16},
            "generator": {
                "gpus": gpus * workers,
                "tensor_parallel_size": workers,
                "kv_cache_gb": 0.03,
                "gpu_memory_utilization": 0.2,
                "max_num_seqs": 16,
            },
            "policy": {"learner": {"gpus": gpus}},
            "weight_sync": {"transport": transport, "shard_mb": 0.05},
        }
    )


@contextmanager
def policy_group(folder: Path, cfg: Config, ranks: int, gpus: float, zero_stage: int) -> Iterator[LearnerGroup]:
    spec = LearnerSpec(
        role="policy",
        model_path=str(folder),
        head="policy",
        objective="sft",
        model=cfg.model,
        learner=LearnerConfig(ranks=ranks, gpus=gpus, zero_stage=zero_stage),
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup_ratio=0),
        micro_batch_tokens=200,
        shard_mb=cfg.weight_sync.shard_mb,
        transport=cfg.weight_sync.transport,
        generator_workers=cfg.generator.tensor_parallel_size,
    )
    with running(spec, SECONDS) as group:
        yield group


@contextmanager
def generator_group(folder: Path, cfg: Config, count: int) -> Iterator[list[Any]]:
    group = Group(
        "generator",
        Generator,
        count,
        Resources(cfg.generator.cpus, cfg.generator.gpus),
        lambda i: (i, str(folder), cfg, [], True, 48),
        strategy="PACK",
        seconds=SECONDS,
        concurrency=4,
    )
    try:
        group.wait_ready()
        yield group.actors
    finally:
        group.release()


def sync_versions(
    folder: Path,
    transport: str,
    *,
    dtype: str = "float32",
    gpus: float = 0,
    ranks: int = 1,
    zero_stage: int = 2,
    generators: int = 1,
    workers: int = 1,
) -> list[list[dict[str, Any]]]:
    """Records of every generator for versions 0, 1 and 2."""
    build("llama", tied=True, folder=folder).save_pretrained(folder)
    cfg = config(folder, transport, dtype, gpus, workers)
    table = experience([(3, 9), (2, 4), (5, 6), (4, 8)]).select(["prompt_ids", "response_ids"])
    with (
        policy_group(folder, cfg, ranks, gpus, zero_stage) as policy,
        generator_group(folder, cfg, generators) as actors,
    ):
        records = []
        for version in range(3):
            if version:
                policy.update(table, [np.arange(4)] * 3).result()
            refs = policy.weights(version=version).deliver(actors)
            records.append(wait_for(refs, f"generators, loading version {version}", SECONDS))
        return records
