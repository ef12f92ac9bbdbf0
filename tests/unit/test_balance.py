"""Dealing groups to generators."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data.balance import Balancer, Load, MeanLength, capacity


def test_least_tokens_first() -> None:
    balancer = Balancer(2, capacity=None)
    for group, tokens in enumerate([100, 10, 10, 10]):
        balancer.add(group, Load(1, tokens))
    assert balancer.assign() == {0: [0], 1: [1, 2, 3]}


def test_what_a_group_is_expected_to_cost() -> None:
    lengths = MeanLength()
    assert lengths.load(4) == Load(4, 4.0), "nothing is known yet"
    lengths.seen(100.0)
    assert lengths.load(4) == Load(4, 400.0)
    lengths.seen(200.0)
    assert lengths.load(1).tokens == pytest.approx(101.0)


def test_a_quarter_more_than_is_decoded_at_once() -> None:
    assert capacity(2, 10) == 13
    assert capacity(1, 10) is None, "there is nobody to share with"


def test_groups_wait_while_every_generator_is_full() -> None:
    balancer = Balancer(2, capacity=2)
    for group in range(4):
        balancer.add(group, Load(2, 10))
    assert balancer.assign() == {0: [0], 1: [1]}
    assert balancer.assign() == {}
    balancer.finished(1, 1)
    assert balancer.assign() == {1: [2]}, "the one that got through takes the next"


def test_a_full_generator_is_passed_over_even_with_the_least_tokens() -> None:
    balancer = Balancer(2, capacity=2)
    for group, load in enumerate([Load(2, 1), Load(1, 50), Load(1, 50)]):
        balancer.add(group, load)
    assert balancer.assign() == {0: [0], 1: [1, 2]}


def test_a_group_larger_than_the_capacity_goes_to_an_idle_generator() -> None:
    balancer = Balancer(1, capacity=2)
    balancer.add(0, Load(8, 1))
    assert balancer.assign() == {0: [0]}


def test_what_a_dead_generator_held_goes_first_and_in_order() -> None:
    balancer = Balancer(2, capacity=2)
    for group in range(6):
        balancer.add(group, Load(1, 1))
    assert balancer.assign() == {0: [0, 2], 1: [1, 3]}
    assert balancer.lost(0) == [0, 2]
    balancer.finished(1, 3)
    assert balancer.assign() == {1: [0]}, "the dead one takes nothing"
    balancer.joined(0)
    assert balancer.assign() == {0: [2, 4]}
    balancer.forget([1, 4, 5])
    assert balancer.held == [{2: Load(1, 1)}, {0: Load(1, 1)}]
    assert not balancer.waiting
    with pytest.raises(KeyError):
        balancer.finished(0, 1)


@given(
    generators=st.integers(1, 3),
    capacity=st.one_of(st.none(), st.integers(1, 4)),
    loads=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 50)), max_size=20),
    order=st.randoms(use_true_random=False),
)
def test_every_group_is_given_once(generators: int, capacity: int | None, loads, order) -> None:
    balancer = Balancer(generators, capacity)
    for group, load in enumerate(loads):
        balancer.add(group, Load(*load))
    seen: list[int] = []
    while True:
        seen += [g for groups in balancer.assign().values() for g in groups]
        held = [(i, g) for i, groups in enumerate(balancer.held) for g in groups]
        if not held:
            break
        balancer.finished(*order.choice(held))
    assert sorted(seen) == list(range(len(loads)))
    assert balancer.sequences == [0] * generators
    assert balancer.tokens == [0.0] * generators
