"""Whom a publication of weights waits for, in any order of loads and deaths."""

from __future__ import annotations

import doctest

from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data import serving
from rlhf_dist.data.serving import Serving, Sync


def test_the_example() -> None:
    assert doctest.testmod(serving).failed == 0


def test_with_nobody_there_a_version_waits_for_the_first_who_comes_back() -> None:
    group = Serving(2)
    sync = group.published(0, now=1.0)
    group.lost(0)
    group.lost(1)
    assert group.loading(0) == [0, 1]
    assert group.take_complete() == []
    group.joined(1, {"nbytes": 7}, now=4.0)
    assert group.loading(0) == []
    assert group.take_complete() == [sync]
    assert sync.records == {1: {"nbytes": 7, "serving_seconds": 3.0}}


def test_older_versions_only_are_waited_for() -> None:
    group = Serving(1)
    first, second = group.published(0, now=0.0), group.published(1, now=0.0)
    assert (group.loading(-1), group.loading(0), group.loading(1)) == ([], [0], [0])
    group.loaded(first, 0, {}, now=1.0)
    assert (group.loading(0), group.loading(1)) == ([], [0])
    group.forget()
    assert group.loading(1) == []
    assert group.take_complete() == []
    assert second.records == {}


@given(generators=st.integers(1, 3), events=st.lists(st.tuples(st.sampled_from("pldj"), st.integers(0, 5))))
def test_every_version_completes_once_and_none_before_its_time(generators: int, events: list[tuple[str, int]]) -> None:
    group = Serving(generators)
    published: list[Sync] = []
    complete: list[Sync] = []
    for kind, number in events:
        generator = number % generators
        if kind == "p":
            published.append(group.published(len(published), now=0.0))
        elif kind == "l" and generator in group.live and group.pending:
            group.loaded(group.pending[number % len(group.pending)], generator, {}, now=0.0)
        elif kind == "d" and generator in group.live:
            group.lost(generator)
        elif kind == "j" and generator not in group.live:
            group.joined(generator, {}, now=0.0)
        new = group.take_complete()
        assert all(sync.records for sync in new)
        assert all(group.live <= sync.records.keys() for sync in new)
        complete += new
        assert sorted(s.version for s in complete + group.pending) == [s.version for s in published]
        # What is waited for is exactly what is pending.
        assert bool(group.loading(len(published))) == bool(group.pending)
