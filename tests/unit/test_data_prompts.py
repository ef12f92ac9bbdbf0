"""PromptOrder: exactly once per epoch, whatever the sizes of take() and wherever a checkpoint falls."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data.prompts import PromptOrder

sizes = st.lists(st.integers(0, 23), max_size=20)


@given(st.integers(1, 17), st.integers(0, 2**31), st.booleans(), sizes)
def test_every_row_once_per_epoch_across_any_takes(n: int, seed: int, shuffle: bool, takes: list[int]) -> None:
    order = PromptOrder(n, seed, shuffle)
    rows = [row for k in takes for row in order.take(k)]
    assert len(rows) == sum(takes) == order.taken
    assert order.epoch == len(rows) // n
    for epoch in range(order.epoch):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))
    rest = rows[order.epoch * n :]
    assert len(set(rest)) == len(rest)


@given(st.integers(1, 17), st.integers(0, 2**31), st.booleans(), sizes, sizes)
def test_a_restored_order_goes_on_as_if_never_stopped(
    n: int, seed: int, shuffle: bool, before: list[int], after: list[int]
) -> None:
    order = PromptOrder(n, seed, shuffle)
    for k in before:
        order.take(k)
    restored = PromptOrder(n, seed, shuffle)
    restored.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert [restored.take(k) for k in after] == [order.take(k) for k in after]


def test_epochs_differ_and_seeds_differ() -> None:
    order = PromptOrder(50, seed=0)
    first, second = order.take(50), order.take(50)
    assert first != second != list(range(50)) != first
    assert PromptOrder(50, seed=1).take(50) != first
    assert PromptOrder(50, seed=0).take(50) == first


def test_without_shuffle_the_order_is_the_file_s() -> None:
    assert PromptOrder(3, seed=9, shuffle=False).take(7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("change", [{"n_rows": 4}, {"seed": 1}, {"shuffle": False}])
def test_a_state_of_other_data_is_refused(change: dict[str, int]) -> None:
    state = PromptOrder(3, seed=0).state_dict() | change
    with pytest.raises(ValueError, match=next(iter(change))):
        PromptOrder(3, seed=0).load_state_dict(state)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="n_rows=0"):
        PromptOrder(0, seed=0)
