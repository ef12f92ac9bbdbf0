"""The process that sees a whole batch: joins what the stages computed, estimates advantages, summarises, writes.

Whitening and group baselines are global, so this runs over the whole batch, in
a process of its own: the driver reads no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray import ObjectRef

from rlhf_dist.actors.dispatch import Columns, RolloutBatch
from rlhf_dist.actors.group import Group, Holder, Resources, Worker
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import AlgoConfig, RewardConfig
from rlhf_dist.data.batching import Ragged
from rlhf_dist.data.experience import ScoreScale, estimate_advantages, groups_without_spread, join_batch


@ray.remote
class Experience(Worker):
    """Advantages of a batch, its figures, and its file in the run folder."""

    def __init__(
        self,
        algo: AlgoConfig,
        reward: RewardConfig,
        max_response_length: int,
        tokenizer_dir: str,
        rollout_dir: str | None,
    ) -> None:
        super().__init__("experience")
        from rlhf_dist.algorithms.kl import AdaptiveKLController, FixedKLController
        from rlhf_dist.data.tokenization import load_tokenizer

        self.algo = algo
        self.reward = reward
        self.max_response_length = max_response_length
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
        self,
        step: int,
        chunks: list[ObjectRef],
        stages: list[tuple[str, list[list[ObjectRef]]]],
        left_out: frozenset[int],
        scale: ScoreScale,
    ) -> tuple[pa.Table, dict[str, float]]:
        """The experience of one step, without the groups ``left_out``, and its figures."""
        table = self._join(chunks, stages)
        if left_out:
            table = table.filter(pc.invert(pc.is_in(table["group_id"], pa.array(sorted(left_out), pa.int64()))))
        table, metrics = estimate_advantages(
            table, self.algo, self.reward, self.kl_control.value, scale, self.max_response_length
        )
        age = step - 1 - Ragged.of(table, "policy_version").values
        metrics["train/policy_age"] = float(age.mean()) if len(age) else 0.0
        metrics["train/policy_age_max"] = float(age.max(initial=0))
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

        return summarize(self._join(chunks, stages), prompts, self.tokenizer, group_by, n_samples)

    def without_spread(self, chunks: list[ObjectRef], stages: list[tuple[str, list[list[ObjectRef]]]]) -> list[int]:
        """Groups whose scores are all equal; ``stages`` is the reward."""
        return groups_without_spread(self._join(chunks, stages))

    def _join(self, chunks: list[ObjectRef], stages: list[tuple[str, list[list[ObjectRef]]]]) -> pa.Table:
        return join_batch(ray.get(chunks), [(s, [ray.get(p) for p in parts]) for s, parts in stages])

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


class ExperienceGroup(Holder):
    """What the driver holds of the :class:`Experience` process."""

    def __init__(
        self,
        algo: AlgoConfig,
        reward: RewardConfig,
        max_response_length: int,
        tokenizer_dir: str,
        rollout_dir: str | None,
        strategy: str,
        seconds: float,
    ) -> None:
        arguments = (algo, reward, max_response_length, tokenizer_dir, rollout_dir)
        # No CPU of its own: it works for milliseconds in each step, while everybody else waits for it.
        group = Group(
            "experience", Experience, 1, Resources(cpus=0), lambda _: arguments, strategy=strategy, seconds=seconds
        )
        super().__init__(group)
        self.actor = group.actors[0]

    def build(
        self, step: int, rollouts: RolloutBatch, columns: Sequence[Columns], scale: ScoreScale
    ) -> tuple[ObjectRef, ObjectRef]:
        """References to the experience and to its figures; returns once all chunks are submitted."""
        chunks, stages = _references(rollouts, columns)
        build: Any = self.actor.build.options(num_returns=2)
        references: Any = build.remote(step, chunks, stages, rollouts.left_out, scale)
        return tuple(references)

    def without_spread(self, rollouts: RolloutBatch, scores: Columns) -> list[int]:
        """Groups of a complete batch whose scores are all equal, those left out already not among them."""
        chunks, stages = _references(rollouts, [scores])
        found = wait_for(self.actor.without_spread.remote(chunks, stages), "experience, comparing scores")
        return [group for group in found if group not in rollouts.left_out]

    def summarize(
        self, rollouts: RolloutBatch, columns: Sequence[Columns], prompts: ObjectRef, group_by: str | None, n: int
    ) -> dict[str, Any]:
        chunks, stages = _references(rollouts, columns)
        return wait_for(self.actor.summarize.remote(chunks, stages, prompts, group_by, n), "experience, summarising")

    def flush(self) -> None:
        wait_for(self.actor.flush.remote(), "experience, writing rollouts")


def _references(
    rollouts: RolloutBatch, columns: Sequence[Columns]
) -> tuple[list[ObjectRef], list[tuple[str, list[list[ObjectRef]]]]]:
    """References nested in lists: Ray then passes them on instead of fetching them first."""
    return [c.table for c in rollouts.chunks], [(c.stage, c.parts) for c in columns]
