"""Small models and tables that several tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from rlhf_dist import schema
from rlhf_dist.models import build_policy

VOCAB = 64
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    # Large, so that different inputs give clearly different outputs.
    "initializer_range": 0.3,
}


def tiny_llama(seed: int = 0, **keys: Any) -> PreTrainedModel:
    """A causal language model of some 15,000 parameters."""
    return build_policy({**LLAMA, **keys}, VOCAB, SPECIAL, seed)


def ragged(lengths: Sequence[int], draw: Any, kind: pa.DataType) -> pa.Array:
    """A list column with ``draw(n)`` in a row of length ``n``."""
    return pa.array([draw(n) for n in lengths], pa.list_(kind))


def rollouts(lengths: Sequence[tuple[int, int]], n_samples: int = 1, seed: int = 0, holes: bool = False) -> pa.Table:
    """``schema.ROLLOUT``: random tokens, one row for each (prompt length, response length).

    Args:
        n_samples: rows of a group.
        holes: some response tokens are not trained.
    """
    rng = np.random.default_rng(seed)
    p, q = [a for a, _ in lengths], [b for _, b in lengths]
    rows = len(lengths)
    ids = lambda n: rng.integers(3, VOCAB, n)
    columns = {
        "prompt_id": pa.array([i // n_samples for i in range(rows)], pa.int64()),
        "group_id": pa.array([i // n_samples for i in range(rows)], pa.int64()),
        "sample_index": pa.array([i % n_samples for i in range(rows)], pa.int32()),
        "prompt_ids": ragged(p, ids, pa.int32()),
        "response_ids": ragged(q, ids, pa.int32()),
        "rollout_logprobs": ragged(q, lambda n: -rng.random(n), pa.float32()),
        "policy_version": ragged(q, lambda n: np.zeros(n, int), pa.int32()),
        "finish_reason": pa.array(["stop"] * rows).dictionary_encode(),
        "response_mask": ragged(
            q, (lambda n: rng.integers(0, 2, n)) if holes else (lambda n: np.ones(n, int)), pa.uint8()
        ),
    }
    return schema.check(pa.table(columns).cast(schema.ROLLOUT), schema.ROLLOUT, "test")


def experience(lengths: Sequence[tuple[int, int]], seed: int = 0, holes: bool = False) -> pa.Table:
    """What learners train on: rollouts with all columns of the later stages, random."""
    table = rollouts(lengths, seed=seed, holes=holes)
    rng = np.random.default_rng(seed + 1)
    q = [b for _, b in lengths]
    table = table.append_column("score", pa.array(rng.normal(size=len(q)), pa.float32()))
    for name in ("old_logprobs", "ref_logprobs"):
        table = table.append_column(name, ragged(q, lambda n: -4 + rng.normal(size=n), pa.float32()))
    # The sampler differs a little from the learner, as it does in bfloat16.
    noise = np.random.default_rng(seed + 2)
    sampled = [(np.array(x) + 0.3 * noise.normal(size=len(x))).tolist() for x in table["old_logprobs"].to_pylist()]
    i = table.column_names.index("rollout_logprobs")
    table = table.set_column(i, "rollout_logprobs", pa.array(sampled, pa.list_(pa.float32())))
    for name in ("values", "rewards", "advantages", "returns"):
        table = table.append_column(name, ragged(q, lambda n: rng.normal(size=n), pa.float32()))
    return schema.check(table, schema.EXPERIENCE, "test")


def comparisons(lengths: Sequence[tuple[int, int, int]], seed: int = 0) -> pa.Table:
    """``schema.COMPARISON``: one row for each (prompt, chosen, rejected) length."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, VOCAB, n)
    columns = {
        f"{side}_ids": ragged([x[i] for x in lengths], ids, pa.int32())
        for i, side in enumerate(("prompt", "chosen", "rejected"))
    }
    margin, preference = (
        pa.array(x, pa.float32()) for x in (rng.random(len(lengths)), 1 - rng.random(len(lengths)) / 2)
    )
    given = {"preference": preference, "margin": margin, "source": [""] * len(lengths)}
    return pa.table({**columns, **given}, schema=schema.COMPARISON)


def rankings(
    lengths: Sequence[tuple[int, Sequence[int]]], preferences: Sequence[Sequence[float]], seed: int = 0
) -> pa.Table:
    """``schema.RANKING``: random tokens of each prompt and of its responses, and the labels of its pairs."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(1, VOCAB, n).tolist()
    columns = {
        "prompt_ids": [ids(p) for p, _ in lengths],
        "responses": [[ids(n) for n in responses] for _, responses in lengths],
        "preferences": [list(map(float, p)) for p in preferences],
    }
    return pa.table(columns, schema=schema.RANKING)
