"""Arrow tables to tensors: which rows form a micro-batch, and how their tokens are laid out.

This is the only place where ragged columns become tensors. Two layouts share
one code path; they differ in where a row starts in the flat token buffer:

* padded  ``[B, T]``: row ``b`` starts at ``b * T``; rows of similar length share
  a micro-batch, so little is padded (CPUs, and GPUs without varlen kernels);
* packed  ``[1, N]``: rows lie end to end and ``position_ids`` start anew with
  each row, which varlen attention reads as separate sequences.

**Alignment.** Index ``t`` of every tensor belongs to the *prediction of token
t + 1*: ``logprobs[t] = log p(token[t+1] | token[<=t])``, ``values[t]`` is the
value of the state before token ``t + 1``. A response of ``q`` tokens after a
prompt of ``p`` therefore occupies the indices ``p - 1 ... p + q - 2``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rlhf_dist.data.ragged import Ragged

#: What a forward and backward pass costs whatever its size, as a part of one that is full: less padding is worth more
#: passes only down to here. ``python -m benchmarks.learner`` measures what comes of it.
CALL = 1 / 16


@dataclass
class Batch:
    """One micro-batch on the device; shapes are ``[B, T]`` padded or ``[1, N]`` packed."""

    input_ids: Tensor
    attention_mask: Tensor | None
    """``[B, T]``, 1 for tokens; None when packed (``position_ids`` separate the rows)."""
    position_ids: Tensor
    labels: Tensor
    """Token ``t + 1`` at index ``t``; 0 where nothing is predicted."""
    response: Tensor
    """bool: index predicts a response token."""
    mask: Tensor
    """bool: index predicts a *trained* response token (``response_mask``)."""
    last: Tensor
    """``[rows]`` flat index of each row's last token."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Per-token columns of the table, scattered to ``[B, T]``."""
    rows: Sequence[int] = ()
    """Rows of the table, in order; empty for a dummy."""
    response_index: Tensor | None = None
    """Packed: ``[rows, longest]`` flat index of each row's response tokens, -1 after the last one."""
    first_label: int = 0
    """No index before this one (padded layout) predicts a response token."""

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in self.__dict__.items()
            if k != "columns"
        }
        return Batch(**moved, columns={k: v.to(device, non_blocking=True) for k, v in self.columns.items()})

    def by_row(self, x: Tensor) -> Tensor:
        """``x`` with one sample a row: as it is when padded, else its response tokens as ``[rows, longest]``."""
        if self.response_index is None:
            return x
        flat = x.reshape(-1)
        return torch.where(self.response_index >= 0, flat[self.response_index.clamp(min=0)], torch.zeros_like(flat[:1]))

    def gather(self, x: Tensor) -> np.ndarray:
        """The response tokens of ``x``, rows end to end."""
        return x[self.response].float().cpu().numpy()


def partition(lengths: np.ndarray, ranks: int) -> list[list[int]]:
    """Rows to ranks so that tokens are balanced; deterministic, the same on every rank."""
    parts: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, r) for r in range(ranks)]
    for row in np.argsort(-lengths, kind="stable"):
        tokens, r = heapq.heappop(heap)
        parts[r].append(int(row))
        heapq.heappush(heap, (tokens + int(lengths[row]), r))
    return parts


def micro_batches(
    lengths: np.ndarray, ranks: int, rank: int, max_tokens: int, packing: bool = False
) -> list[list[int]]:
    """Rows of this rank in micro-batches of at most ``max_tokens`` tokens, padding included, and with little of it.

    Every rank gets *equally many* micro-batches, because DeepSpeed's forwards
    and backwards are collective; missing ones are empty lists, which
    :func:`collate` turns into dummies of weight zero. A row longer than
    ``max_tokens`` forms a micro-batch of its own.
    """
    cut = _fill if packing else _cut
    plans = [cut(lengths, rows, max_tokens) for rows in partition(lengths, ranks)]
    count = max(1, *(len(p) for p in plans))
    return plans[rank] + [[] for _ in range(count - len(plans[rank]))]


def _fill(lengths: np.ndarray, rows: list[int], max_tokens: int) -> list[list[int]]:
    """Rows end to end, as many as there is room for."""
    plan: list[list[int]] = []
    used = 0
    for row in rows:
        n = int(lengths[row])
        if not plan or used + n > max_tokens:
            plan.append([])
            used = 0
        plan[-1].append(row)
        used += n
    return plan


def _cut(lengths: np.ndarray, rows: list[int], max_tokens: int) -> list[list[int]]:
    """Padded rows, cut where that costs least: each micro-batch its padded tokens and ``CALL``.

    ``rows`` come longest first, so the first row of a micro-batch sets its padded length. From the last row to the
    first, the best way to cut all that follows is known.
    """
    widths = np.maximum(lengths[rows], 1)
    best, ends = np.zeros(len(rows) + 1), np.empty(len(rows), int)
    for i in reversed(range(len(rows))):
        counts = np.arange(1, min(max(max_tokens // widths[i], 1), len(rows) - i) + 1)
        costs = widths[i] * counts + best[i + counts]
        ends[i] = i + counts[costs.argmin()]
        best[i] = costs.min() + CALL * max_tokens
    plan, start = [], 0
    while start < len(rows):
        plan.append(rows[start : ends[start]])
        start = ends[start]
    return plan


def sequence_lengths(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    """Prompt plus response tokens of each of ``rows``."""
    return Ragged.of(table, "prompt_ids").lengths_of(rows) + Ragged.of(table, "response_ids").lengths_of(rows)


class TokenColumn:
    """A column with one number per response token, collected from micro-batches in any order of rows.

    Rows without a trained token (greedy responses, for instance) need no forward: they are 0.
    """

    def __init__(self, table: pa.Table) -> None:
        self.lengths = Ragged.of(table, "response_ids").lengths
        masks = Ragged.of(table, "response_mask")
        trained = np.diff(np.concatenate([[0], np.cumsum(masks.values, dtype=np.int64)])[masks.offsets]) > 0
        self.wanted = np.flatnonzero(trained)
        """Rows to compute."""
        self.skipped = np.flatnonzero(~trained)
        self.rows: list[int] = []
        self.values: list[np.ndarray] = [np.empty(0, np.float32)]

    def add(self, batch: Batch, x: Tensor) -> None:
        self.rows += batch.rows
        self.values.append(batch.gather(x))

    def table(self, name: str, with_skipped: bool = True) -> pa.Table:
        """``row`` and the column ``name``; of several ranks one has the skipped rows."""
        rows, values = np.array(self.rows, np.int64), np.concatenate(self.values)
        if with_skipped:
            rows = np.concatenate([rows, self.skipped])
            values = np.concatenate([values, np.zeros(int(self.lengths[self.skipped].sum()), np.float32)])
        column = Ragged.to_arrow(values, self.lengths[rows])
        return pa.table({"row": pa.array(rows), name: column.cast(pa.list_(pa.float32()))})


def collate(
    table: pa.Table, rows: Sequence[int], columns: Sequence[str] = (), pad_id: int = 0, packing: bool = False
) -> Batch:
    """The micro-batch of ``rows`` with the per-token ``columns``; a dummy of weight zero if ``rows`` is empty.

    Raises:
        ValueError: a row has an empty prompt (its first token would be predicted from nothing).
    """
    prompts, responses = Ragged.of(table, "prompt_ids"), Ragged.of(table, "response_ids")
    has_mask = "response_mask" in table.column_names
    masks = Ragged.of(table, "response_mask") if has_mask else None
    ragged = {name: Ragged.of(table, name) for name in columns}
    return _layout(
        [prompts[r] for r in rows],
        [responses[r] for r in rows],
        [masks[r] for r in rows] if masks else None,
        {name: [data[r] for r in rows] for name, data in ragged.items()},
        rows,
        pad_id,
        packing,
    )


def collate_pairs(table: pa.Table, rows: Sequence[int], pad_id: int = 0, packing: bool = False) -> Batch:
    """Comparisons: sequence ``2 i`` is the chosen side of ``rows[i]``, ``2 i + 1`` the rejected one."""
    prompts = Ragged.of(table, "prompt_ids")
    sides = (Ragged.of(table, "chosen_ids"), Ragged.of(table, "rejected_ids"))
    return _layout(
        [prompts[r] for r in rows for _ in sides], [s[r] for r in rows for s in sides], None, {}, rows, pad_id, packing
    )


def pair_lengths(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    """Cost of each of ``rows``: both sides, padded to the longer one."""
    sides = [Ragged.of(table, name).lengths_of(rows) for name in ("chosen_ids", "rejected_ids")]
    return 2 * (Ragged.of(table, "prompt_ids").lengths_of(rows) + np.maximum(*sides))


def collate_rankings(table: pa.Table, rows: Sequence[int], pad_id: int = 0, packing: bool = False) -> Batch:
    """Rankings: the responses of ``rows[0]``, then those of ``rows[1]`` ...; ``last`` has one element for each.

    Columns, with one row for each pair that was compared: ``pair``, ``[P, 2]``, the numbers of its two responses in the
    batch; ``preference``, ``[P]``; ``prompt``, ``[P]``, which of ``rows`` it belongs to.
    """
    prompts, preferences = Ragged.of(table, "prompt_ids"), Ragged.of(table, "preferences")
    responses = table["responses"]
    sides = [[np.asarray(x, np.int32) for x in responses[r].as_py()] for r in rows]
    batch = _layout(
        [prompts[r] for r, side in zip(rows, sides, strict=True) for _ in side],
        [x for side in sides for x in side],
        None,
        {},
        rows,
        pad_id,
        packing,
    )
    sizes = [len(side) for side in sides]
    starts = np.cumsum([0, *sizes])[:-1]
    pairs = [start + np.stack(np.triu_indices(k, 1), 1) for start, k in zip(starts, sizes, strict=True)]
    flat = np.concatenate([np.empty(0, np.float32), *(preferences[r] for r in rows)])
    compared = ~np.isnan(flat)
    batch.columns["pair"] = torch.from_numpy(np.concatenate([np.empty((0, 2), np.int64), *pairs])[compared])
    batch.columns["preference"] = torch.from_numpy(flat[compared])
    batch.columns["prompt"] = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(p) for p in pairs])[compared])
    return batch


def ranking_lengths(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    """Cost of each of ``rows``: all of its responses, padded to the longest one."""
    prompts = Ragged.of(table, "prompt_ids").lengths_of(rows)
    longest = [[len(x) for x in table["responses"][int(r)].as_py()] for r in rows]
    return np.array([len(x) * (p + max(x)) for x, p in zip(longest, prompts, strict=True)], np.int64)


def _layout(
    prompts: list[np.ndarray],
    responses: list[np.ndarray],
    masks: list[np.ndarray] | None,
    columns: dict[str, list[np.ndarray]],
    rows: Sequence[int],
    pad_id: int,
    packing: bool,
) -> Batch:
    if not prompts:  # a dummy: one token, nothing predicted, so every sum over it is zero
        prompts, responses, masks = [np.full(1, pad_id, np.int32)], [np.empty(0, np.int32)], None
        columns = {name: [np.empty(0, np.float32)] for name in columns}
    p = np.array([len(x) for x in prompts])
    q = np.array([len(x) for x in responses])
    if (p == 0).any():
        row = rows[int(np.argmin(p)) * len(rows) // len(p)]
        raise ValueError(f"row {row} has an empty prompt; give it at least a BOS token")
    n = p + q
    width = int(n.sum()) if packing else int(n.max())
    starts = np.concatenate([[0], np.cumsum(n)[:-1]]) if packing else np.arange(len(n)) * width
    size = width if packing else width * len(n)

    tokens = np.full(size, pad_id, np.int64)
    attention = np.zeros(size, np.int64)
    positions = np.zeros(size, np.int64)
    labels = np.zeros(size, np.int64)
    response = np.zeros(size, bool)
    mask = np.zeros(size, bool)
    scattered = {name: np.zeros(size, np.float32) for name in columns}
    for i, start in enumerate(starts):
        end = start + n[i]
        tokens[start : start + p[i]] = prompts[i]
        tokens[start + p[i] : end] = responses[i]
        attention[start:end] = 1
        positions[start:end] = np.arange(n[i])
        predicts = slice(start + p[i] - 1, end - 1)
        labels[predicts] = responses[i]
        response[predicts] = True
        mask[predicts] = masks[i] if masks is not None else 1
        for name, data in columns.items():
            scattered[name][predicts] = data[i]

    shape = (1, size) if packing else (len(n), width)
    as_tensor = lambda x: torch.from_numpy(x).view(shape)
    return Batch(
        input_ids=as_tensor(tokens),
        attention_mask=None if packing else as_tensor(attention),
        position_ids=as_tensor(positions),
        labels=as_tensor(labels),
        response=as_tensor(response),
        mask=as_tensor(mask),
        last=torch.from_numpy(starts + n - 1),
        columns={name: as_tensor(x) for name, x in scattered.items()},
        rows=list(rows),
        response_index=_response_index(starts + p - 1, q) if packing else None,
        first_label=0 if packing else int((p - 1).min()),
    )


def _response_index(first: np.ndarray, lengths: np.ndarray) -> Tensor:
    """Flat indices ``first[i] ... first[i] + lengths[i] - 1`` of each row, filled up with -1."""
    offset = np.arange(int(lengths.max(initial=0)))
    return torch.from_numpy(np.where(offset < lengths[:, None], first[:, None] + offset, -1))
