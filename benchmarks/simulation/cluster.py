"""The loop of ``rlhf_dist/recipes/ppo.py`` on simulated generators and learners.

What may be sampled, what is trained next, who samples it, who is waited for and what is done again after a fault is
decided by the project's own classes: ``RolloutStream`` with its ``Ledger``, ``RolloutBatch``, ``Balancer``,
``MeanLength``, ``Serving``, ``Outbox``, ``PromptOrder`` and ``TrainedLedger``. Where they hold references to objects of
Ray, here they hold the time at which the object would be there.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import Costs
from benchmarks.simulation.generator import Sampling
from benchmarks.simulation.generators import Arrival, Failures, Generators, Lengths
from rlhf_dist.actors.rollouts import RolloutBatch, Slice
from rlhf_dist.actors.stream import RolloutStream
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.data.trained import TrainedLedger, TrainedStep, final_line

#: Prompts of the simulated data set; lengths belong to groups, so that it matters to nobody.
ROWS = 4096


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
class Step:
    """A step of the line of updates that led to the final weights."""

    ended: float
    groups: int
    samples: int
    tokens: int
    """Of prompts and responses."""
    response_tokens: int
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
    lost_tokens: int = 0
    """Of them, those that deaths made worthless."""

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
    result.lost_tokens = generators.lost
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
        groups += self.generators.reset()
        # Only what the steps that stay have trained was not in vain.
        self.generators.lost = self.generators.sampled - sum(s.response_tokens for s in self.result.steps)
        return groups

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
            columns: Any = [*scores.of(rollouts.slices), *old.of(rollouts.slices)]
            clock.sleep(max(at for of_slice in columns for at in of_slice) - clock.now)
            clock.sleep(costs.experience)

            clock.sleep(self.learner.work(costs.update + costs.update_token * rollouts.tokens) - clock.now)
            version = stream.version
            ledger.trained(TrainedStep(step, version + 1, stream.trained(rollouts)))

            stream.publish(self._weights(version + 1))
            clock.sleep(costs.driver)
            self._enter(rollouts, version)
            if plan.checkpoint_every and step % plan.checkpoint_every == 0:
                self.saved = State(step, stream.state_dict())
                clock.sleep(self.learner.work(costs.checkpoint) - clock.now)

    def _weights(self, version: int) -> Any:
        return Arrival(version, self.learner.work(self.costs.publish) + self.costs.transfer)

    def _parts(self, server: Server, seconds: float, part: Slice) -> list[Any]:
        info = part.chunk.info
        return [server.work(seconds * (part.tokens(info.prompt_tokens) + part.tokens(info.response_tokens)))]

    def _enter(self, batch: RolloutBatch, version: int) -> None:
        found: Any = [part.chunk.table[group] for part in batch.slices for group in part.groups]  # type: ignore[index]
        total = sum(n for *_, n in found)
        age = version - sum(versions for _, versions, _ in found) / total
        oldest = version - min(began for began, *_ in found)
        self.result.steps.append(
            Step(
                ended=self.clock.now,
                groups=len(found),
                samples=batch.samples,
                tokens=batch.tokens,
                response_tokens=batch.response_tokens,
                age=age,
                oldest=oldest,
                generators_busy=self.generators.busy,
                learners_busy=self.learner.busy,
            )
        )
