"""The DeepSpeed groups: policy learner, critic learner, SFT and reward-model training, sharded frozen models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from ray import ObjectRef
from ray.actor import ActorHandle

from rlhf_dist.actors.data import join_columns
from rlhf_dist.actors.diagnosis import Place
from rlhf_dist.actors.failed_batch import Replayed
from rlhf_dist.actors.faults import Faults
from rlhf_dist.actors.group import Group, Resources
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.learner_worker import LearnerWorker
from rlhf_dist.actors.rollouts import Columns, RolloutBatch, Stages
from rlhf_dist.actors.stats import PendingStats
from rlhf_dist.actors.transport import TRANSPORTS, Weights
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.data.shares import add_up
from rlhf_dist.observability.trace import Span


class LearnerGroup:
    """All ranks of one learner; every method sends one call to each of them."""

    def __init__(self, spec: LearnerSpec, strategy: str, seconds: float, patient: bool = False) -> None:
        self.spec = spec
        self.role = spec.role
        self.seconds = seconds
        c = spec.learner
        world = c.ranks
        self.group = Group(
            spec.role,
            LearnerWorker,
            world,
            Resources(c.cpus, c.gpus, c.resources),
            lambda rank: (spec, rank, world),
            strategy=strategy,
            seconds=seconds,
            patient=patient,
        )
        self.ranks = self.group.actors
        self.died: dict[int, str] = {}
        """Ranks whose process is gone, and why."""
        self._setup: list[ObjectRef] = []
        self._frozen: list[ObjectRef] | None = None

    def start(self) -> LearnerGroup:
        """Begin to load; returns at once. :meth:`wait_ready` waits."""
        # Waited for by the ranks, not here: other groups can start meanwhile.
        host_and_port: list[ObjectRef] = self.ranks[0].address.remote()
        self._setup = [r.setup.remote(*host_and_port) for r in self.ranks]
        return self

    def wait_ready(self) -> list[dict[str, Any]]:
        return wait_for(self._setup, f"start of {self.role}", self.seconds)

    def update(
        self,
        table: ObjectRef | pa.Table,
        minibatches: Sequence[np.ndarray],
        pretrain: tuple[ObjectRef, Sequence[np.ndarray]] | None = None,
    ) -> PendingStats:
        """Learn from ``table``, and from the table and rows ``pretrain``; returns at once."""
        arguments = (table, list(minibatches), *(pretrain or ()))
        return PendingStats([(self.role, [r.update.remote(*arguments) for r in self.ranks])])

    def evaluate(self, table: ObjectRef, rows: np.ndarray) -> dict[str, float]:
        """Figures of the objective on ``rows`` of ``table``, over all of them at once; nothing is learnt."""
        shares = wait_for([r.evaluate.remote(table, rows) for r in self.ranks], f"{self.role}, evaluating")
        return add_up(shares)

    def keep(self, folder: str) -> None:
        """Write the state of every rank to a ``folder`` that all ranks see; :meth:`go_back` returns to it."""
        wait_for([r.keep.remote(folder) for r in self.ranks], f"{self.role}, keeping its state in {folder}")

    def go_back(self, folder: str) -> None:
        wait_for([r.go_back.remote(folder) for r in self.ranks], f"{self.role}, going back to {folder}")

    def pair_logprobs(self, table: ObjectRef) -> ObjectRef:
        """``table`` with the columns ``ref_chosen`` and ``ref_rejected``, from the policy as it is now."""
        return join_columns(table, [r.pair_logprobs.remote(table) for r in self.ranks], self.role)

    def pair_outcomes(self, table: ObjectRef) -> pa.Table:
        """Of every comparison, in order: see ``LearnerWorker.pair_outcomes``."""
        parts = wait_for([r.pair_outcomes.remote(table) for r in self.ranks], f"{self.role}, scoring pairs")
        return pa.concat_tables(parts).sort_by("row")

    def center(self, table: ObjectRef) -> float:
        """Give the responses in ``table`` the mean score 0: see ``LearnerWorker.center``."""
        return wait_for([r.center.remote(table) for r in self.ranks], f"{self.role}, centering")[0]

    def logprobs(self, batch: Stages, column: str = "old_logprobs") -> Columns:
        return batch.apply(self.role, lambda s: [r.logprobs.remote(s.chunk.table, column, s.rows) for r in self.ranks])

    def values(self, batch: RolloutBatch) -> Columns:
        return batch.apply(self.role, lambda s: [r.values.remote(s.chunk.table, s.rows) for r in self.ranks])

    def scores(self, batch: Stages, column: str) -> Columns:
        return batch.apply(self.role, lambda s: [r.scores.remote(s.chunk.table, column) for r in self.ranks])

    def weights(self, version: int) -> Weights:
        """Publish ``version``; returns at once."""
        if self._frozen is None:  # sent once, and kept for generators that start later
            lora = self.spec.model.lora
            sent = lora.rank and lora.serve == "merged" and self.spec.transport == "object_store"
            self._frozen = [r.frozen_weights.remote() for r in self.ranks] if sent else []
        return TRANSPORTS[self.spec.transport](version, self.ranks, self._frozen)

    def save(self, folder: str, tokenizer_dir: str) -> tuple[list[ObjectRef], list[ObjectRef]]:
        """Copy the state of every rank and write it to ``folder`` (any URL); returns at once.

        Returns:
            references to the seconds of each rank's copy, which hold the next call; and to the files of each rank,
            once they are written.
        """
        saved: list[ObjectRef] = [r.save.remote(folder, tokenizer_dir) for r in self.ranks]
        return saved, [r.written.remote(s) for r, s in zip(self.ranks, saved, strict=True)]

    def export(self, folder: str, tokenizer_dir: str) -> None:
        wait_for([r.export.remote(folder, tokenizer_dir) for r in self.ranks], f"{self.role}, exporting to {folder}")

    def guard(self, faults: Faults) -> None:
        """Remember which rank died; the group cannot go on without it, and whoever waits for it gets an error."""
        for i in range(len(self.ranks)):
            self.group.watch(i, functools.partial(self._died, i))

    def processes(self) -> list[tuple[str, ActorHandle, Place]]:
        return self.group.processes()

    def _died(self, rank: int, error: Exception) -> None:
        self.died[rank] = self.group.cause_of_death(rank, error)

    def failed_step(self) -> tuple[int, int] | None:
        """Of the update that met a number that is not finite, if one did: see ``LearnerWorker.failed_step``."""
        return wait_for(self.ranks[0].failed_step.remote(), f"{self.role}, after its updates")

    def save_failed(self, folder: str, tokenizer_dir: str, stage: str, step: int) -> None:
        """Write that update's batch, and the model before the optimizer step that failed, to ``folder``."""
        calls = [r.save_failed.remote(folder, tokenizer_dir, stage, step) for r in self.ranks]
        wait_for(calls, f"{self.role}, saving the batch that it failed on")

    def replay(self, folder: str) -> list[Replayed]:
        """What rank 0 finds in a folder of :meth:`save_failed`, table by table."""
        return wait_for(self.ranks[0].replay.remote(folder), f"{self.role}, replaying {folder}")

    def spans(self) -> list[Span]:
        return self.group.spans()

    def stop_calling(self) -> None:
        self.group.stop_calling()

    def release(self) -> None:
        self.group.release()
