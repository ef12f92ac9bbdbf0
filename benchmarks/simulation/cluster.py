"""The loop of ``rlhf_dist/recipes/ppo.py`` on simulated generators and learners.

What may be sampled, what is trained next, who samples it, who is waited for and what is done again after a fault is
decided by the project's own classes: ``RolloutStream`` with its ``Ledger``, ``RolloutBatch``, ``Balancer``,
``MeanLength``, ``Serving``, ``Outbox``, ``PromptOrder`` and ``TrainedLedger``. Where they hold references to objects of
Ray, here they hold the time at which the object would be there.
"""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import Costs
from benchmarks.simulation.generator import Generator, Sample, Sampling, ages
from rlhf_dist.actors.dispatch import Lane
from rlhf_dist.actors.rollouts import Chunk, ChunkInfo, Slice
from rlhf_dist.actors.stream import RolloutStream
from rlhf_dist.data.balance import Balancer, MeanLength, capacity
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.data.serving import Serving, Sync
from rlhf_dist.data.trained import TrainedLedger, TrainedStep, final_line

#: Prompts of the simulated data set; lengths belong to groups, so that it matters to nobody.
ROWS = 4096
#: Tokens of a group's prompt and of each of its responses; the same whenever it is asked for.
Lengths = Callable[[int], tuple[int, Sequence[int]]]


@dataclass(frozen=True)
class Plan:
    """A run; names as in the config."""

    generators: int
    batch_size: int
    n_samples_per_prompt: int
    max_staleness: int
    steps: int
    checkpoint_every: int = 0
    """0: only the beginning can be gone back to."""
    goes_on: bool = False
    """Whether generators sample for steps beyond the last one, as in the middle of a longer run."""


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
class Step:
    """A step of the line of updates that led to the final weights."""

    ended: float
    groups: int
    samples: int
    tokens: int
    """Of prompts and responses."""
    age: float
    """Mean over the response tokens, in versions."""
    oldest: int
    generators_busy: float
    """Seconds since the start, summed over the generators."""
    learners_busy: float


@dataclass
class Result:
    """What came of a run."""

    steps: list[Step] = field(default_factory=list)
    trained: list[TrainedStep] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=lambda: {"generator": 0, "learner": 0})
    retried_groups: int = 0
    """Sampled again because their generator died."""
    dropped_groups: int = 0
    """Under way or trained when learners died, and given up."""
    sampled_tokens: int = 0

    def figures(self, first: int, last: int, generators: int) -> dict[str, float]:
        """Rates, ages and idle shares between the ends of steps ``first`` and ``last``, counted from 0."""
        a, b = self.steps[first], self.steps[last]
        steps = self.steps[first + 1 : last + 1]
        seconds = b.ended - a.ended
        tokens = sum(s.tokens for s in steps)
        return {
            "step_seconds": seconds / len(steps),
            "tokens_per_second": tokens / seconds,
            "samples_per_second": sum(s.samples for s in steps) / seconds,
            "age": sum(s.age * s.tokens for s in steps) / tokens,
            "oldest": max(s.oldest for s in steps),
            "generators_idle": 1 - (b.generators_busy - a.generators_busy) / seconds / generators,
            "learners_idle": 1 - (b.learners_busy - a.learners_busy) / seconds,
        }


class LearnerDied(Exception):
    """The training goes on from a checkpoint."""


class Server:
    """Processes that do one thing after the other."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.busy = self.free_at = 0.0

    def work(self, seconds: float) -> float:
        """When the work that is added now is done."""
        self.free_at = max(self.free_at, self.clock.now) + seconds
        self.busy += seconds
        return self.free_at

    def stop(self) -> None:
        """What is not done yet is given up."""
        self.busy -= max(0.0, self.free_at - self.clock.now)
        self.free_at = self.clock.now


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
        self.deaths = self.retried = 0
        self._random = random.Random(seed)
        self._balancer: Balancer[tuple[int, int]] = Balancer(count, capacity(count, sampling.max_num_seqs))
        self._serving = Serving(count)
        self._mean = MeanLength()
        self._lanes: dict[int, Lane] = {}
        self._numbers, self._chunks = itertools.count(), itertools.count()
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
        self.clock.after(
            weights.at - self.clock.now,
            lambda: [g.load(sync.version) for g in receivers if g.alive and g.version < sync.version],
        )

    def wait_published(self, version: int) -> list[Sync]:
        self.clock.until(lambda: not self._serving.loading(version))
        return self._serving.take_complete()

    def _assign(self) -> None:
        for generator, keys in self._balancer.assign().items():
            by_lane: dict[int, list[int]] = {}
            for number, group in keys:
                by_lane.setdefault(number, []).append(group)
            for number, groups in by_lane.items():
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
        self.deaths += 1
        self._gone = (self._gone[0] + process.busy(), self._gone[1] + process.tokens)
        process.kill()
        self._serving.lost(generator)
        by_lane: dict[int, list[int]] = {}
        for number, group in self._balancer.lost(generator):
            by_lane.setdefault(number, []).append(group)
        for number, groups in by_lane.items():
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


@dataclass(frozen=True)
class State:
    """What a checkpoint holds."""

    step: int = 0
    stream: dict[str, Any] | None = None


def simulate(
    plan: Plan,
    costs: Costs,
    lengths: Lengths,
    sampling: Sampling | None = None,
    failures: Failures | None = None,
    seed: int = 0,
) -> Result:
    """Run ``plan`` to its end. Equal arguments give equal results."""
    failures = failures or Failures()
    clock, result = Clock(), Result()
    learner, scorer = Server(clock), Server(clock)
    sampling = sampling or Sampling()
    if plan.max_staleness == 0:  # as the generator itself has it
        sampling = Sampling(sampling.max_num_seqs, sampling.in_flight_updates, sampling.chunk_tokens, None)
    generators = Generators(clock, costs, sampling, plan.generators, lengths, failures, seed)
    chance = random.Random(seed + 1)
    loop = Loop(plan, costs, clock, generators, learner, scorer, result)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger = TrainedLedger(path)
        while True:
            death = None
            if failures.learners:
                death = clock.after(chance.expovariate(failures.learners), loop.die)
            try:
                loop.train(ledger)
            except LearnerDied:
                result.deaths["learner"] += 1
                result.dropped_groups += loop.give_up()
                clock.sleep(failures.learner_recovery)
            else:
                break
        if death is not None:
            death.cancel()
        result.trained = final_line(path)
    result.deaths["generator"] = generators.deaths
    result.retried_groups = generators.retried
    result.sampled_tokens = generators.sampled
    return result


class Loop:
    """The driver."""

    def __init__(
        self,
        plan: Plan,
        costs: Costs,
        clock: Clock,
        generators: Generators,
        learner: Server,
        scorer: Server,
        result: Result,
    ) -> None:
        self.plan, self.costs, self.clock, self.generators = plan, costs, clock, generators
        self.learner, self.scorer, self.result = learner, scorer, result
        self.saved = State()
        self._stream: RolloutStream | None = None

    def die(self) -> None:
        raise LearnerDied

    def give_up(self) -> int:
        """What learners that died take with them; returns the groups that were sampled for nothing."""
        self.learner.stop()
        self.scorer.stop()
        assert self._stream is not None
        ledger = self._stream.ledger
        groups = len(ledger.complete) + len(ledger.batch or ())
        groups += sum(s.groups for s in self.result.steps[self.saved.step :])
        del self.result.steps[self.saved.step :]
        return groups + self.generators.reset()

    def train(self, ledger: TrainedLedger) -> None:
        """From the newest checkpoint to the end.

        Raises:
            LearnerDied: at any time.
        """
        plan, costs, clock, state = self.plan, self.costs, self.clock, self.saved
        beyond = plan.max_staleness + 1 if plan.goes_on else 0
        nothing: Any = None
        generators: Any = self.generators
        stream = self._stream = RolloutStream(
            generators,
            nothing,
            PromptOrder(ROWS, seed=0, shuffle=False),
            batch_size=plan.batch_size,
            n_samples_per_prompt=plan.n_samples_per_prompt,
            steps=plan.steps - state.step + beyond,
            max_staleness=plan.max_staleness,
            version=ledger.begin(state.step),
            state=state.stream,
        )
        scores = stream.apply("scores", lambda s: self._parts(self.scorer, costs.score_token, s))
        stream.publish(self._weights(stream.version))
        for step in range(state.step + 1, plan.steps + 1):
            rollouts = stream.next_batch()
            old = rollouts.apply("old_logprobs", lambda s: self._parts(self.learner, costs.logprob_token, s))
            clock.until(lambda: stream.ledger.full)
            parts = [at for columns in (scores, old) for of_slice in columns.of(rollouts.slices) for at in of_slice]
            there: Any = max(parts)
            clock.sleep(there - clock.now)
            clock.sleep(costs.experience)

            clock.sleep(self.learner.work(costs.update + costs.update_token * rollouts.tokens) - clock.now)
            slices, version = rollouts.slices, stream.version
            ledger.trained(TrainedStep(step, version + 1, stream.trained(rollouts)))

            stream.publish(self._weights(version + 1))
            clock.sleep(costs.driver)
            self._enter(slices, version, rollouts.samples, rollouts.tokens)
            if plan.checkpoint_every and step % plan.checkpoint_every == 0:
                self.saved = State(step, stream.state_dict())
                clock.sleep(self.learner.work(costs.checkpoint) - clock.now)

    def _weights(self, version: int) -> Any:
        return Arrival(version, self.learner.work(self.costs.publish) + self.costs.transfer)

    def _parts(self, server: Server, seconds: float, part: Slice) -> list[Any]:
        info = part.chunk.info
        return [server.work(seconds * (part.tokens(info.prompt_tokens) + part.tokens(info.response_tokens)))]

    def _enter(self, slices: Sequence[Slice], version: int, samples: int, tokens: int) -> None:
        found: Any = [part.chunk.table[group] for part in slices for group in part.groups]  # type: ignore[index]
        total = sum(n for *_, n in found)
        age = version - sum(versions for _, versions, _ in found) / total
        oldest = version - min(began for began, *_ in found)
        busy = self.generators.busy
        self.result.steps.append(
            Step(self.clock.now, len(found), samples, tokens, age, oldest, busy, self.learner.busy)
        )
