"""Simulated time: events in order, and a driver that is plain code and waits for them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Event:
    """A call at a time; :meth:`cancel` takes it back."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        self.call = None


class Clock:
    """Seconds since the start. What the driver calls at a time comes before what happens later, never after it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, call: Callable[[], object]) -> Event:
        """Have ``call`` made in ``seconds``; equal times keep the order in which they were asked for."""
        event = Event(call)
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))
        return event

    def until(self, condition: Callable[[], bool]) -> None:
        """Let time pass until the condition holds; errors of events come out here.

        Raises:
            RuntimeError: nothing is left that could change it.
        """
        while not condition():
            if not self._events:
                raise RuntimeError(f"at {self.now:g} s the simulated driver waits for ever: no event is left")
            self.now, _, event = heapq.heappop(self._events)
            if event.call is not None:
                event.call()

    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""
        over: list[bool] = []
        self.after(max(0.0, seconds), lambda: over.append(True))
        self.until(lambda: bool(over))
