"""The driver's side of the generators: groups go out to the one with the least work, finished chunks come back.

One thread for each generator asks it for chunks. Whoever wants samples opens a
*lane*: training is one, each evaluation another; a chunk belongs to one lane.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from rlhf_dist.actors import waiting
from rlhf_dist.actors.faults import Faults
from rlhf_dist.actors.group import Group, Holder
from rlhf_dist.actors.rollouts import Chunk, ChunkInfo, RolloutBatch, Slice
from rlhf_dist.actors.transport import Weights
from rlhf_dist.actors.waiting import WaitLimitExceeded, WorkerDied, WorkerFailed, explained, wait_for
from rlhf_dist.data.balance import Balancer, MeanLength, capacity
from rlhf_dist.data.serving import Serving, Sync

#: Seconds after which a thread that waits for a chunk looks whether the run is ending.
LOOK = 0.5
#: Seconds in which such threads end. One that starts a generator anew may take longer, and is not waited for.
PATIENCE = 3.0


@dataclass
class Lane:
    """Whom samples are for, and how they are sampled."""

    prompts: ObjectRef
    """``schema.PROMPT``; the generators look prompts up by row, so tokens never pass through the driver."""
    n: int
    """Samples of each group, besides the greedy one."""
    greedy: bool
    arrived: Callable[[Chunk], None]
    """Called with the lock held, for every chunk the moment it is there."""
    failed: Callable[[BaseException], None]
    lost: Callable[[list[int]], object] = lambda groups: None
    """Called with the lock held when groups have to be sampled again, because a generator died."""
    rows: dict[int, int] = field(default_factory=dict)
    """Of the groups that are under way, their rows of ``prompts``."""


class GeneratorGroup(Holder):
    """The vLLM engines, as one. One that dies is started anew; meanwhile the others do its work.

    consumes: groups to sample, versions of the weights; waits for: nobody; unblocks: batches, as chunks arrive.

    Args:
        max_num_seqs: sequences that a generator decodes at once.
    """

    def __init__(self, group: Group, max_num_seqs: int) -> None:
        super().__init__(group)
        self.group = group
        self.actors = group.actors
        self.changed = threading.Condition()
        self._serving = Serving(len(self.actors))
        self._newest: Weights | None = None
        self._faults: Faults | None = None
        self.version = -1
        """The newest that was published; whatever is submitted is sampled from this version, or a later one."""
        n = len(self.actors)
        self._balancer: Balancer[tuple[int, int]] = Balancer(n, capacity(n, max_num_seqs))
        self._lanes: dict[int, Lane] = {}
        self._numbers = itertools.count()
        self._chunk_numbers = itertools.count()
        self._error: BaseException | None = None
        self._reading = False
        self._ending = False
        self._threads: list[threading.Thread] = []
        """All that call Ray beside the run's own."""
        self._lengths = MeanLength()

    def open(self, lane: Lane) -> int:
        """A new lane; returns its number."""
        with self.changed:
            if not self._reading:
                self._reading = True
                for i in self._serving.live:
                    self._start_reading(i)
            number = next(self._numbers)
            self._lanes[number] = lane
        return number

    def close(self, number: int) -> None:
        """Nobody wants the lane's samples any more; those that are under way are given up."""
        with self.changed:
            lane = self._lanes.pop(number)
            self._balancer.forget([(number, group) for group in lane.rows])
            if lane.rows:
                for i in self._serving.live:
                    self.actors[i].drop.remote(number)

    def reset(self) -> None:
        """Give up everything that is under way, and forget the error that it ended with."""
        with self.changed:
            for number in list(self._lanes):
                self.close(number)
            self._serving.forget()
            self._newest = None
            self._error = None

    def submit(self, number: int, groups: Sequence[tuple[int, int]]) -> None:
        """Have ``(group, prompt row)`` sampled for a lane, by whichever generator has the least to do."""
        with self.changed:
            if self._error is not None:
                raise self._error
            lane = self._lanes[number]
            sequences = lane.n + lane.greedy
            for group, row in groups:
                lane.rows[group] = row
                self._balancer.add((number, group), self._lengths.load(sequences))
            self._assign()

    def generate(
        self, prompts: ObjectRef, groups: Sequence[tuple[int, int]], n: int, greedy: bool = False
    ) -> RolloutBatch:
        """Sample ``n`` responses for each ``(group, prompt row)``; returns at once with a lazy batch.

        Args:
            greedy: one greedy response for each group as well, ``sample_index`` ``schema.GREEDY``.
        """
        batch = RolloutBatch(len(groups), self.changed)

        def arrived(chunk: Chunk) -> None:
            batch.add(Slice(chunk, chunk.info.groups))
            if not batch.missing:
                self.close(number)

        number = self.open(Lane(prompts, n, greedy, arrived, batch.fail))
        self.submit(number, groups)
        return batch

    def next_tokens(self, call: int, table: ObjectRef, rows: np.ndarray, k: int) -> tuple[ObjectRef, ObjectRef]:
        """References to the figures of a call and to its columns; calls go round."""
        next_tokens: Any = self.actors[call % len(self.actors)].next_tokens.options(num_returns=2)
        return tuple(next_tokens.remote(table, rows, k))

    def publish(self, weights: Weights) -> None:
        """Send new weights to every generator; returns at once. None serves them before its gate has passed."""
        with self.changed:
            live = sorted(self._serving.live)
            refs = weights.deliver([self.actors[i] for i in live])
            sync = self._serving.published(weights.version, time.monotonic())
            self._newest = weights
            self.version = weights.version
        for i, ref in zip(live, refs, strict=True):
            ref.future().add_done_callback(functools.partial(self._loaded, sync, i))

    def wait_published(self, version: int) -> list[Sync]:
        """Block until every generator serves ``version`` or a newer one; returns what has completed since the last
        call.

        Raises:
            WorkerFailed: a generator refused the weights; names version and tensor.
        """
        with self.changed:
            served = lambda: self._error is not None or not self._serving.loading(version)
            done = self.changed.wait_for(served, waiting.limit)
            if self._error is not None:
                raise self._error
            if not done:
                raise WaitLimitExceeded(
                    f"the driver waited {waiting.limit:.0f} s for generators {self._serving.loading(version)}, loading "
                    f"version {version} (run.wait_limit)"
                )
            return self._serving.take_complete()

    def _loaded(self, sync: Sync, generator: int, future: Any) -> None:
        with self.changed:
            if sync not in self._serving.pending:  # given up
                return
            if (error := future.exception()) is not None:
                if not isinstance(error, RayActorError):  # else the generator itself, which is being started anew
                    self._fail(explained(error, f"generator {generator}, loading version {sync.version}"))
                return
            self._serving.loaded(sync, generator, future.result(), time.monotonic())
            self.changed.notify_all()

    def guard(self, faults: Faults) -> None:
        """Start generators anew that die from here on."""
        self._faults = faults
        for i in self._serving.live:
            self.group.watch(i, functools.partial(self._died, i, self.actors[i]))

    def release(self) -> None:
        with self.changed:
            self._ending = True  # from here on they die because they shall
        super().release()
        self._wait_for_threads()

    def stop_calling(self) -> None:
        with self.changed:
            self._ending = True
        super().stop_calling()
        self._wait_for_threads()

    def _wait_for_threads(self) -> None:
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _died(self, generator: int, actor: ActorHandle, error: Exception) -> None:
        """Give its unfinished groups to the others, and start another one in its place."""
        with self.changed:
            ended = self._ending or self._faults is None
            if ended or generator not in self._serving.live or self.actors[generator] is not actor:
                return
            self._serving.lost(generator)
            if self._newest is not None and not self._newest.can_be_late:
                cause = self.group.cause_of_death(generator, error)
                refused = "this weight_sync.transport cannot take in another one, object_store can"
                self._fail(WorkerFailed(f"generator {generator}: {cause}; {refused}"))
                return
            by_lane: dict[int, list[int]] = {}
            for number, group in self._balancer.lost(generator):
                by_lane.setdefault(number, []).append(group)
            for number, groups in by_lane.items():
                self._lanes[number].lost(groups)
            self._assign()
            self.changed.notify_all()
            self._start_thread(self._revive, generator, error)

    def _revive(self, generator: int, error: Exception) -> None:
        """Start it, load the newest weights, pass the gate, take work; again, when it dies on the way."""
        assert self._faults is not None
        role, name = self.group.role, f"{self.group.role} {generator}"
        while not self._ending:
            try:
                time.sleep(self._faults.died(role, name, self.group.cause_of_death(generator, error)))
                self.group.restart(generator)
                self._wait_for_place(self.actors[generator].ready.remote(), name)
                while not self._join(generator, self._newest):
                    pass
                self._faults.works_again(name)
                return
            except WorkerDied as died:
                error = died
            except BaseException as fatal:  # noqa: BLE001  (a background thread: whatever it is must reach the run)
                with self.changed:
                    self._fail(fatal)
                return

    def _wait_for_place(self, ready: ObjectRef, name: str) -> None:
        """As long as it takes while others work: after the loss of a node there may be no place for it yet."""
        while not ray.wait([ready], timeout=self.group.seconds)[0]:
            with self.changed:
                if not self._serving.live:
                    raise WaitLimitExceeded(
                        f"{name} has not started within {self.group.seconds:.0f} s, and no other is up"
                    )
        wait_for(ready, f"start of {name}")

    def _join(self, generator: int, weights: Weights | None) -> bool:
        """Load ``weights`` and take work; False if there are newer ones by then."""
        actor = self.actors[generator]
        record: dict[str, Any] = {}
        if weights is not None:
            what = f"{self.group.role} {generator}, loading version {weights.version}"
            record = wait_for(weights.deliver([actor])[0], what)
        with self.changed:
            if self._newest is not weights:
                return False
            self._serving.joined(generator, record, time.monotonic())
            self._balancer.joined(generator)
            self.group.watch(generator, functools.partial(self._died, generator, actor))
            self._start_reading(generator)
            self._assign()
            self.changed.notify_all()
        return True

    def _assign(self) -> None:
        """Send what the balancer gives out: one call for each generator and lane."""
        for generator, keys in self._balancer.assign().items():
            by_lane: dict[int, list[tuple[int, int]]] = {}
            for number, group in keys:
                by_lane.setdefault(number, []).append((group, self._lanes[number].rows[group]))
            for number, groups in by_lane.items():
                lane = self._lanes[number]
                self.actors[generator].submit.remote(number, lane.prompts, groups, lane.n, lane.greedy, self.version)

    def _start_reading(self, generator: int) -> None:
        self._start_thread(self._read, generator, self.actors[generator])

    def _start_thread(self, target: Callable[..., None], generator: int, *arguments: Any) -> None:
        name = f"generator {generator}"
        thread = threading.Thread(target=target, args=(generator, *arguments), daemon=True, name=name)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _read(self, generator: int, actor: ActorHandle) -> None:
        """Pass on the chunks of one generator, for as long as it lives."""
        next_chunk: Any = actor.next_chunk.options(num_returns=2)
        try:
            while not self._ending:
                info_ref, table = next_chunk.remote()
                while not ray.wait([info_ref], timeout=LOOK)[0]:
                    if self._ending:
                        return
                info: ChunkInfo = ray.get(info_ref)
                with self.changed:
                    wanted = info.lane in self._lanes and not self._ending
                    if wanted and generator in self._serving.live and self.actors[generator] is actor:
                        self._arrived(generator, info, table)
        except RayActorError as error:
            if self._faults is not None:
                self._died(generator, actor, error)
            else:  # not guarded yet
                with self.changed:
                    self._fail(explained(error, f"generator {generator}"))
        except Exception as error:  # noqa: BLE001  (a background thread: whatever ends it must reach the run)
            with self.changed:
                self._fail(explained(error, f"generator {generator}"))

    def _arrived(self, generator: int, info: ChunkInfo, table: ObjectRef) -> None:
        lane = self._lanes[info.lane]
        for group, tokens in zip(info.groups, info.response_tokens, strict=True):
            self._balancer.finished(generator, (info.lane, group))
            del lane.rows[group]
            self._lengths.seen(tokens / info.samples)
        # First the generators get new work, then the chunk is passed on.
        self._assign()
        lane.arrived(Chunk(next(self._chunk_numbers), info, table))

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        for lane in self._lanes.values():
            lane.failed(error)
        self.changed.notify_all()
