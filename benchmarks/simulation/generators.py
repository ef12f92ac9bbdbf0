"""All generators, as the stream sees them: who samples what, who serves which version, what is done after a death."""

from __future__ import annotations

import functools
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import Costs
from benchmarks.simulation.generator import Generator, Sample, Sampling, ages
from rlhf_dist.actors.dispatch import Lane
from rlhf_dist.actors.rollouts import Chunk, ChunkInfo
from rlhf_dist.data.balance import Balancer, MeanLength, capacity
from rlhf_dist.data.serving import Serving, Sync

#: Tokens of a group's prompt and of each of its responses; the same whenever it is asked for.
Lengths = Callable[[int], tuple[int, Sequence[int]]]


@dataclass(frozen=True)
class Failures:
    """Processes die at random, at rates in deaths per second."""

    generator: float = 0.0
    """Of each generator."""
    learners: float = 0.0
    """Of all together: one death ends the group."""
    generator_recovery: float = 0.0
    """Seconds until one that died loads weights again."""
    learner_recovery: float = 0.0


@dataclass(frozen=True)
class Arrival:
    """A version of the weights, and the time of its arrival at the generators."""

    version: int
    at: float


class Generators:
    """The counterpart of ``GeneratorGroup``: the same calls for the stream, and simulated processes below."""

    def __init__(
        self,
        clock: Clock,
        costs: Costs,
        sampling: Sampling,
        count: int,
        lengths: Lengths,
        failures: Failures,
        seed: int,
    ) -> None:
        self.clock, self.costs, self.sampling, self.lengths, self.failures = clock, costs, sampling, lengths, failures
        self.changed = threading.Condition()
        self.version = -1
        self.deaths = self.retried = self.lost = 0
        """Of generators; groups that were sampled again; sampled tokens that came to nothing."""
        self._random = random.Random(seed)
        self._balancer: Balancer[tuple[int, int]] = Balancer(count, capacity(count, sampling.max_num_seqs))
        self._serving = Serving(count)
        self._mean = MeanLength()
        self._lanes: dict[int, Lane] = {}
        self._numbers, self._chunks = itertools.count(), itertools.count()
        self._settled = [0] * count
        """Of the tokens that each living generator has sampled, those that the driver has, or has given up."""
        self._gone = (0.0, 0)
        """Busy seconds and sampled tokens of generators that died."""
        self.processes = [self._start(i) for i in range(count)]

    @property
    def busy(self) -> float:
        return self._gone[0] + sum(g.busy() for g in self.processes if g.alive)

    @property
    def sampled(self) -> int:
        return self._gone[1] + sum(g.tokens for g in self.processes if g.alive)

    def open(self, lane: Lane) -> int:
        number = next(self._numbers)
        self._lanes[number] = lane
        return number

    def reset(self) -> int:
        """Give up everything that is under way; returns how many groups of the stream that were."""
        groups = 0
        for number, lane in self._lanes.items():
            self._balancer.forget([(number, group) for group in lane.rows])
            groups += len(lane.rows)
            for i in self._serving.live:
                self.processes[i].drop(number)
                self._settled[i] = self.processes[i].tokens
        self._lanes.clear()
        self._serving.forget()
        return groups

    def submit(self, number: int, groups: Sequence[tuple[int, int]]) -> None:
        lane = self._lanes[number]
        for group, row in groups:
            lane.rows[group] = row
            self._balancer.add((number, group), self._mean.load(lane.n))
        self._assign()

    def publish(self, weights: Any) -> None:
        """Send an :class:`Arrival` to every generator."""
        self.version = weights.version
        sync = self._serving.published(weights.version, self.clock.now)
        receivers = [self.processes[i] for i in sorted(self._serving.live)]

        def arrived() -> None:
            for generator in receivers:
                if generator.alive and generator.version < sync.version:
                    generator.load(sync.version)

        self.clock.after(weights.at - self.clock.now, arrived)

    def wait_published(self, version: int) -> list[Sync]:
        self.clock.until(lambda: not self._serving.loading(version))
        return self._serving.take_complete()

    def _assign(self) -> None:
        for generator, keys in self._balancer.assign().items():
            for number, groups in _by_lane(keys).items():
                work = [(group, *self.lengths(group)) for group in groups]
                self.processes[generator].submit(number, work, self.version)

    def _start(self, i: int, version: int = -1) -> Generator:
        arrived = functools.partial(self._arrived, i)
        served = functools.partial(self._served, i)
        process = Generator(self.clock, self.costs, self.sampling, arrived, served, version)
        if self.failures.generator:
            self.clock.after(self._random.expovariate(self.failures.generator), functools.partial(self._died, i))
        return process

    def _served(self, generator: int, version: int) -> None:
        for sync in [sync for sync in self._serving.pending if sync.version == version]:
            self._serving.loaded(sync, generator, {}, self.clock.now)

    def _arrived(self, generator: int, samples: list[Sample]) -> None:
        number = samples[0].lane
        if number not in self._lanes:
            return
        lane = self._lanes[number]
        groups = tuple(dict.fromkeys(s.group_id for s in samples))
        found = ages(samples)
        tokens = tuple(found[group][2] for group in groups)
        self._settled[generator] += sum(tokens)
        prompts = tuple(lane.n * self.lengths(group)[0] for group in groups)
        for group, of_group in zip(groups, tokens, strict=True):
            self._balancer.finished(generator, (number, group))
            del lane.rows[group]
            self._mean.seen(of_group / lane.n)
        self._assign()
        table: Any = found
        lane.arrived(Chunk(next(self._chunks), ChunkInfo(number, groups, lane.n, prompts, tokens), table))

    def _died(self, generator: int) -> None:
        process = self.processes[generator]
        process.kill()
        self.deaths += 1
        self._gone = (self._gone[0] + process.busy(), self._gone[1] + process.tokens)
        self.lost += process.tokens - self._settled[generator]
        self._settled[generator] = 0
        self._serving.lost(generator)
        for number, groups in _by_lane(self._balancer.lost(generator)).items():
            self._lanes[number].lost(groups)
            self.retried += len(groups)
        self._assign()
        self.clock.after(self.failures.generator_recovery, lambda: self._join(generator))

    def _join(self, generator: int) -> None:
        """Load the newest weights, and again if there are newer ones by then; then take work."""
        version = self.version

        def joined() -> None:
            if self.version != version:
                self._join(generator)
                return
            self.processes[generator] = self._start(generator, version)
            self._serving.joined(generator, {}, self.clock.now)
            self._balancer.joined(generator)
            self._assign()

        self.clock.after(self.costs.transfer + self.costs.load, joined)


def _by_lane(keys: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for number, group in keys:
        groups.setdefault(number, []).append(group)
    return groups
