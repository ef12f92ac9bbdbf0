"""When a generator sends what it has finished."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Any

import pytest

from rlhf_dist.actors.outbox import Outbox


@dataclass
class Sample:
    lane: int
    group_id: int
    sample_index: int
    response_ids: list[int]


def finish(outbox: Outbox, group: int, tokens: int = 3, samples: int = 2, lane: int = 0) -> None:
    for i in reversed(range(samples)):
        outbox.add(Sample(lane, group, i, [0] * tokens))


def sent(outbox: Outbox) -> list[list[tuple[int, int]]]:
    """Chunks that are ready: group and sample of every row."""
    chunks = []
    while True:
        try:
            chunk: Any = outbox._ready.get_nowait()
        except queue.Empty:
            return chunks
        chunks.append([(s.group_id, s.sample_index) for s in chunk])


def test_a_chunk_leaves_when_it_has_enough_tokens() -> None:
    outbox = Outbox(chunk_tokens=12, seconds=None)
    outbox.expect(0, 0, [5, 6, 7], samples=2)
    finish(outbox, 6)
    assert sent(outbox) == []
    finish(outbox, 5)
    assert sent(outbox) == [[(6, 0), (6, 1), (5, 0), (5, 1)]]


def test_an_incomplete_group_never_leaves() -> None:
    outbox = Outbox(chunk_tokens=1, seconds=None)
    outbox.expect(0, 0, [5], samples=2)
    outbox.add(Sample(0, 5, 0, [0] * 50))
    assert sent(outbox) == []
    outbox.add(Sample(0, 5, 1, [0]))
    assert sent(outbox) == [[(5, 0), (5, 1)]]


def test_the_last_group_of_a_version_takes_all_others_along() -> None:
    outbox = Outbox(chunk_tokens=1000, seconds=None)
    outbox.expect(0, 0, [1, 2], samples=1)
    outbox.expect(0, 1, [3, 4], samples=1)
    finish(outbox, 3, samples=1)
    finish(outbox, 1, samples=1)
    assert sent(outbox) == []
    finish(outbox, 2, samples=1)
    assert sent(outbox) == [[(3, 0), (1, 0), (2, 0)]], "nobody waits for the groups of the next version"
    finish(outbox, 4, samples=1)
    assert sent(outbox) == [[(4, 0)]]


def test_lanes_do_not_mix() -> None:
    outbox = Outbox(chunk_tokens=6, seconds=None)
    for lane in (0, 1):
        outbox.expect(lane, 0, [1, 2], samples=1)
        finish(outbox, 1, samples=1, lane=lane)
    assert sent(outbox) == []
    finish(outbox, 2, samples=1, lane=1)
    assert sent(outbox) == [[(1, 0), (2, 0)]]


def test_a_finished_group_waits_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    outbox = Outbox(chunk_tokens=1000, seconds=0.1)
    outbox.expect(0, 0, [1, 2], samples=1)
    finish(outbox, 1, samples=1)
    now = 100.05
    outbox.poll()
    assert sent(outbox) == []
    now = 100.2
    outbox.poll()
    outbox.poll()
    assert sent(outbox) == [[(1, 0)]]


def test_a_clock_of_the_callers() -> None:
    now = 5.0
    outbox = Outbox(chunk_tokens=1000, seconds=0.1, clock=lambda: now)
    outbox.expect(0, 0, [1, 2], samples=1)
    assert outbox.due is None
    finish(outbox, 1, samples=1)
    assert outbox.due == 5.1
    outbox.poll()
    assert outbox.ready == 0
    now = outbox.due
    outbox.poll()
    assert (outbox.ready, outbox.due) == (1, None)
    assert Outbox(1000, seconds=None).due is None


def test_the_error_that_ended_the_engine_reaches_every_caller() -> None:
    outbox = Outbox(1, None)
    error = RuntimeError("out of memory")
    outbox.fail(error)
    assert [outbox.get(), outbox.get()] == [error, error]
