"""Rollouts on their way: lazy batches whose chunks are scored while the rest is still being generated.

The driver holds references and lengths here, never tokens.

* :class:`RolloutStream` submits prompt groups to the generators as the ledger
  admits them, and returns one :class:`RolloutBatch` per step.
* A stage (reward, reference, policy, critic) registers with
  :meth:`RolloutBatch.apply` what it does with a chunk. The threads that read
  the generators' streams call it for each chunk the moment it arrives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from rlhf_dist.actors.transport import Weights
from rlhf_dist.actors.waiting import WaitLimitExceeded, explained, wait_for
from rlhf_dist.data.ledger import Ledger
from rlhf_dist.data.prompts import PromptOrder


@dataclass(frozen=True)
class ChunkInfo:
    """What the driver knows of a chunk."""

    groups: tuple[int, ...]
    samples: int
    prompt_tokens: int
    response_tokens: int
    seconds: float
    """From the start of the call to this chunk."""


@dataclass(frozen=True)
class Chunk:
    info: ChunkInfo
    table: ObjectRef


@dataclass
class Columns:
    """What a stage computes: for each chunk, in order of arrival, references to the parts of its columns."""

    stage: str
    parts: list[list[ObjectRef]] = field(default_factory=list)


class RolloutBatch:
    """The chunks of one step. Thread-safe; everything that submits to actors runs under one lock.

    The lock also keeps collective stages in step: every rank of a learner
    gets the chunks in the same order.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        self.groups = set(groups)
        self.left_out: frozenset[int] = frozenset()
        """Groups that were sampled and are not trained (dynamic sampling)."""
        self.chunks: list[Chunk] = []
        self.started = time.monotonic()
        self.generate_seconds = 0.0
        self._missing = set(groups)
        self._stages: list[tuple[Callable[[ObjectRef], list[ObjectRef]], Columns]] = []
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def apply(self, stage: str, submit: Callable[[ObjectRef], list[ObjectRef]]) -> Columns:
        """Run ``submit`` for every chunk, those that are there and those to come."""
        columns = Columns(stage)
        with self._changed:
            columns.parts += [submit(chunk.table) for chunk in self.chunks]
            self._stages.append((submit, columns))
        return columns

    def add(self, chunk: Chunk) -> None:
        """Consumes a finished chunk; unblocks :meth:`wait` with the last one."""
        with self._changed:
            self.chunks.append(chunk)
            self._missing.difference_update(chunk.info.groups)
            for submit, columns in self._stages:
                columns.parts.append(submit(chunk.table))
            if not self._missing:
                self.generate_seconds = time.monotonic() - self.started
            self._changed.notify_all()

    def replace(self, left_out: Sequence[int], groups: Sequence[int]) -> None:
        """Expect ``groups`` in place of ``left_out``."""
        with self._changed:
            self.left_out |= set(left_out)
            self.groups.update(groups)
            self._missing.update(groups)

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self, seconds: float) -> RolloutBatch:
        """Block until every group is there.

        Raises:
            WaitLimitExceeded: names how many groups are missing.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._error is not None or not self._missing, seconds)
        if self._error is not None:
            raise self._error
        if not done:
            raise WaitLimitExceeded(
                f"the driver waited {seconds:.0f} s for the generators: {len(self._missing)} of {len(self.groups)} "
                f"groups are missing, for example group {min(self._missing)} (run.wait_limit)"
            )
        return self

    @property
    def samples(self) -> int:
        return sum(c.info.samples for c in self.chunks)

    @property
    def response_tokens(self) -> int:
        return sum(c.info.response_tokens for c in self.chunks)

    @property
    def tokens(self) -> int:
        return self.response_tokens + sum(c.info.prompt_tokens for c in self.chunks)


def generate(
    generators: Sequence[ActorHandle],
    prompts: ObjectRef,
    groups: Sequence[tuple[int, int]],
    n: int,
    greedy: bool = False,
    into: RolloutBatch | None = None,
) -> RolloutBatch:
    """Sample ``n`` responses for each ``(group_id, prompt row)``; returns at once with a lazy batch.

    Groups are dealt out to the generators evenly. One thread per generator
    reads its stream: a chunk is passed on the moment it is finished.

    Args:
        greedy: one greedy response for each group as well, ``sample_index`` ``schema.GREEDY``.
        into: a batch that expects these groups; a new one by default.
    """
    batch = into or RolloutBatch([g for g, _ in groups])
    for i, generator in enumerate(generators):
        part = list(groups[i :: len(generators)])
        if part:
            stream: Any = generator.generate.remote(prompts, part, n, greedy)
            threading.Thread(target=_read, args=(stream, batch, f"generator {i}"), daemon=True).start()
    return batch


def _read(stream: Any, batch: RolloutBatch, who: str) -> None:
    """Pass on the chunks of one generator. Ends with the stream, or with the batch's failure."""
    try:
        for info in stream:  # yields info and table in turn
            batch.add(Chunk(ray.get(info), next(stream)))
    except Exception as error:  # noqa: BLE001  (a background thread: whatever ends it must reach the run)
        batch.fail(explained(error, who))


class RolloutStream:
    """Batches of rollouts from the newest policy.

    consumes: prompts, published weights; waits for: the generators; unblocks: the training step.
    """

    def __init__(
        self,
        generators: Sequence[ActorHandle],
        prompts: ObjectRef,
        order: PromptOrder,
        *,
        batch_size: int,
        n_samples_per_prompt: int,
        greedy: bool = False,
        max_staleness: int = 0,
    ) -> None:
        self.generators = list(generators)
        self.prompts = prompts
        self.order = order
        self.n = n_samples_per_prompt
        self.greedy = greedy
        self.ledger = Ledger(batch_size, max_staleness)
        self._loading: tuple[int, list[ObjectRef]] | None = None

    def next_batch(self) -> RolloutBatch:
        """The next batch, lazily: its chunks arrive while the caller registers stages."""
        self.wait_published()
        groups = self.ledger.admit()
        return self._submit(groups, RolloutBatch(groups))

    def replace(self, batch: RolloutBatch, groups: Sequence[int]) -> None:
        """Take ``groups`` out of a batch and sample the next prompts in their place."""
        for group in groups:
            self.ledger.discarded(group)
        admitted = self.ledger.admit()
        batch.replace(groups, admitted)
        self._submit(admitted, batch)

    def trained(self, batch: RolloutBatch) -> None:
        """Enter a completed batch into the ledger: exactly once."""
        trained = batch.groups - batch.left_out
        for group in trained:
            self.ledger.completed(group)
        taken = self.ledger.take_batch()
        if taken is None or set(taken) != trained:
            raise RuntimeError(f"the ledger expected batch {taken}, but {sorted(trained)[:4]}... was trained")

    def _submit(self, groups: Sequence[int], batch: RolloutBatch) -> RolloutBatch:
        pairs = list(zip(groups, self.order.take(len(groups)), strict=True))
        return generate(self.generators, self.prompts, pairs, self.n, self.greedy, into=batch)

    def publish(self, weights: Weights) -> None:
        """Send new weights to every generator; they serve nothing under them before the gate has passed."""
        self._loading = (weights.version, weights.deliver(self.generators))

    def wait_published(self) -> list[Any]:
        """Block until the last published version serves everywhere; returns the generators' records of the sync."""
        if self._loading is None:
            return []
        version, refs = self._loading
        records = [wait_for(ref, f"generator {i}, loading version {version}") for i, ref in enumerate(refs)]
        if version > 0:
            self.ledger.published(version)
        self._loading = None
        return records
