"""What is done to tables of comparisons and rankings after they were read."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa

from rlhf_dist import schema
from rlhf_dist.data import labels


def flip_labels(table: pa.Table, share: float, seed: int) -> tuple[pa.Table, int]:
    """Swap the sides of each comparison with probability ``share``; the table, and how many were swapped.

    With the same seed the pairs that are swapped for a small share are swapped for a larger one, too.
    """
    rng = random.Random(f"{seed} shuffled labels")
    n = table.num_rows
    swapped = np.array([rng.random() < share for _ in range(n)], dtype=bool)
    both = pa.concat_arrays([table[side].combine_chunks() for side in ("chosen_ids", "rejected_ids")])
    chosen = np.arange(n) + n * swapped
    rejected = np.arange(n) + n * ~swapped
    for name, rows in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        table = table.set_column(table.column_names.index(name), name, both.take(pa.array(rows)))
    return table, int(swapped.sum())


def preferred_responses(table: pa.Table, at_most: int, seed: int) -> pa.Table:
    """The chosen sides of comparisons, or the responses of rankings that win the most, as ``schema.DEMONSTRATION``.

    Of ``at_most`` rows, drawn by ``seed``.
    """
    rows = np.random.default_rng(seed).permutation(table.num_rows)[:at_most]
    part = table.take(pa.array(rows)).combine_chunks()
    if "chosen_ids" in table.column_names:
        responses = part["chosen_ids"]
    else:
        rankings = zip(part["responses"].to_pylist(), part["preferences"].to_pylist(), strict=True)
        responses = pa.array([r[labels.winner(preferences)] for r, preferences in rankings], pa.list_(pa.int32()))
    return pa.table({"prompt_ids": part["prompt_ids"], "response_ids": responses}, schema=schema.DEMONSTRATION)
