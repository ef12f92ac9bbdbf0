"""The stream of training batches: what may be sampled, what is trained next, and how old it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import ObjectRef

from rlhf_dist.actors.dispatch import GeneratorGroup, Lane
from rlhf_dist.actors.rollouts import Chunk, Columns, RolloutBatch, Slice, Submit
from rlhf_dist.actors.transport import Weights
from rlhf_dist.data.ledger import Ledger
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.data.serving import Sync


class RolloutStream:
    """Batches of rollouts that are at most ``max_staleness`` policy versions old; 0 is exactly on-policy.

    The rules are those of the :class:`~rlhf_dist.data.ledger.Ledger`; here they meet the generators.

    Args:
        steps: batches that are going to be trained.
        version: of the policy, in the beginning.
        state: :meth:`state_dict` of the stream that this one goes on from.

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
        version: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.generators = generators
        self.order = order
        self.ledger = Ledger(batch_size, max_staleness, last_version=version + steps, version=version)
        self._batch: RolloutBatch | None = None
        self._stages: list[tuple[Submit, Columns]] = []
        self._chunk_of: dict[int, Chunk] = {}
        self._rows: dict[int, int] = {}
        self._again: list[int] = []
        if state is not None:
            self.order.load_state_dict(state["order"])
            self._again = self.ledger.load_state_dict(state["ledger"])
            self._rows = {int(group): row for group, row in state["rows"].items()}
        self._lane = generators.open(
            Lane(prompts, n_samples_per_prompt, greedy, self._arrived, self._failed, self.ledger.lost)
        )

    def apply(self, stage: str, submit: Submit) -> Columns:
        """Run ``submit`` for every chunk the moment it arrives, whichever batch it will be trained in.

        For stages that do not change with the policy: rewards and the reference. Register them before the first batch.
        """
        columns = Columns(stage, whole=True)
        self._stages.append((submit, columns))
        return columns

    @property
    def version(self) -> int:
        """Of the policy that the open batch, or the next one, updates."""
        return self.ledger.version

    def next_batch(self) -> RolloutBatch:
        """The next batch, lazily: its chunks arrive while the caller registers stages."""
        with self.generators.changed:
            self._submit(self._again)
            self._again = []
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

    def trained(self, batch: RolloutBatch) -> dict[int, int]:
        """Enter a trained batch into the ledger: exactly once. Returns its groups and their rows of the prompts."""
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
            rows = {group: self._rows[group] for group in taken}
            for group in {*taken, *batch.left_out}:
                del self._rows[group]
            held = {chunk.number for chunk in self._chunk_of.values()}
            for _, columns in self._stages:
                for number in columns.parts.keys() - held:
                    del columns.parts[number]
            return rows

    def publish(self, weights: Weights) -> list[Sync]:
        """Send new weights to the generators; returns the syncs that have completed since the last call.

        Blocks until every generator serves the oldest version that may still be sampled from: with a staleness of 0
        that is the one just published, else it returns while the generators are still at work.
        """
        with self.generators.changed:
            if weights.version > self.ledger.version:
                self.ledger.published(weights.version)
        self.generators.publish(weights)
        return self.generators.wait_published(weights.version - self.ledger.max_staleness)

    def state_dict(self) -> dict[str, Any]:
        """Where the prompts stand, and which groups are under way; between two batches. JSON can hold it."""
        return {"order": self.order.state_dict(), "ledger": self.ledger.state_dict(), "rows": dict(self._rows)}

    def _admit(self) -> None:
        groups = self.ledger.admit()
        self._rows |= zip(groups, self.order.take(len(groups)), strict=True)
        self._submit(groups)

    def _submit(self, groups: Sequence[int]) -> None:
        self.generators.submit(self._lane, [(group, self._rows[group]) for group in groups])

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
