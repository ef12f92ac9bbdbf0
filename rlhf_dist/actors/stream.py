"""The stream of training batches: what may be sampled, what is trained next, and how old it may be."""

from __future__ import annotations

from collections.abc import Sequence

from ray import ObjectRef

from rlhf_dist.actors.dispatch import GeneratorGroup, Lane, Sync
from rlhf_dist.actors.rollouts import Chunk, Columns, RolloutBatch, Slice, Submit
from rlhf_dist.actors.transport import Weights
from rlhf_dist.data.ledger import Ledger
from rlhf_dist.data.prompts import PromptOrder


class RolloutStream:
    """Batches of rollouts that are at most ``max_staleness`` policy versions old; 0 is exactly on-policy.

    The rules are those of the :class:`~rlhf_dist.data.ledger.Ledger`; here they meet the generators.

    consumes: prompts, published weights, finished chunks; waits for: the generators, in :meth:`publish`; unblocks:
    the training step, through its batch.
    """

    def __init__(
        self,
        generators: GeneratorGroup,
        prompts: ObjectRef,
        order: PromptOrder,
        *,
        batch_size: int,
        n_samples_per_prompt: int,
        steps: int,
        greedy: bool = False,
        max_staleness: int = 0,
    ) -> None:
        self.generators = generators
        self.order = order
        self.ledger = Ledger(batch_size, max_staleness, last_version=steps)
        self._batch: RolloutBatch | None = None
        self._stages: list[tuple[Submit, Columns]] = []
        self._chunk_of: dict[int, Chunk] = {}
        self._lane = generators.open(Lane(prompts, n_samples_per_prompt, greedy, self._arrived, self._failed))

    def apply(self, stage: str, submit: Submit) -> Columns:
        """Run ``submit`` for every chunk the moment it arrives, whichever batch it will be trained in.

        For stages that do not change with the policy: rewards and the reference. Register them before the first batch.
        """
        columns = Columns(stage, whole=True)
        self._stages.append((submit, columns))
        return columns

    def next_batch(self) -> RolloutBatch:
        """The next batch, lazily: its chunks arrive while the caller registers stages."""
        with self.generators.changed:
            self._batch = RolloutBatch(self.ledger.batch_size, self.generators.changed)
            self.ledger.open_batch()
            self._admit()
            self._fill()
            return self._batch

    def replace(self, batch: RolloutBatch, groups: Sequence[int]) -> None:
        """Take ``groups`` out of the open batch, and others in their place."""
        with self.generators.changed:
            for group in groups:
                self.ledger.discarded(group)
            batch.leave_out(groups)
            self._admit()
            self._fill()

    def trained(self, batch: RolloutBatch) -> None:
        """Enter a trained batch into the ledger: exactly once."""
        with self.generators.changed:
            taken = self.ledger.close_batch()
            if sorted(batch.groups) != taken:
                raise RuntimeError(
                    f"the ledger expected batch {taken[:4]}..., but {sorted(batch.groups)[:4]}... was trained"
                )
            self._batch = None
            for part in batch.slices:
                for group in part.groups:
                    del self._chunk_of[group]
            held = {chunk.number for chunk in self._chunk_of.values()}
            for _, columns in self._stages:
                for number in columns.parts.keys() - held:
                    del columns.parts[number]

    def publish(self, weights: Weights) -> list[Sync]:
        """Send new weights to the generators; returns the syncs that have completed since the last call.

        Blocks until every generator serves the oldest version that may still be sampled from: with a staleness of 0
        that is the one just published, else it returns while the generators are still at work.
        """
        with self.generators.changed:
            if weights.version > 0:
                self.ledger.published(weights.version)
        self.generators.publish(weights)
        return self.generators.wait_published(weights.version - self.ledger.max_staleness)

    def _admit(self) -> None:
        groups = self.ledger.admit()
        self.generators.submit(self._lane, list(zip(groups, self.order.take(len(groups)), strict=True)))

    def _arrived(self, chunk: Chunk) -> None:
        for submit, columns in self._stages:
            columns.parts[chunk.number] = submit(Slice(chunk, chunk.info.groups))
        for group in chunk.info.groups:
            self.ledger.completed(group)
            self._chunk_of[group] = chunk
        self._fill()

    def _fill(self) -> None:
        """Put what the ledger gives into the open batch."""
        by_chunk: dict[int, list[int]] = {}
        for group in self.ledger.take():
            by_chunk.setdefault(self._chunk_of[group].number, []).append(group)
        for groups in by_chunk.values():
            assert self._batch is not None
            self._batch.add(Slice(self._chunk_of[groups[0]], tuple(groups)))

    def _failed(self, error: BaseException) -> None:
        if self._batch is not None:
            self._batch.fail(error)
