"""What a learner minimises: one small class per objective, all with the same three methods.

An objective turns a table into micro-batches and a micro-batch into a loss.
The mathematics is in :mod:`rlhf_dist.algorithms`; here it meets the columns.

Every loss, and every metric, is a sum over the micro-batch divided by the
*global* total of the optimizer step. They therefore just add up, over
micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rlhf_dist.algorithms.kl import kl_estimate
from rlhf_dist.algorithms.losses import aggregate, ppo_policy_loss, value_loss
from rlhf_dist.algorithms.preferences import pairwise_loss
from rlhf_dist.algorithms.supervised import sft_loss
from rlhf_dist.config import AlgoConfig
from rlhf_dist.data.batching import Batch, Ragged, collate, collate_pairs, pair_lengths, sequence_lengths

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Totals:
    """Global counts of one optimizer step, over all ranks and micro-batches."""

    tokens: int
    sequences: int


class Objective(Protocol):
    """See the module's docstring."""

    def lengths(self, table: pa.Table) -> np.ndarray:
        """Tokens that each row costs."""

    def totals(self, table: pa.Table, rows: np.ndarray) -> Totals: ...

    def collate(self, table: pa.Table, rows: Sequence[int], pad_id: int, packing: bool) -> Batch: ...

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]: ...


class _Sequences:
    """Shared by the objectives whose rows are prompt and response."""

    columns: tuple[str, ...] = ()

    def lengths(self, table: pa.Table) -> np.ndarray:
        return sequence_lengths(table)

    def totals(self, table: pa.Table, rows: np.ndarray) -> Totals:
        if "response_mask" in table.column_names:
            masks = Ragged.of(table, "response_mask")
            counts = np.add.reduceat(np.append(masks.values, 0).astype(np.int64), masks.offsets[:-1])
            counts[masks.lengths == 0] = 0  # reduceat repeats a value for an empty row
        else:
            counts = Ragged.of(table, "response_ids").lengths
        return Totals(max(1, int(counts[rows].sum())), len(rows))

    def collate(self, table: pa.Table, rows: Sequence[int], pad_id: int, packing: bool) -> Batch:
        present = [c for c in self.columns if c in table.column_names]
        return collate(table, rows, present, pad_id, packing)


def _mean(x: Tensor, batch: Batch, totals: Totals) -> Tensor:
    """Share of this micro-batch in the mean over all trained tokens."""
    return torch.where(batch.mask, x, 0.0).sum().detach() / totals.tokens


class SFTObjective(_Sequences):
    """Cross entropy on the response's tokens."""

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        logprobs, _ = module(batch)
        per_token, _ = sft_loss(logprobs, batch.mask)
        loss = per_token.sum() / totals.tokens
        return loss, {"loss": loss.detach()}


class PolicyObjective(_Sequences):
    """Clipped policy gradient with entropy bonus and, if asked for, the KL in the loss."""

    columns = ("old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages")

    def __init__(self, algo: AlgoConfig, max_response_length: int) -> None:
        self.algo = algo
        self.max_response_length = max_response_length

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        algo, c = self.algo, batch.columns
        logprobs, entropy = module(batch, entropy=True)
        per_token, parts = ppo_policy_loss(
            logprobs,
            c["old_logprobs"],
            c["advantages"],
            batch.mask,
            eps_clip=algo.eps_clip,
            eps_clip_high=algo.eps_clip_high,
            dual_clip=algo.dual_clip,
        )
        metrics = {
            "policy_loss": _mean(per_token, batch, totals),
            "entropy": _mean(entropy, batch, totals),
            **{name: _mean(parts[name], batch, totals) for name in ("clip_frac", "ppo_kl")},
        }
        per_token = per_token - algo.entropy_coef * entropy
        if "ref_logprobs" in c:
            metrics["kl"] = _mean(kl_estimate(logprobs, c["ref_logprobs"], "k3"), batch, totals)
            if algo.use_kl_loss:
                per_token = per_token + algo.kl_coef * kl_estimate(logprobs, c["ref_logprobs"], algo.kl_estimator)
        loss = aggregate(
            per_token, batch.mask, algo.loss_aggregation, totals.tokens, totals.sequences, self.max_response_length
        )
        return loss, {**metrics, "loss": loss.detach()}


class CriticObjective(_Sequences):
    """Clipped value loss."""

    columns = ("values", "returns")

    def __init__(self, algo: AlgoConfig) -> None:
        self.algo = algo

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        old, returns = batch.columns["values"], batch.columns["returns"]
        per_token, parts = value_loss(module(batch), old, returns, batch.mask, value_clip=self.algo.value_clip)
        loss = torch.where(batch.mask, per_token, 0.0).sum() / totals.tokens
        # Moments of returns and residuals: explained variance is 1 - var(residual) / var(returns).
        residual = returns - old
        moments = {"_r1": returns, "_r2": returns**2, "_e1": residual, "_e2": residual**2}
        return loss, {
            "value_loss": loss.detach(),
            "value_clip_frac": _mean(parts["value_clip_frac"], batch, totals),
            "value_mean": _mean(old, batch, totals),
            **{name: _mean(x, batch, totals) for name, x in moments.items()},
        }


class PairwiseObjective:
    """Bradley-Terry loss of the reward model; both sides of a pair share a micro-batch."""

    def lengths(self, table: pa.Table) -> np.ndarray:
        return pair_lengths(table)

    def totals(self, table: pa.Table, rows: np.ndarray) -> Totals:
        return Totals(tokens=len(rows), sequences=len(rows))

    def collate(self, table: pa.Table, rows: Sequence[int], pad_id: int, packing: bool) -> Batch:
        batch = collate_pairs(table, rows, pad_id, packing)
        batch.columns["margin"] = torch.tensor([table["margin"][r].as_py() for r in rows], dtype=torch.float32)
        return batch

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        scores = module(batch).reshape(-1)[batch.last]
        if not batch.rows:  # a dummy; see PolicyModule
            zero = 0.0 * scores.sum()
            return zero, {name: zero.detach() for name in ("loss", "accuracy", "margin")}
        per_pair, parts = pairwise_loss(scores[0::2], scores[1::2], batch.columns["margin"])
        loss = per_pair.sum() / totals.sequences
        means = {name: parts[name].sum().detach() / totals.sequences for name in ("accuracy", "margin")}
        return loss, {"loss": loss.detach(), **means}
