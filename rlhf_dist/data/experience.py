"""From what the stages computed to what the learners read: joined columns, shaped scores, advantages, figures.

Tables in, tables out; :class:`~rlhf_dist.actors.experience.Experience` runs it over one whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_dist import schema
from rlhf_dist.config import AlgoConfig, RewardConfig
from rlhf_dist.config.base import load_function
from rlhf_dist.data.ragged import Ragged


@dataclass(frozen=True)
class ScoreScale:
    """Mean and standard deviation of the scores of the initial policy (``reward.normalize``)."""

    mean: float = 0.0
    std: float = 1.0


def join(chunk: pa.Table, parts: Sequence[pa.Table], stage: str) -> pa.Table:
    """``chunk`` with the columns of ``parts``, whose ``row`` says where each of their rows belongs.

    Raises:
        ValueError: the parts do not cover every row exactly once.
    """
    columns = pa.concat_tables(parts) if len(parts) > 1 else parts[0]
    rows = columns["row"].to_numpy()
    order = np.argsort(rows, kind="stable")
    if not np.array_equal(rows[order], np.arange(chunk.num_rows)):
        raise ValueError(f"{stage} returned rows {rows.tolist()[:8]}... for a chunk of {chunk.num_rows} rows")
    columns = columns.drop_columns("row")
    return schema.with_columns(
        chunk, columns if np.array_equal(order, np.arange(len(order))) else columns.take(order), stage
    )


def take(table: pa.Table, rows: np.ndarray | None) -> pa.Table:
    """``rows`` of ``table``; None: all, without a copy."""
    return table if rows is None else table.take(pa.array(rows))


@dataclass(frozen=True)
class Joinable:
    """The rows of one chunk that belong to a batch, and what the stages computed for them."""

    chunk: pa.Table
    rows: np.ndarray | None
    """None: all of the chunk."""
    whole: dict[str, list[pa.Table]]
    """Parts of columns for the whole chunk, by stage."""
    sliced: dict[str, list[pa.Table]]
    """Parts of columns for ``rows`` alone, by stage."""

    def join(self, columns: Sequence[str] | None) -> pa.Table:
        chunk = self.chunk if columns is None else self.chunk.select(columns)
        for stage, parts in self.whole.items():
            chunk = join(chunk, parts, stage)
        chunk = take(chunk, self.rows)
        for stage, parts in self.sliced.items():
            chunk = join(chunk, parts, stage)
        return chunk


def join_batch(parts: Sequence[Joinable], columns: Sequence[str] | None = None) -> pa.Table:
    """All parts of a batch with the columns of all stages, in the order of the prompt stream.

    Args:
        columns: of the chunks, those that are wanted; default: all.
    """
    table = pa.concat_tables([part.join(columns) for part in parts], promote_options="permissive")
    return table.sort_by([("group_id", "ascending"), ("sample_index", "ascending")])


def groups_without_reward(table: pa.Table) -> list[int]:
    """Groups of a table with ``score`` in which a sample, or the greedy response, has none."""
    return sorted(set(table.filter(pc.is_null(table["score"]))["group_id"].to_pylist()))


def groups_without_spread(table: pa.Table) -> list[int]:
    """Groups of a table with ``score`` whose scores are all there and equal: what dynamic sampling replaces."""
    sampled = table.filter(pc.greater(table["sample_index"], schema.GREEDY))
    keep_nulls = pc.ScalarAggregateOptions(skip_nulls=False)
    spread = sampled.group_by("group_id").aggregate([("score", "min", keep_nulls), ("score", "max", keep_nulls)])
    equal = spread.filter(pc.equal(spread["score_min"], spread["score_max"]))
    return sorted(equal["group_id"].to_pylist())


def estimate_advantages(
    table: pa.Table,
    algo: AlgoConfig,
    reward: RewardConfig,
    kl_coef: float,
    scale: ScoreScale,
    max_response_length: int,
) -> tuple[pa.Table, dict[str, float]]:
    """Add ``rewards``, ``advantages`` and, for the critic, ``returns`` to a batch; returns it with the step's figures.

    In order: shape the scores, take greedy responses out, put the KL into the reward, estimate, whiten, mask what
    was cut off.

    Raises:
        ValueError: a sample has no score.
    """
    import torch

    from rlhf_dist.algorithms import advantages as adv
    from rlhf_dist.algorithms import registry
    from rlhf_dist.algorithms.kl import kl_estimate, token_rewards

    if lacking := groups_without_reward(table):
        raise ValueError(
            f"experience: column 'score' has {table['score'].null_count} null values, in groups {lacking[:8]}: "
            "what has no reward cannot be trained"
        )
    if algo.old_logprobs == "sampler":
        table = table.append_column("old_logprobs", table["rollout_logprobs"])
    shaped = torch.from_numpy(shape_scores(table, reward, scale, max_response_length))
    table, shaped, greedy_scores = _without_greedy(table, shaped)
    padded = _Padded(table)
    mask = padded["response_mask"].bool()
    # Without π_old, which the update computes, the KL is only reported: that of the policy that sampled.
    old = padded["old_logprobs" if "old_logprobs" in table.column_names else "rollout_logprobs"]
    kl = torch.zeros_like(old)
    metrics = _figures(table, padded, shaped)
    if "ref_logprobs" in table.column_names:
        ref = padded["ref_logprobs"]
        kl = kl_estimate(old, ref, algo.kl_estimator)
        metrics["rollout/kl"] = float(torch.where(mask, old - ref, 0.0).sum() / table.num_rows)

    group_id = torch.from_numpy(table["group_id"].to_numpy().copy())
    rewards = token_rewards(shaped, kl, mask, 0.0 if algo.use_kl_loss else kl_coef)
    terms = registry.RewardTerms(
        rewards=rewards,
        scores=shaped,
        mask=mask,
        group_id=group_id,
        values=padded["values"] if "values" in table.column_names else None,
        greedy_scores=greedy_scores,
        gamma=algo.gamma,
        gae_lambda=algo.gae_lambda,
    )
    name = algo.advantage_estimator
    estimate = registry.ADVANTAGE_ESTIMATORS.get(name) or load_function(name)
    advantages, returns = estimate(terms)
    if algo.whitens:
        advantages = adv.whiten(advantages, mask)
    if len(group_id.unique()) < len(group_id):
        scores = torch.from_numpy(table["score"].to_numpy().copy())
        metrics["rollout/zero_std_groups"] = float(adv.zero_std_groups(scores, group_id))
    columns = {"rewards": rewards, "advantages": advantages} | ({} if returns is None else {"returns": returns})
    table = schema.with_columns(
        table, pa.table({name: padded.to_arrow(x) for name, x in columns.items()}), "advantages"
    )
    if algo.mask_truncated:
        table = _mask_truncated(table)
    return schema.check(table, schema.EXPERIENCE, "experience"), metrics


def ages(table: pa.Table, version: int, recomputed: bool = True) -> dict[str, float]:
    """How old the trained tokens are, in policy versions, and how far the learner is from who sampled them.

    Args:
        version: of the policy that is about to be updated.
        recomputed: whether ``old_logprobs`` are there and that policy's, so that the gap is known before the update.
    """
    trained = Ragged.of(table, "response_mask").values.astype(bool)
    age = version - Ragged.of(table, "policy_version").values[trained]
    metrics = {
        "train/policy_age": float(age.mean()) if len(age) else 0.0,
        "train/policy_age_max": float(age.max(initial=0)),
    }
    if recomputed:
        gap = np.abs(Ragged.of(table, "old_logprobs").values - Ragged.of(table, "rollout_logprobs").values)[trained]
        metrics["train/rollout_logprob_abs_diff"] = float(gap.mean()) if len(gap) else 0.0
        metrics["train/rollout_logprob_abs_diff_max"] = float(gap.max(initial=0))
    if len(by_age := np.unique(age)) > 1:
        for a in by_age:
            metrics[f"train/policy_age_share/age_{a}"] = float((age == a).mean())
            if recomputed:
                metrics[f"train/rollout_logprob_abs_diff/age_{a}"] = float(gap[age == a].mean())
    return metrics


def shape_scores(table: pa.Table, reward: RewardConfig, scale: ScoreScale, max_response_length: int) -> np.ndarray:
    """Normalised and clipped scores, less the penalties for length and for a missing end of text: ``[B]`` float32."""
    scores = table["score"].to_numpy().astype(np.float32)
    if reward.normalize:
        scores = (scores - scale.mean) / max(scale.std, 1e-6)
    if reward.clip is not None:
        scores = scores.clip(-reward.clip, reward.clip)
    if reward.soft_overlong_cache is not None:
        import torch

        from rlhf_dist.algorithms.losses import soft_overlong_penalty

        lengths = torch.from_numpy(Ragged.of(table, "response_ids").lengths)
        scores = scores + soft_overlong_penalty(lengths, max_response_length, reward.soft_overlong_cache).numpy()
    return (scores - reward.missing_eos_penalty * _truncated(table)).astype(np.float32)


class _Padded:
    """Columns with one element per response token as ``[B, T]`` tensors, and back."""

    def __init__(self, table: pa.Table) -> None:
        import torch

        self.table = table
        self.lengths = Ragged.of(table, "response_ids").lengths
        self.present = torch.arange(int(self.lengths.max(initial=1)))[None] < torch.from_numpy(self.lengths)[:, None]

    def __getitem__(self, column: str) -> Any:
        import torch

        values = torch.from_numpy(Ragged.of(self.table, column).values.astype(np.float32))
        return torch.zeros(self.present.shape).masked_scatter(self.present, values)

    def to_arrow(self, x: Any) -> pa.Array:
        return Ragged.to_arrow(x[self.present].float().numpy(), self.lengths).cast(pa.list_(pa.float32()))


def _without_greedy(table: pa.Table, shaped: Any) -> tuple[pa.Table, Any, Any]:
    """The sampled rows and their scores; and for each the score of its group's greedy response, if there are any."""
    import torch

    sampled = table["sample_index"].to_numpy() > schema.GREEDY
    if sampled.all():
        return table, shaped, None
    group_id = table["group_id"].to_numpy()
    # The batch is sorted by group, so the groups of the greedy rows are too.
    place = np.searchsorted(group_id[~sampled], group_id[sampled])
    greedy_scores = shaped[torch.from_numpy(~sampled)][torch.from_numpy(place)]
    return table.filter(pa.array(sampled)), shaped[torch.from_numpy(sampled)], greedy_scores


def _mask_truncated(table: pa.Table) -> pa.Table:
    """``response_mask`` 0 on responses that were cut off. After whitening, whose mean must not depend on it."""
    masks = Ragged.of(table, "response_mask")
    kept = masks.values * np.repeat(~_truncated(table), masks.lengths).astype(np.uint8)
    i = table.column_names.index("response_mask")
    return table.set_column(i, table.schema.field(i), Ragged.to_arrow(kept, masks.lengths))


def _truncated(table: pa.Table) -> np.ndarray:
    return pc.equal(table["finish_reason"].cast(pa.string()), "length").to_numpy(zero_copy_only=False)


def _figures(table: pa.Table, padded: _Padded, shaped: Any) -> dict[str, float]:
    scores, lengths = table["score"].to_numpy(), padded.lengths
    metrics = {
        "rollout/reward_mean": float(scores.mean()),
        "rollout/reward_std": float(scores.std()),
        "rollout/shaped_reward_mean": float(shaped.mean()),
        "rollout/response_length_mean": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/truncated_rate": float(_truncated(table).mean()),
    }
    for name in table.column_names:
        if name.startswith("score/"):
            metrics[f"rollout/{name}"] = float(np.mean(table[name].to_numpy()))
    return metrics
