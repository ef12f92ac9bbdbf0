"""One generator: vLLM's scheduler and the step loop around it, many decoding steps at a time.

This is a model of ``rlhf_dist/engines/vllm.py`` and ``rlhf_dist/actors/generator.py``, which need vLLM: requests begin
in the order of their submission while there is room, wait for the version that they ask for, and end after as many
steps as they have tokens; weights are loaded between two steps. What leaves when is decided by the project's outbox.
"""

from __future__ import annotations

import functools
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.simulation.clock import Clock, Event
from benchmarks.simulation.costs import Costs
from rlhf_dist.actors.outbox import Outbox


@dataclass(frozen=True)
class Sampling:
    """How a generator samples; the names are those of the config."""

    max_num_seqs: int = 256
    in_flight_updates: str = "keep"
    chunk_tokens: int = 2000
    chunk_seconds: float | None = 0.1


@dataclass(slots=True)
class Sample:
    """The outbox reads the first four."""

    lane: int
    group_id: int
    sample_index: int
    response_ids: range
    prompt_tokens: int
    version: int
    """No token comes from older weights."""
    began: int = 0
    """The version of its first token."""
    version_sum: float = 0.0
    """Over its tokens; the engine's own sum while it runs."""

    def __lt__(self, other: Sample) -> bool:
        return (self.group_id, self.sample_index) < (other.group_id, other.sample_index)


class Generator:
    """Decodes what is submitted.

    Args:
        arrived: gets the samples of a chunk; not called any more after :meth:`kill`.
        served: gets every version when its load is over.
    """

    def __init__(
        self,
        clock: Clock,
        costs: Costs,
        sampling: Sampling,
        arrived: Callable[[list[Sample]], None],
        served: Callable[[int], None],
        version: int = -1,
    ) -> None:
        self.clock, self.costs, self.sampling = clock, costs, sampling
        self.arrived, self.served = arrived, served
        self.outbox = Outbox(sampling.chunk_tokens, sampling.chunk_seconds, lambda: clock.now)
        self.version = version
        self.alive = True
        self.queue: deque[Sample] = deque()
        self.running: list[tuple[int, Sample]] = []
        self.loads: deque[int] = deque()
        self.steps = self.context = 0
        self.tokens = 0
        """Sampled, those of responses that came to nothing included."""
        self._version_sum = 0.0
        self._prefill = 0.0
        self._busy = 0.0
        self._since = 0.0
        self._until: float | None = None
        """What goes on ends then; None: idle."""
        self._stretch = 0
        """Steps that go on; 0: a load, or nothing."""
        self._wake: Event | None = None

    def submit(self, lane: int, groups: Sequence[tuple[int, int, Sequence[int]]], version: int) -> None:
        """Queue ``(group, tokens of its prompt, tokens of each response)``."""
        self.outbox.expect(lane, version, [group for group, *_ in groups], len(groups[0][2]))
        for group, prompt, lengths in groups:
            self.queue += [Sample(lane, group, i, range(n), prompt, version) for i, n in enumerate(lengths)]
        self._command()

    def load(self, version: int) -> None:
        """Weights have arrived; they are loaded between two steps."""
        self.loads.append(version)
        self._command()

    def drop(self, lane: int) -> None:
        """Give up what a lane has here, at the end of the current step."""
        decoding = self._stretch > 0
        if decoding:
            self._stop(self._steps_so_far())
        self.queue = deque(s for s in self.queue if s.lane != lane)
        self.running = [(end, s) for end, s in self.running if s.lane != lane]
        heapq.heapify(self.running)
        self.context = sum(s.prompt_tokens + len(s.response_ids) - (end - self.steps) for end, s in self.running)
        self.outbox.drop(lane)
        if decoding:
            self._turn()

    def kill(self) -> None:
        """The step that is not over yet gives no tokens."""
        self._stop(self._steps_so_far() - 1 if self._stretch else 0)
        self.alive = False

    def busy(self) -> float:
        """Seconds of decoding and loading so far."""
        return self._busy + (min(self.clock.now, self._until) - self._since if self._until is not None else 0.0)

    def _command(self) -> None:
        """Look at the queues between this step and the next one."""
        if self._until is None:
            self._again(0.0)
        elif self._stretch > 1 and (steps := self._steps_so_far()) < self._stretch:
            self._decode(steps)

    def _steps_so_far(self) -> int:
        """Of the stretch that goes on, with the step that is not over yet."""
        seconds = self.clock.now - self._since - self._prefill
        return min(self._stretch, self.costs.steps_in(max(0.0, seconds), len(self.running), self.context))

    def _decode(self, steps: int) -> None:
        """Let the stretch that began at ``_since`` go on until ``steps`` of it are over."""
        self._stretch = steps
        seconds = self._prefill + self.costs.stretch(steps, len(self.running), self.context)
        self._again(max(0.0, self._since + seconds - self.clock.now))

    def _again(self, seconds: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        if self._until is None:
            self._since = self.clock.now
        self._until = self.clock.now + seconds
        self._wake = self.clock.after(seconds, self._stretch_over)

    def _stretch_over(self) -> None:
        self._stop(self._stretch)
        self._turn()

    def _stop(self, steps: int) -> None:
        """Enter ``steps`` of the stretch, or the load, into the books."""
        if self._wake is not None:
            self._wake.cancel()
        self._busy = self.busy()
        self._until, self._wake = None, None
        if self._stretch:
            sequences = len(self.running)
            self.steps += steps
            self.tokens += steps * sequences
            self.context += steps * sequences
            self._version_sum += steps * self.version
        self._stretch, self._prefill = 0, 0.0

    def _turn(self) -> None:
        """Between two steps: send what is finished, load, begin, go on."""
        while self.running and self.running[0][0] <= self.steps:
            _, sample = heapq.heappop(self.running)
            self.context -= sample.prompt_tokens + len(sample.response_ids)
            sample.version_sum = self._version_sum - sample.version_sum
            self.outbox.add(sample)
        self.outbox.poll()
        while self.outbox.ready:
            self.clock.after(self.costs.message, functools.partial(self._deliver, self.outbox.get()))
        waits = self.loads and self.sampling.in_flight_updates == "drain" and self.running
        if self.loads and not waits:
            self._load(self.loads.popleft())
            return
        if not waits:
            self._begin()
        if self.running:
            self._since = self.clock.now
            steps = self.running[0][0] - self.steps
            if (due := self.outbox.due) is not None:
                left = due - self.clock.now - self._prefill
                steps = min(steps, self.costs.steps_in(max(0.0, left), len(self.running), self.context))
            self._decode(steps)

    def _deliver(self, chunk: list[Sample]) -> None:
        if self.alive:
            self.arrived(chunk)

    def _begin(self) -> None:
        while self.queue and self.queue[0].version <= self.version and len(self.running) < self.sampling.max_num_seqs:
            sample = self.queue.popleft()
            sample.began, sample.version_sum = self.version, self._version_sum
            if sample.sample_index == 0:
                self._prefill += self.costs.prefill * sample.prompt_tokens
            self.context += sample.prompt_tokens
            heapq.heappush(self.running, (self.steps + len(sample.response_ids), sample))

    def _load(self, version: int) -> None:
        seconds = self.costs.load
        if self.sampling.in_flight_updates == "recompute":
            seconds += self.costs.prefill * self.context

        def over() -> None:
            self._stop(0)
            self.version = version
            self.served(version)
            self._turn()

        self._since = self.clock.now
        self._until = self.clock.now + seconds
        self._wake = self.clock.after(seconds, over)


def ages(chunk: Sequence[Any]) -> dict[int, tuple[int, float, int]]:
    """Of each group of a chunk: the oldest version, the sum of the versions of its tokens, and their number."""
    found: dict[int, tuple[int, float, int]] = {}
    for sample in chunk:
        oldest, total, tokens = found.get(sample.group_id, (sample.began, 0.0, 0))
        n = len(sample.response_ids)
        found[sample.group_id] = (min(oldest, sample.began), total + sample.version_sum, tokens + n)
    return found
