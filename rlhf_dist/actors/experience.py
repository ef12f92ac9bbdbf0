"""The process that sees a whole batch: joins what the stages computed, estimates advantages, summarises, writes.

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

from rlhf_dist.actors.group import WATCH, Group, Holder, Resources, Worker
from rlhf_dist.actors.rollouts import Columns, RolloutBatch
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import AlgoConfig, RewardConfig
from rlhf_dist.data import parquet
from rlhf_dist.data.experience import (
    Joinable,
    ScoreScale,
    ages,
    estimate_advantages,
    groups_without_reward,
    groups_without_spread,
    join_batch,
)


@ray.remote(concurrency_groups=WATCH)  # type: ignore[call-overload]  # Ray 2.60 leaves it out of its types
class Experience(Worker):
    """Advantages of a batch, its figures, and its file in the run folder."""

    def __init__(
        self,
        algo: AlgoConfig,
        reward: RewardConfig,
        max_response_length: int,
        tokenizer_dir: str,
        max_staleness: int,
        rollout_dir: str | None,
    ) -> None:
        super().__init__("experience")
        with self.importing():
            from rlhf_dist.data.tokenization import load_tokenizer

        self.algo = algo
        self.reward = reward
        self.max_response_length = max_response_length
        self.max_staleness = max_staleness
        with self.trace.span(self.name, "start"):
            self.tokenizer = load_tokenizer(tokenizer_dir)
        self.rollout_dir = Path(rollout_dir) if rollout_dir else None
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def build(
        self, step: int, version: int, parts: list[Part], left_out: frozenset[int], scale: ScoreScale, kl_coef: float
    ) -> tuple[pa.Table, dict[str, float]]:
        """The experience of one step, without the groups ``left_out``, and its figures.

        Args:
            version: of the policy that is about to be updated.

        Raises:
            RuntimeError: a token is older than ``rollout.max_staleness``, which the ledger should have prevented.
        """
        wait_for_stages(parts)
        with self.trace.span(self.name, "fetch"):
            table = join_batch(fetch(parts))
        if left_out:
            table = table.filter(pc.invert(pc.is_in(table["group_id"], pa.array(sorted(left_out), pa.int64()))))
        recomputed = "old_logprobs" in table.column_names
        with self.trace.span(self.name, "advantages"):
            table, metrics = estimate_advantages(
                table, self.algo, self.reward, kl_coef, scale, self.max_response_length
            )
        metrics |= ages(table, version, recomputed=recomputed)
        if metrics["train/policy_age_max"] > self.max_staleness:
            raise RuntimeError(
                f"step {step}: a token is {metrics['train/policy_age_max']:.0f} versions old, "
                f"rollout.max_staleness is {self.max_staleness}"
            )
        metrics["train/kl_coef"] = kl_coef
        self._write(step, table)
        return table, metrics

    def summarize(
        self,
        parts: list[Part],
        prompts: pa.Table,
        group_by: str | None,
        n_samples: int,
        best_of_n: Sequence[int],
    ) -> dict[str, Any]:
        """Figures of an evaluation: see :func:`rlhf_dist.evaluation.summary.summarize`."""
        from rlhf_dist.evaluation.summary import summarize

        return summarize(join_batch(fetch(parts)), prompts, self.tokenizer, group_by, n_samples, best_of_n)

    def unfit(self, parts: list[Part]) -> tuple[list[int], list[int]]:
        """Groups without a reward, and groups whose scores are all equal; the only stage of ``parts`` is the reward."""
        table = join_batch(fetch(parts), ["group_id", "sample_index"])
        return groups_without_reward(table), groups_without_spread(table)

    def _write(self, step: int, table: pa.Table) -> None:
        """rollouts/step_N.parquet, with the texts; written beside the next step."""
        if self.rollout_dir is None:
            return
        self.flush()
        _file(self.rollout_dir, step).unlink(missing_ok=True)  # of a step that a fault took back
        self._writing = self._writer.submit(self._write_now, self.rollout_dir, step, table)

    def _write_now(self, folder: Path, step: int, table: pa.Table) -> None:
        for name in ("response", "prompt"):
            texts = self.tokenizer.batch_decode(table[f"{name}_ids"].to_pylist())
            table = table.add_column(0, name, pa.array(texts))
        parquet.write(table, _file(folder, step))

    def ensure_written(self, step: int, table: pa.Table) -> None:
        """The file of a step is there when this returns, also where the process died that began to write it."""
        self.flush()
        if self.rollout_dir is not None and not _file(self.rollout_dir, step).exists():
            self._write_now(self.rollout_dir, step, table)

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
        max_staleness: int,
        rollout_dir: str | None,
        strategy: str,
        seconds: float,
    ) -> None:
        arguments = (algo, reward, max_response_length, tokenizer_dir, max_staleness, rollout_dir)
        # No CPU of its own: it works for milliseconds in each step, while everybody else waits for it.
        group = Group(
            "experience",
            Experience,
            1,
            Resources(cpus=0),
            lambda _: arguments,
            strategy=strategy,
            seconds=seconds,
            ray_restarts=True,
        )
        super().__init__(group)
        self.actor = group.actors[0]
        self._last: tuple[int, ObjectRef] | None = None

    def build(
        self,
        step: int,
        version: int,
        rollouts: RolloutBatch,
        columns: Sequence[Columns],
        scale: ScoreScale,
        kl_coef: float,
    ) -> tuple[ObjectRef, ObjectRef]:
        """References to the experience and to its figures; returns at once."""
        build: Any = self.actor.build.options(num_returns=2)
        parts = references(rollouts, columns)
        if self._last is not None:
            self.actor.ensure_written.remote(*self._last)
        batch, figures = build.remote(step, version, parts, rollouts.left_out, scale, kl_coef)
        self._last = (step, batch)
        return batch, figures

    def unfit(self, rollouts: RolloutBatch, scores: Columns) -> tuple[list[int], list[int]]:
        """Groups of a complete batch in which a sample has no reward, and those whose scores are all equal; without
        those left out already."""
        parts = references(rollouts, [scores])
        found = wait_for(self.actor.unfit.remote(parts), "experience, comparing scores")
        without_reward, equal = ([g for g in groups if g not in rollouts.left_out] for groups in found)
        return without_reward, equal

    def summarize(
        self,
        rollouts: RolloutBatch,
        columns: Sequence[Columns],
        prompts: ObjectRef,
        group_by: str | None,
        n: int,
        best_of_n: Sequence[int] = (),
    ) -> dict[str, Any]:
        parts = references(rollouts, columns)
        call: ObjectRef = self.actor.summarize.remote(parts, prompts, group_by, n, best_of_n)
        return wait_for(call, "experience, summarising")

    def flush(self) -> None:
        """Wait until every batch is in its file."""
        if self._last is not None:
            wait_for(self.actor.ensure_written.remote(*self._last), "experience, writing rollouts")


def _file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.parquet"


@dataclass(frozen=True)
class Part:
    """One slice of a batch: references to its chunk and to what every stage computed.

    References inside an object are passed on by Ray, not fetched first: the driver need not wait for the stages.
    """

    table: ObjectRef
    rows: np.ndarray | None
    whole: dict[str, list[ObjectRef]]
    """Columns of the whole chunk, by stage."""
    sliced: dict[str, list[ObjectRef]]
    """Columns of ``rows``, by stage."""


def references(rollouts: RolloutBatch, columns: Sequence[Columns]) -> list[Part]:
    """What the experience process reads of a batch that is complete."""
    whole, sliced = ({c.stage: c.of(rollouts.slices) for c in columns if c.whole is kind} for kind in (True, False))
    return [
        Part(s.chunk.table, s.rows, {n: p[i] for n, p in whole.items()}, {n: p[i] for n, p in sliced.items()})
        for i, s in enumerate(rollouts.slices)
    ]


def wait_for_stages(parts: Sequence[Part]) -> None:
    """Until every column is computed; reads none."""
    stages = {ref for p in parts for columns in (p.whole, p.sliced) for refs in columns.values() for ref in refs}
    ray.wait(list(stages), num_returns=len(stages), fetch_local=False)


def fetch(parts: Sequence[Part]) -> list[Joinable]:
    """The tables behind ``parts``, zero-copy where they lie on this node; waits for the stages."""
    tables = lambda stages: {name: ray.get(refs) for name, refs in stages.items()}
    return [Joinable(ray.get(p.table), p.rows, tables(p.whole), tables(p.sliced)) for p in parts]
