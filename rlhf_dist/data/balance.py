"""Which generator samples which group: always the one with the least work outstanding.

A plain state machine like :mod:`rlhf_dist.data.ledger`. Groups wait here, not at
the generators, for as long as every generator is full: one that gets through
its long responses sooner takes the next group, whoever was meant to.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

#: What names a group.
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Load:
    """What a group costs."""

    sequences: int
    tokens: float
    """Expected tokens, of prompt and responses."""


class MeanLength:
    """Running mean of the tokens of a response: what the next one is expected to have."""

    def __init__(self) -> None:
        self.tokens = 0.0

    def seen(self, tokens: float) -> None:
        """The mean length of a group that has finished."""
        self.tokens = 0.99 * self.tokens + 0.01 * tokens if self.tokens else tokens

    def load(self, sequences: int) -> Load:
        """Of a group that is about to be sampled."""
        return Load(sequences, sequences * max(1.0, self.tokens))


def capacity(generators: int, max_num_seqs: int) -> int | None:
    """Sequences that a generator takes before others wait: see :class:`Balancer`.

    A quarter more than an engine decodes at once, so that it never waits for the driver.
    """
    return max_num_seqs + math.ceil(max_num_seqs / 4) if generators > 1 else None


class Balancer(Generic[Key]):
    """Groups and the generators that hold them.

    Args:
        capacity: sequences that a generator takes before others wait; None: all at once, where there is one
            generator and nobody to share with.
    """

    def __init__(self, generators: int, capacity: int | None) -> None:
        self.capacity = capacity
        self.waiting: deque[tuple[Key, Load]] = deque()
        self.held: list[dict[Key, Load]] = [{} for _ in range(generators)]
        self.open = [True] * generators
        """Whether a generator takes work."""
        self.sequences = [0] * generators
        self.tokens = [0.0] * generators
        """Expected, outstanding at each generator."""

    def add(self, group: Key, load: Load) -> None:
        self.waiting.append((group, load))

    def assign(self) -> dict[int, list[Key]]:
        """Give waiting groups to generators that have room; returns the new groups of each."""
        given: dict[int, list[Key]] = {}
        if not self.waiting:
            return given
        room = [(tokens, i) for i, tokens in enumerate(self.tokens) if self._has_room(i)]
        heapq.heapify(room)
        while self.waiting and room:
            _, place = heapq.heappop(room)
            group, load = self.waiting.popleft()
            self._hold(place, group, load)
            given.setdefault(place, []).append(group)
            if self._has_room(place):
                heapq.heappush(room, (self.tokens[place], place))
        return given

    def _has_room(self, generator: int) -> bool:
        # Not "room for the whole group": a group larger than the capacity must go somewhere too.
        return self.open[generator] and (self.capacity is None or self.sequences[generator] < self.capacity)

    def finished(self, generator: int, group: Key) -> None:
        """Raises KeyError if the generator does not hold the group."""
        load = self.held[generator].pop(group)
        self.sequences[generator] -= load.sequences
        self.tokens[generator] -= load.tokens

    def lost(self, generator: int) -> list[Key]:
        """The groups of a generator that died; they wait again, before all others, for one that takes work."""
        self.open[generator] = False
        groups = list(self.held[generator].items())
        self.waiting.extendleft(reversed(groups))
        self.held[generator] = {}
        self.sequences[generator], self.tokens[generator] = 0, 0.0
        return [group for group, _ in groups]

    def joined(self, generator: int) -> None:
        """A generator that was lost takes work again."""
        self.open[generator] = True

    def forget(self, keys: Iterable[Key]) -> None:
        """Groups that nobody wants any more, wherever they are."""
        gone = set(keys)
        self.waiting = deque((key, load) for key, load in self.waiting if key not in gone)
        for generator, held in enumerate(self.held):
            for key in gone & held.keys():
                self.finished(generator, key)

    def _hold(self, generator: int, group: Key, load: Load) -> None:
        self.held[generator][group] = load
        self.sequences[generator] += load.sequences
        self.tokens[generator] += load.tokens
