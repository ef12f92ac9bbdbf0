"""Lazy batches of rollouts: chunks of samples, and the stages that add columns to them as they arrive.

The driver holds references and lengths here, never tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from ray import ObjectRef

from rlhf_dist.actors.waiting import WaitLimitExceeded


@dataclass(frozen=True)
class ChunkInfo:
    """What the driver knows of a chunk. Its rows are those of the first group, then of the second ..."""

    lane: int
    """Whom it is for; see :class:`~rlhf_dist.actors.dispatch.GeneratorGroup`."""
    groups: tuple[int, ...]
    samples: int
    """Of each group."""
    prompt_tokens: tuple[int, ...]
    """Of all samples of each group."""
    response_tokens: tuple[int, ...]
    """Of all samples of each group."""


@dataclass(frozen=True)
class Chunk:
    """Groups that one generator finished at about the same time."""

    number: int
    info: ChunkInfo
    table: ObjectRef


@dataclass(frozen=True)
class Slice:
    """The groups of one chunk that go into one batch; mostly all of them."""

    chunk: Chunk
    groups: tuple[int, ...]

    @property
    def rows(self) -> np.ndarray | None:
        """Rows of the chunk's table; None: all."""
        info = self.chunk.info
        if self.groups == info.groups:
            return None
        places = np.array([info.groups.index(g) for g in self.groups])
        return (places[:, None] * info.samples + np.arange(info.samples)).reshape(-1)

    def tokens(self, kind: tuple[int, ...]) -> int:
        """Sum of ``info.prompt_tokens`` or ``info.response_tokens`` over the groups."""
        of = dict(zip(self.chunk.info.groups, kind, strict=True))
        return sum(of[g] for g in self.groups)


#: Sends a slice to the processes of a stage; returns references to the parts of the new columns.
Submit = Callable[[Slice], list[ObjectRef]]


@dataclass
class Columns:
    """What a stage computes: references to the parts of its columns.

    ``whole``: of every chunk, by its number (what depends on no policy version: rewards, the reference); else of the
    slices of one batch, by their position.
    """

    stage: str
    whole: bool
    parts: dict[int, list[ObjectRef]] = field(default_factory=dict)

    def of(self, slices: Sequence[Slice]) -> list[list[ObjectRef]]:
        return [self.parts[s.chunk.number if self.whole else i] for i, s in enumerate(slices)]


class Stages(Protocol):
    """What stages register with: a batch, or the stream that all batches come from."""

    def apply(self, stage: str, submit: Submit) -> Columns: ...


class RolloutBatch:
    """The slices of one batch. Everything that submits to actors runs under one lock, which all batches share.

    The lock keeps collective stages in step: every rank of a learner gets the
    slices in the same order.

    Args:
        size: groups.
        changed: the lock, notified by whoever adds a slice.
    """

    def __init__(self, size: int, changed: threading.Condition | None = None) -> None:
        self.size = size
        self.slices: list[Slice] = []
        self.left_out: frozenset[int] = frozenset()
        """Groups that were sampled and are not trained (dynamic sampling)."""
        self._changed = changed or threading.Condition()
        self._stages: list[tuple[Submit, Columns]] = []
        self._error: BaseException | None = None

    def apply(self, stage: str, submit: Submit) -> Columns:
        """Run ``submit`` for every slice, those that are there and those to come."""
        with self._changed:
            columns = Columns(stage, whole=False, parts={i: submit(s) for i, s in enumerate(self.slices)})
            self._stages.append((submit, columns))
        return columns

    def add(self, part: Slice) -> None:
        """One more slice; unblocks :meth:`wait` with the last one."""
        with self._changed:
            for submit, columns in self._stages:
                columns.parts[len(self.slices)] = submit(part)
            self.slices.append(part)
            self._changed.notify_all()

    def leave_out(self, groups: Sequence[int]) -> None:
        """Expect others in the place of ``groups``."""
        with self._changed:
            self.left_out |= set(groups)

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self, seconds: float) -> RolloutBatch:
        """Block until every group is there.

        Raises:
            WaitLimitExceeded: says how many groups are missing.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._error is not None or not self.missing, seconds)
        if self._error is not None:
            raise self._error
        if not done:
            raise WaitLimitExceeded(
                f"the driver waited {seconds:.0f} s for the generators: {self.missing} of {self.size} groups are "
                "missing (run.wait_limit)"
            )
        return self

    @property
    def groups(self) -> list[int]:
        """Those that are there and to be trained."""
        return [g for s in self.slices for g in s.groups if g not in self.left_out]

    @property
    def missing(self) -> int:
        return self.size - len(self.groups)

    @property
    def samples(self) -> int:
        return sum(len(s.groups) * s.chunk.info.samples for s in self.slices)

    @property
    def response_tokens(self) -> int:
        return sum(s.tokens(s.chunk.info.response_tokens) for s in self.slices)

    @property
    def tokens(self) -> int:
        return self.response_tokens + sum(s.tokens(s.chunk.info.prompt_tokens) for s in self.slices)
