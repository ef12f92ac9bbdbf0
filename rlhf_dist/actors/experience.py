"""Joins what the stages computed, estimates advantages, summarises: the one place that sees a whole batch.

Whitening and group baselines are global, so this runs over the whole batch, in
a process of its own: the driver reads no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from rlhf_dist import schema
from rlhf_dist.actors.dispatch import Columns, RolloutBatch
from rlhf_dist.actors.group import Group, Resources, Worker
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import AlgoConfig, RewardConfig
from rlhf_dist.data.batching import Ragged
from rlhf_dist.observability.trace import Span


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


def join_batch(chunks: Sequence[pa.Table], stages: Sequence[tuple[str, Sequence[Sequence[pa.Table]]]]) -> pa.Table:
    """All chunks with the columns of all stages, in the order of the prompt stream."""
    joined = []
    for i, chunk in enumerate(chunks):
        for stage, parts in stages:
            chunk = join(chunk, parts[i], stage)
        joined.append(chunk)
    table = pa.concat_tables(joined, promote_options="permissive")
    return table.sort_by([("group_id", "ascending"), ("sample_index", "ascending")])


@ray.remote
class Experience(Worker):
    """Advantages of a batch, its figures, and its file in the run folder."""

    def __init__(self, algo: AlgoConfig, reward: RewardConfig, tokenizer_dir: str, rollout_dir: str | None) -> None:
        super().__init__("experience")
        from rlhf_dist.algorithms.kl import AdaptiveKLController, FixedKLController
        from rlhf_dist.data.tokenization import load_tokenizer

        self.algo = algo
        self.reward = reward
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self.rollout_dir = Path(rollout_dir) if rollout_dir else None
        self.kl_control = (
            AdaptiveKLController(algo.kl_coef, algo.kl_target, algo.kl_horizon)
            if algo.kl_target is not None
            else FixedKLController(algo.kl_coef)
        )
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def build(
        self, step: int, chunks: list[ObjectRef], stages: list[tuple[str, list[list[ObjectRef]]]], scale: ScoreScale
    ) -> tuple[pa.Table, dict[str, float]]:
        """The experience of one step and its figures."""
        table = join_batch(ray.get(chunks), [(s, [ray.get(p) for p in parts]) for s, parts in stages])
        table, metrics = estimate_advantages(table, self.algo, self.reward, self.kl_control.value, scale)
        metrics["train/kl_coef"] = self.kl_control.value
        if "rollout/kl" in metrics:
            self.kl_control.update(metrics["rollout/kl"], table.num_rows)
        self._write(step, table)
        return table, metrics

    def summarize(
        self,
        chunks: list[ObjectRef],
        stages: list[tuple[str, list[list[ObjectRef]]]],
        prompts: pa.Table,
        group_by: str | None,
        n_samples: int,
    ) -> dict[str, Any]:
        """Figures of an evaluation: see :func:`rlhf_dist.evaluation.summary.summarize`."""
        from rlhf_dist.evaluation.summary import summarize

        table = join_batch(ray.get(chunks), [(s, [ray.get(p) for p in parts]) for s, parts in stages])
        return summarize(table, prompts, self.tokenizer, group_by, n_samples)

    def _write(self, step: int, table: pa.Table) -> None:
        """rollouts/step_N.parquet, with the texts; written beside the next step."""
        if self.rollout_dir is None:
            return
        self.flush()
        self._writing = self._writer.submit(self._write_now, self.rollout_dir, step, table)

    def _write_now(self, folder: Path, step: int, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        folder.mkdir(parents=True, exist_ok=True)
        for name in ("response", "prompt"):
            texts = self.tokenizer.batch_decode(table[f"{name}_ids"].to_pylist())
            table = table.add_column(0, name, pa.array(texts))
        path = folder / f"step_{step:06d}.parquet"
        pq.write_table(table, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    def flush(self) -> None:
        """Wait until the last file is written; raises what went wrong there."""
        if self._writing is not None:
            self._writing.result()


def estimate_advantages(
    table: pa.Table, algo: AlgoConfig, reward: RewardConfig, kl_coef: float, scale: ScoreScale
) -> tuple[pa.Table, dict[str, float]]:
    """Add ``rewards``, ``advantages`` and ``returns`` to a joined batch; returns it with the step's figures.

    The steps, in order: normalise and clip the score, subtract the penalty for
    a missing end of text, put the KL into the reward, estimate, whiten.
    """
    import torch

    from rlhf_dist.algorithms import ADVANTAGE_ESTIMATORS
    from rlhf_dist.algorithms import advantages as adv
    from rlhf_dist.algorithms.kl import kl_estimate, token_rewards

    lengths = Ragged.of(table, "response_ids").lengths
    present = torch.arange(int(lengths.max(initial=1)))[None] < torch.from_numpy(lengths)[:, None]

    def padded(column: str) -> torch.Tensor:
        values = torch.from_numpy(Ragged.of(table, column).values.astype(np.float32))
        return torch.zeros(present.shape).masked_scatter(present, values)

    mask = padded("response_mask").bool()
    scores = torch.from_numpy(table["score"].to_numpy().astype(np.float32))
    truncated = torch.from_numpy(
        pc.equal(table["finish_reason"].cast(pa.string()), "length").to_numpy(zero_copy_only=False).copy()
    )
    shaped = (scores - scale.mean) / max(scale.std, 1e-6) if reward.normalize else scores
    shaped = shaped.clamp(-reward.clip, reward.clip) if reward.clip is not None else shaped
    shaped = shaped - reward.missing_eos_penalty * truncated

    old = padded("old_logprobs")
    kl = torch.zeros_like(old)
    metrics: dict[str, float] = {}
    if "ref_logprobs" in table.column_names:
        ref = padded("ref_logprobs")
        kl = kl_estimate(old, ref, algo.kl_estimator)
        metrics["rollout/kl"] = float(torch.where(mask, old - ref, 0.0).sum() / len(lengths))
    rewards = token_rewards(shaped, kl, mask, 0.0 if algo.use_kl_loss else kl_coef)

    group_id = torch.from_numpy(table["group_id"].to_numpy().copy())
    values = padded("values") if "values" in table.column_names else None
    advantages, returns = _estimate(algo, rewards, values, mask, group_id)
    metrics |= _figures(table, scores, shaped, truncated, lengths, mask, old, padded("rollout_logprobs"))
    if algo.advantage_estimator in ADVANTAGE_ESTIMATORS:
        metrics["rollout/zero_std_groups"] = float(adv.zero_std_groups(scores, group_id))
    columns = {
        name: Ragged.to_arrow(x[present].float().numpy(), lengths).cast(pa.list_(pa.float32()))
        for name, x in (("rewards", rewards), ("advantages", advantages), ("returns", returns))
    }
    return schema.check(
        schema.with_columns(table, pa.table(columns), "advantages"), schema.EXPERIENCE, "experience"
    ), metrics


def _estimate(algo: AlgoConfig, rewards: Any, values: Any, mask: Any, group_id: Any) -> tuple[Any, Any]:
    """``(advantages, returns)``, each ``[B, T]``. Group estimators compare the samples' total rewards."""
    from rlhf_dist.algorithms import ADVANTAGE_ESTIMATORS
    from rlhf_dist.algorithms import advantages as adv

    if algo.advantage_estimator == "gae":
        advantages, returns = adv.gae(rewards, values, mask, algo.gamma, algo.gae_lambda)
        return (adv.whiten(advantages, mask) if algo.whiten_advantages else advantages), returns
    if algo.advantage_estimator == "reinforce":
        returns = adv.reward_to_go(rewards, mask, algo.gamma)
        return (adv.whiten(returns, mask) if algo.whiten_advantages else returns), returns
    totals = rewards.sum(1)
    estimator = ADVANTAGE_ESTIMATORS[algo.advantage_estimator]
    return adv.broadcast(estimator(totals, group_id), mask), adv.broadcast(totals, mask)


def _figures(
    table: pa.Table, scores: Any, shaped: Any, truncated: Any, lengths: np.ndarray, mask: Any, old: Any, rollout: Any
) -> dict[str, float]:
    difference = (old - rollout).abs()[mask]
    metrics = {
        "rollout/reward_mean": float(scores.mean()),
        "rollout/reward_std": float(scores.std(correction=0)),
        "rollout/shaped_reward_mean": float(shaped.mean()),
        "rollout/response_length_mean": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/truncated_rate": float(truncated.float().mean()),
        "train/rollout_logprob_abs_diff": float(difference.mean()) if len(difference) else 0.0,
        "train/rollout_logprob_abs_diff_max": float(difference.max()) if len(difference) else 0.0,
    }
    for name in table.column_names:
        if name.startswith("score/"):
            metrics[f"rollout/{name}"] = float(np.mean(table[name].to_numpy()))
    return metrics


class ExperienceGroup:
    """What the driver holds of the :class:`Experience` process."""

    def __init__(
        self,
        algo: AlgoConfig,
        reward: RewardConfig,
        tokenizer_dir: str,
        rollout_dir: str | None,
        strategy: str,
        seconds: float,
    ) -> None:
        arguments = (algo, reward, tokenizer_dir, rollout_dir)
        # No CPU of its own: it works for milliseconds in each step, while everybody else waits for it.
        self.group = Group(
            "experience", Experience, 1, Resources(cpus=0), lambda _: arguments, strategy=strategy, seconds=seconds
        )

    @property
    def actor(self) -> ActorHandle:
        return self.group.actors[0]

    def wait_ready(self) -> list[Any]:
        return self.group.wait_ready()

    def build(
        self, step: int, rollouts: RolloutBatch, columns: Sequence[Columns], scale: ScoreScale
    ) -> tuple[ObjectRef, ObjectRef]:
        """References to the experience and to its figures; returns once all chunks are submitted."""
        chunks, stages = _references(rollouts, columns)
        references: Any = self.actor.build.options(num_returns=2).remote(step, chunks, stages, scale)
        return tuple(references)

    def summarize(
        self, rollouts: RolloutBatch, columns: Sequence[Columns], prompts: ObjectRef, group_by: str | None, n: int
    ) -> dict[str, Any]:
        chunks, stages = _references(rollouts, columns)
        return wait_for(self.actor.summarize.remote(chunks, stages, prompts, group_by, n), "experience, summarising")

    def flush(self) -> None:
        wait_for(self.actor.flush.remote(), "experience, writing rollouts")

    def spans(self) -> list[Span]:
        return self.group.spans()

    def release(self) -> None:
        self.group.release()


def _references(
    rollouts: RolloutBatch, columns: Sequence[Columns]
) -> tuple[list[ObjectRef], list[tuple[str, list[list[ObjectRef]]]]]:
    """References nested in lists: Ray then passes them on instead of fetching them first."""
    return [c.table for c in rollouts.chunks], [(c.stage, c.parts) for c in columns]
