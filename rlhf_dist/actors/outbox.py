"""Finished samples on their way out of a generator, coalesced into chunks worth sending."""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Lane:
    """What a lane still expects, and what of it is finished and not sent."""

    samples: int
    """Of each group."""
    wave: dict[int, int] = field(default_factory=dict)
    """Of unfinished groups, the version with which they were submitted."""
    unfinished: Counter[int] = field(default_factory=Counter)
    """Groups of each wave."""
    partial: dict[int, list[Any]] = field(default_factory=dict)
    chunk: list[Any] = field(default_factory=list)
    tokens: int = 0
    since: float = 0.0


class Outbox:
    """The engine's thread fills it, callers of :meth:`get` empty it.

    A chunk leaves when it has enough tokens, when its last group is the last that was submitted with its version (so
    the end of a batch never waits), or when it has waited long enough.

    Args:
        chunk_tokens: response tokens that are worth a chunk.
        seconds: that a finished group waits at most; None: without limit, chunks then depend on lengths alone.
        clock: says the time in seconds; default: the machine's.
    """

    def __init__(self, chunk_tokens: int, seconds: float | None, clock: Callable[[], float] | None = None) -> None:
        self.chunk_tokens = chunk_tokens
        self.seconds = seconds
        self._clock = clock or time.monotonic
        self._lanes: dict[int, _Lane] = {}
        self._ready: queue.Queue[Any] = queue.Queue()

    def expect(self, number: int, version: int, groups: Sequence[int], samples: int) -> None:
        """Groups that are about to be sampled for a lane."""
        lane = self._lanes.setdefault(number, _Lane(samples))
        lane.wave |= dict.fromkeys(groups, version)
        lane.unfinished[version] += len(groups)

    def add(self, sample: Any) -> None:
        """One finished sample, of a group that is expected."""
        lane = self._lanes[sample.lane]
        group = lane.partial.setdefault(sample.group_id, [])
        group.append(sample)
        if len(group) < lane.samples:
            return
        if not lane.chunk:
            lane.since = self._clock()
        lane.chunk += sorted(lane.partial.pop(sample.group_id), key=lambda s: s.sample_index)
        lane.tokens += sum(len(s.response_ids) for s in group)
        wave = lane.wave.pop(sample.group_id)
        lane.unfinished[wave] -= 1
        if lane.tokens >= self.chunk_tokens or not lane.unfinished[wave]:
            self._send(sample.lane)

    def drop(self, number: int) -> None:
        """Forget a lane; chunks that are ready are sent all the same."""
        self._lanes.pop(number, None)

    def poll(self) -> None:
        """Send what has waited long enough; the engine's thread calls it after every step."""
        if self.seconds is None:
            return
        now = self._clock()
        for number in [i for i, lane in self._lanes.items() if lane.chunk and lane.since + self.seconds <= now]:
            self._send(number)

    @property
    def due(self) -> float | None:
        """When :meth:`poll` has something to send, by the clock; None: nothing waits, or without limit."""
        if self.seconds is None:
            return None
        return min((lane.since + self.seconds for lane in self._lanes.values() if lane.chunk), default=None)

    @property
    def ready(self) -> int:
        """Chunks that :meth:`get` returns without blocking."""
        return self._ready.qsize()

    def fail(self, error: BaseException) -> None:
        """Nothing comes any more; callers of :meth:`get` get the error."""
        self._ready.put(error)

    def get(self) -> Any:
        """The samples of the next chunk, group by group, or the error that ended the engine; blocks until then."""
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self._ready.put(ready)
        return ready

    def _send(self, number: int) -> None:
        lane = self._lanes[number]
        self._ready.put(lane.chunk)
        lane.chunk, lane.tokens = [], 0
        lane.unfinished = +lane.unfinished
        if not lane.unfinished:
            del self._lanes[number]
