"""What a learner minimises: one small class per objective, all with the same three methods.

An objective turns a table into micro-batches and a micro-batch into a loss.
The mathematics is in :mod:`rlhf_dist.algorithms`; here it meets the columns.

Every loss, and every metric, is a sum over the micro-batch divided by the
*global* total of the optimizer step. They therefore just add up, over
micro-batches and ranks (``data.shares``); a metric NAME_max is the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rlhf_dist.algorithms import registry
from rlhf_dist.algorithms.kl import k3_clamped, kl_estimate
from rlhf_dist.algorithms.losses import aggregate, value_loss
from rlhf_dist.algorithms.masking import masked
from rlhf_dist.algorithms.preferences import dpo_loss, ipo_loss, kwise_loss, pairwise_loss
from rlhf_dist.algorithms.supervised import sft_loss
from rlhf_dist.config import CORRECTION_BOUNDS, AlgoConfig, DPOConfig
from rlhf_dist.config.base import load_function
from rlhf_dist.data.batching import (
    Batch,
    collate,
    collate_pairs,
    collate_rankings,
    pair_lengths,
    ranking_lengths,
    sequence_lengths,
)
from rlhf_dist.data.ragged import Ragged

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Totals:
    """Global counts of one optimizer step, over all ranks and micro-batches."""

    tokens: int
    sequences: int


class Objective(Protocol):
    """See the module's docstring."""

    def lengths(self, table: pa.Table, rows: np.ndarray) -> np.ndarray:
        """Tokens that each of ``rows`` costs."""

    def totals(self, table: pa.Table, rows: np.ndarray) -> Totals: ...

    def collate(self, table: pa.Table, rows: Sequence[int], pad_id: int, packing: bool) -> Batch: ...

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]: ...


class _Sequences:
    """Shared by the objectives whose rows are prompt and response."""

    columns: tuple[str, ...] = ()

    def lengths(self, table: pa.Table, rows: np.ndarray) -> np.ndarray:
        return sequence_lengths(table, rows)

    def totals(self, table: pa.Table, rows: np.ndarray) -> Totals:
        if "response_mask" in table.column_names:
            masks = Ragged.of(table, "response_mask")
            tokens = sum(int(masks[row].sum()) for row in rows)
        else:
            tokens = int(Ragged.of(table, "response_ids").lengths_of(rows).sum())
        return Totals(max(1, tokens), len(rows))

    def collate(self, table: pa.Table, rows: Sequence[int], pad_id: int, packing: bool) -> Batch:
        present = [c for c in self.columns if c in table.column_names]
        return collate(table, rows, present, pad_id, packing)


def _mean(x: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    """Share of this micro-batch in the mean over all trained tokens."""
    return masked(x.detach(), mask).sum() / totals.tokens


class SFTObjective(_Sequences):
    """Cross entropy on the response's tokens: of demonstrations, or of pretraining text beside PPO (PPO-ptx)."""

    def __init__(self, coef: float = 1.0, metric: str = "loss") -> None:
        self.coef = coef
        self.metric = metric

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        # The sampling temperature of PPO has no meaning for text that was not sampled.
        logprobs, _ = module(batch, temperature=1.0)
        per_token, _ = sft_loss(logprobs, batch.mask)
        loss = per_token.sum() / totals.tokens
        return self.coef * loss, {self.metric: loss.detach()}


class DistillObjective(_Sequences):
    """KL from the teacher to the student at every response token, over the teacher's likely tokens and the rest."""

    def collate(self, table: pa.Table, rows: Sequence[int], pad_id: int, packing: bool) -> Batch:
        batch = collate(table, rows, (), pad_id, packing)
        for name, dtype in (("teacher_ids", np.int64), ("teacher_logprobs", np.float32)):
            column = Ragged.of(table, name)
            flat = np.concatenate([np.empty(0, dtype), *(column[row].astype(dtype) for row in rows)])
            tokens = int(batch.response.sum())  # in the order of the rows, as the response tokens lie in the batch
            batch.columns[name] = torch.from_numpy(flat).view(tokens, len(flat) // max(1, tokens))
        return batch

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        teacher = (batch.columns["teacher_ids"], batch.columns["teacher_logprobs"])
        per_token, _ = module(batch, teacher=teacher)
        loss = per_token.sum() / totals.tokens
        return loss, {"loss": loss.detach()}


class PolicyObjective(_Sequences):
    """The policy loss of the config, with correction for the sampler, entropy bonus and the KL in the loss."""

    columns = ("old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages")

    def __init__(self, algo: AlgoConfig, max_response_length: int) -> None:
        self.algo = algo
        self.max_response_length = max_response_length
        self.policy_loss = registry.POLICY_LOSSES.get(algo.policy_loss) or load_function(algo.policy_loss)
        self.correction = registry.CORRECTIONS.get(algo.rollout_correction)
        self.bounds = algo.correction_bounds or CORRECTION_BOUNDS.get(algo.rollout_correction, (0.0, 0.0))

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        algo = self.algo
        with_entropy = module(batch, entropy="yes" if algo.entropy_coef else "detached")
        logprobs, entropy, mask = (batch.by_row(x) for x in (*with_entropy, batch.mask))
        columns = {name: batch.by_row(x) for name, x in batch.columns.items()}
        rollout = columns["rollout_logprobs"]
        # Not computed beforehand: this pass, of the only optimizer step, is that of the policy before the update.
        old = columns.get("old_logprobs", logprobs.detach())
        per_token, parts = self.policy_loss(
            registry.PolicyTerms(
                logprobs=logprobs,
                old_logprobs=old,
                rollout_logprobs=rollout,
                advantages=columns["advantages"],
                mask=mask,
                eps_clip=algo.eps_clip,
                eps_clip_high=algo.eps_clip_high,
                dual_clip=algo.dual_clip,
            )
        )
        if self.correction is not None:
            parts["correction_weight"] = self.correction(old, rollout, mask, *self.bounds)
            per_token = per_token * parts["correction_weight"]
        parts |= {"policy_loss": per_token, "entropy": entropy}
        if algo.entropy_coef:
            per_token = per_token - algo.entropy_coef * entropy
        if "ref_logprobs" in columns:
            ref = columns["ref_logprobs"]
            parts["kl"] = kl_estimate(logprobs, ref, "k3", mask)
            parts["k3_clamped_frac"] = k3_clamped(logprobs, ref, mask)
            if algo.use_kl_loss:
                per_token = per_token + algo.kl_coef * kl_estimate(logprobs, ref, algo.kl_estimator, mask)
        loss = aggregate(
            per_token, mask, algo.loss_aggregation, totals.tokens, totals.sequences, self.max_response_length
        )
        metrics = {name: _mean(x, mask, totals) for name, x in parts.items()}
        if "old_logprobs" not in columns:
            gap = masked((old - rollout).abs(), mask)
            metrics["rollout_logprob_abs_diff"] = gap.sum() / totals.tokens
            metrics["rollout_logprob_abs_diff_max"] = gap.max() if gap.numel() else gap.sum()
        return loss, {**metrics, "loss": loss.detach()}


class CriticObjective(_Sequences):
    """Clipped value loss."""

    columns = ("values", "returns")

    def __init__(self, algo: AlgoConfig) -> None:
        self.algo = algo

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        old, returns = batch.columns["values"], batch.columns["returns"]
        per_token, parts = value_loss(module(batch), old, returns, batch.mask, value_clip=self.algo.value_clip)
        loss = masked(per_token, batch.mask).sum() / totals.tokens
        # Moments of returns and residuals: explained variance is 1 - var(residual) / var(returns).
        residual = returns - old
        moments = {"_r1": returns, "_r2": returns**2, "_e1": residual, "_e2": residual**2}
        return loss, {
            "value_loss": loss.detach(),
            "value_clip_frac": _mean(parts["value_clip_frac"], batch.mask, totals),
            "value_mean": _mean(old, batch.mask, totals),
            **{name: _mean(x, batch.mask, totals) for name, x in moments.items()},
        }


class _Pairs:
    """Shared by the objectives whose rows are comparisons; both sides of a pair share a micro-batch."""

    columns: tuple[str, ...] = ()

    def lengths(self, table: pa.Table, rows: np.ndarray) -> np.ndarray:
        return pair_lengths(table, rows)

    def totals(self, table: pa.Table, rows: np.ndarray) -> Totals:
        return Totals(tokens=len(rows), sequences=len(rows))

    def collate(self, table: pa.Table, rows: Sequence[int], pad_id: int, packing: bool) -> Batch:
        batch = collate_pairs(table, rows, pad_id, packing)
        for name in self.columns:
            batch.columns[name] = torch.tensor([table[name][r].as_py() for r in rows], dtype=torch.float32)
        return batch


def _shares(parts: Metrics, count: int) -> Metrics:
    return {name: x.sum().detach() / count for name, x in parts.items()}


class PairwiseObjective(_Pairs):
    """Bradley-Terry loss of the reward model."""

    columns = ("preference", "margin")

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        scores = module(batch).reshape(-1)[batch.last]
        if not batch.rows:  # a dummy; see PolicyModule
            zero = 0.0 * scores.sum()
            return zero, {name: zero.detach() for name in ("loss", "accuracy", "margin")}
        per_pair, parts = pairwise_loss(scores[0::2], scores[1::2], **batch.columns)
        loss = per_pair.sum() / totals.sequences
        return loss, {"loss": loss.detach(), **_shares(parts, totals.sequences)}


class KWiseObjective:
    """All pairs of a prompt's responses that were compared, at one forward for each response."""

    def lengths(self, table: pa.Table, rows: np.ndarray) -> np.ndarray:
        return ranking_lengths(table, rows)

    def totals(self, table: pa.Table, rows: np.ndarray) -> Totals:
        preferences = Ragged.of(table, "preferences")
        # A prompt of which no pair was compared does not count in the mean.
        prompts = sum(not np.isnan(preferences[row]).all() for row in rows)
        return Totals(tokens=max(1, prompts), sequences=max(1, prompts))

    def collate(self, table: pa.Table, rows: Sequence[int], pad_id: int, packing: bool) -> Batch:
        return collate_rankings(table, rows, pad_id, packing)

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        scores = module(batch).reshape(-1)[batch.last]
        if not batch.rows:  # a dummy; see PolicyModule
            zero = 0.0 * scores.sum()
            return zero, {name: zero.detach() for name in ("loss", "accuracy", "margin")}
        loss, parts = kwise_loss(scores, **batch.columns, total_prompts=totals.sequences)
        return loss, {"loss": loss.detach(), **_shares(parts, totals.sequences)}


class DPOObjective(_Pairs):
    """DPO, cDPO and IPO; the reference is the policy before the first step (see ``LearnerWorker.pair_logprobs``)."""

    columns = ("ref_chosen", "ref_rejected")

    def __init__(self, cfg: DPOConfig) -> None:
        self.cfg = cfg

    def loss(self, module: Callable, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        sums = pair_logprobs(module, batch)
        if not batch.rows:  # a dummy; see PolicyModule
            zero = sums.sum()
            names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
            return zero, {name: zero.detach() for name in names}
        terms = (sums[0::2], sums[1::2], batch.columns["ref_chosen"], batch.columns["ref_rejected"], self.cfg.beta)
        per_pair, parts = ipo_loss(*terms) if self.cfg.loss == "ipo" else dpo_loss(*terms, self.cfg.label_smoothing)
        loss = per_pair.sum() / totals.sequences
        return loss, {"loss": loss.detach(), **_shares(parts, totals.sequences)}


def pair_logprobs(module: Callable, batch: Batch) -> Tensor:
    """Log-probabilities of whole responses at temperature 1, chosen and rejected in turn: ``[2 n]``."""
    logprobs, _ = module(batch, temperature=1.0)
    return batch.by_row(masked(logprobs, batch.mask)).sum(1)
