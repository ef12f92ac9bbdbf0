"""Who did what when: spans of every process in one ``trace.json`` (opens in https://ui.perfetto.dev).

The driver and each actor own a :class:`Trace`; actors return ``trace.drain()`` with their results and the driver
adds that to its own. A span is a plain dict, so that it travels through Ray without this package::

    {"name": "update", "process": "policy", "start": 1700000000.0, "end": 1700000001.5, "args": {"step": 3}}

Times are unix seconds of the machine that made the span: processes on different machines are shown as their clocks
say. The format is the Trace Event Format of Chrome, complete events (``ph: X``) in microseconds.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypedDict

import psutil

from rlhf_dist.observability.files import jsonable, write_atomically


class Span(TypedDict):
    name: str
    process: str
    start: float
    end: float
    args: dict[str, Any]


class Trace:
    """Collects spans; keeps the newest ``max_events`` and counts the ones left out."""

    def __init__(self, max_events: int = 100_000) -> None:
        self._spans: deque[Span] = deque(maxlen=max_events)
        self._seen = 0
        self._lock = Lock()

    @contextmanager
    def span(self, process: str, name: str, **args: Any) -> Iterator[dict[str, Any]]:
        """Record the body as a span in the row of ``process``; an exception is noted in ``args`` and goes on.

        Yields ``args``, to which the body may add.

        Example:
            with trace.span("policy", "update", step=3):
                ...
        """
        start, clock = time.time(), time.perf_counter()
        try:
            yield args
        except BaseException as error:
            args["error"] = type(error).__name__
            raise
        finally:
            # The wall clock may be set while the body runs; its difference would be no duration.
            end = start + time.perf_counter() - clock
            self.add([{"name": name, "process": process, "start": start, "end": end, "args": args}])

    def born(self, process: str) -> None:
        """What came before the first line of ours in this process: the interpreter, Ray, imports; span ``python``."""
        began = psutil.Process().create_time()
        self.add([{"name": "python", "process": process, "start": began, "end": time.time(), "args": {}}])

    def add(self, spans: Iterable[Span]) -> None:
        """Add spans made elsewhere."""
        with self._lock:
            for span in spans:
                self._seen += 1
                self._spans.append(span)

    def drain(self) -> list[Span]:
        """All spans, which are then no longer held here: what an actor sends to the driver."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
            self._seen -= len(spans)
        return spans

    @property
    def left_out(self) -> int:
        """Spans that were dropped to bound the memory."""
        return self._seen - len(self._spans)

    def write(self, path: str | Path) -> None:
        """Write ``trace.json``: one process row per name in order of first appearance, times from the first span on."""
        with self._lock:
            spans, left_out = sorted(self._spans, key=lambda s: (s["start"], -s["end"])), self.left_out
        origin = spans[0]["start"] if spans else 0.0
        pids: dict[str, int] = {}
        lanes: dict[str, list[list[float]]] = {}
        events: list[dict[str, Any]] = []
        for span in spans:
            process = span["process"]
            if process not in pids:
                pids[process] = len(pids) + 1
                events += _process_row(process, pids[process])
            event = {
                "ph": "X",
                "name": span["name"],
                "pid": pids[process],
                "tid": _lane(lanes.setdefault(process, []), span["start"], span["end"]),
                "ts": round((span["start"] - origin) * 1e6, 1),
                "dur": round(max(0.0, span["end"] - span["start"]) * 1e6, 1),
                "args": jsonable(span["args"], f"args of span {span['name']!r}"),
            }
            events.append(event)
        if left_out:
            text = f"{left_out} earlier spans left out"
            events.append({"ph": "i", "s": "g", "name": text, "pid": 1, "tid": 0, "ts": 0})
        other = {"unix_time_of_zero": origin, "spans_left_out": left_out}
        trace = {"displayTimeUnit": "ms", "otherData": other, "traceEvents": events}
        write_atomically(path, json.dumps(trace, allow_nan=False))


def _process_row(process: str, pid: int) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}},
    ]


def _lane(lanes: list[list[float]], start: float, end: float) -> int:
    """The first lane in which the span stands alone or inside another one; a viewer misdraws spans that only overlap.

    ``lanes`` holds, for each lane, the ends of the spans that are open at ``start``, outermost first.
    """
    for number, open_ends in enumerate(lanes):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if not open_ends or open_ends[-1] >= end:
            open_ends.append(end)
            return number
    lanes.append([end])
    return len(lanes) - 1
