"""From tables to tensors: who gets which row, where each token stands, and that the layout changes no figure."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import comparisons, experience, rankings, rollouts, tiny_llama

from rlhf_dist.data.batching import (
    collate,
    collate_pairs,
    collate_rankings,
    micro_batches,
    pair_lengths,
    partition,
    ranking_lengths,
    sequence_lengths,
)
from rlhf_dist.data.ragged import Ragged
from rlhf_dist.models import PolicyModule, ScalarModule

shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=8)


def example() -> pa.Table:
    """Two rows: prompt 5 6, response 7 8 9 (8 is not trained); prompt 4, response 3."""
    i32, f32 = pa.list_(pa.int32()), pa.list_(pa.float32())
    return pa.table(
        {
            "prompt_ids": pa.array([[5, 6], [4]], i32),
            "response_ids": pa.array([[7, 8, 9], [3]], i32),
            "response_mask": pa.array([[1, 0, 1], [1]], pa.list_(pa.uint8())),
            "advantages": pa.array([[0.1, 0.2, 0.3], [0.4]], f32),
        }
    )


# Which rows


@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    ranks=st.integers(1, 5),
    budget=st.integers(1, 120),
    packing=st.booleans(),
)
def test_every_row_once_within_the_budget_and_all_ranks_in_step(
    lengths: list[int], ranks: int, budget: int, packing: bool
) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    plans = [micro_batches(sizes, ranks, rank, budget, packing) for rank in range(ranks)]
    assert sorted(row for plan in plans for part in plan for row in part) == list(range(len(lengths)))
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) >= 1
    for part in (part for plan in plans for part in plan if len(part) > 1):
        cost = sizes[part].sum() if packing else sizes[part].max() * len(part)
        assert cost <= budget
    assert plans == [micro_batches(sizes, ranks, rank, budget, packing) for rank in range(ranks)]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), ranks=st.integers(1, 5))
def test_ranks_differ_by_at_most_one_row_of_tokens(lengths: list[int], ranks: int) -> None:
    sizes = np.array(lengths)
    tokens = [int(sizes[rows].sum()) for rows in partition(sizes, ranks)]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=9), budget=st.integers(1, 120))
def test_no_other_cut_costs_less(lengths: list[int], budget: int) -> None:
    """Against all ways to cut the rows, longest first."""
    ordered = sorted(lengths, reverse=True)

    def cost(parts: list[list[int]]) -> float:
        return sum(max(part) * len(part) + budget / 16 for part in parts)

    def cuts(rows: list[int]) -> Iterator[list[list[int]]]:
        for n in range(1, len(rows) + 1):
            if n == 1 or rows[0] * n <= budget:
                yield from ([rows[:n], *rest] for rest in (cuts(rows[n:]) if rows[n:] else [[]]))

    sizes = np.array(lengths)
    found = [sizes[part].tolist() for part in micro_batches(sizes, 1, 0, budget)]
    assert cost(found) == pytest.approx(min(map(cost, cuts(ordered))))


def test_equal_lengths_need_no_more_micro_batches_than_fit() -> None:
    assert [len(part) for part in micro_batches(np.full(10, 7), 1, 0, 30)] in ([4, 4, 2], [2, 4, 4], [4, 2, 4])


def test_a_rank_without_rows_gets_dummies() -> None:
    lengths = np.array([10, 10, 10])
    assert micro_batches(lengths, 2, 0, 10) == [[0], [2]]
    assert micro_batches(lengths, 2, 1, 10) == [[1], []]


def test_padding_counts_towards_the_budget() -> None:
    lengths = np.array([9, 1, 1, 1])
    assert micro_batches(lengths, 1, 0, 18) == [[0], [1, 2, 3]]
    assert micro_batches(np.array([9, 9, 9, 8]), 1, 0, 18) == [[0, 1], [2, 3]], "a pass costs more than one token"
    assert micro_batches(lengths, 1, 0, 18, packing=True) == [[0, 1, 2, 3]]


# Where the tokens stand


def test_padded_by_hand() -> None:
    batch = collate(example(), [0, 1], ["advantages"], pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 99, 99, 99]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[0, 7, 8, 9, 0], [3, 0, 0, 0, 0]]
    assert batch.response.int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert batch.last.tolist() == [4, 6]
    assert batch.columns["advantages"].tolist() == torch.tensor([[0, 0.1, 0.2, 0.3, 0], [0.4, 0, 0, 0, 0]]).tolist()
    assert batch.first_label == 0
    assert batch.rows == [0, 1]


def test_packed_by_hand() -> None:
    batch = collate(example(), [1, 0], ["advantages"], packing=True)
    assert batch.input_ids.tolist() == [[4, 3, 5, 6, 7, 8, 9]]
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[3, 0, 0, 7, 8, 9, 0]]
    assert batch.mask.int().tolist() == [[1, 0, 0, 1, 0, 1, 0]]
    assert batch.last.tolist() == [1, 6]
    assert batch.columns["advantages"].tolist() == torch.tensor([[0.4, 0, 0, 0.1, 0.2, 0.3, 0]]).tolist()


def test_without_a_mask_every_response_token_is_trained() -> None:
    batch = collate(example().drop_columns("response_mask"), [0])
    assert batch.mask.equal(batch.response)


@given(shape=shapes, packing=st.booleans(), data=st.data())
def test_columns_come_back_as_they_went_in(shape: list[tuple[int, int]], packing: bool, data: st.DataObject) -> None:
    table = experience(shape)
    rows = data.draw(st.permutations(range(len(shape))))
    batch = collate(table, rows, ["advantages", "old_logprobs"], packing=packing)
    for name in ("advantages", "old_logprobs"):
        column = Ragged.of(table, name)
        expected = np.concatenate([np.empty(0, np.float32), *[column[r] for r in rows]])
        np.testing.assert_array_equal(batch.gather(batch.columns[name]), expected)


def test_a_column_in_one_piece_is_read_without_a_copy() -> None:
    whole = experience([(2, 3), (1, 1)]).combine_chunks()
    pieces = pa.concat_tables([whole, whole])
    assert Ragged.of(whole, "values").values.ctypes.data == whole["values"].chunk(0).values.to_numpy().ctypes.data
    assert [len(Ragged.of(pieces, "values")[i]) for i in range(4)] == [3, 1, 3, 1]


def test_slices_of_a_table_are_read_at_their_own_offsets() -> None:
    table = experience([(2, 3), (1, 1), (4, 2), (3, 5)])
    part = table.slice(2)
    batch = collate(part, [0, 1], ["advantages"])
    expected = np.concatenate([row.as_py() for row in table["advantages"][2:]]).astype(np.float32)
    np.testing.assert_array_equal(batch.gather(batch.columns["advantages"]), expected)
    assert sequence_lengths(part, np.arange(part.num_rows)).tolist() == [6, 8]


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_with_an_empty_response_predicts_nothing(packing: bool) -> None:
    batch = collate(rollouts([(3, 0), (2, 2)]), [0, 1], packing=packing)
    assert int(batch.response.sum()) == 2
    assert batch.last.tolist() == ([2, 6] if packing else [2, 7])


def test_an_empty_prompt_is_refused_by_row() -> None:
    with pytest.raises(ValueError, match="row 2 has an empty prompt; give it at least a BOS token"):
        collate(rollouts([(3, 1), (2, 2), (0, 2)]), [1, 2])


@pytest.mark.parametrize("packing", [False, True])
def test_a_dummy_weighs_nothing(packing: bool) -> None:
    batch = collate(experience([(2, 2)]), [], ["advantages"], packing=packing)
    assert batch.input_ids.shape == (1, 1)
    assert not batch.response.any()
    assert not batch.mask.any()
    assert batch.columns["advantages"].tolist() == [[0.0]]
    assert list(batch.rows) == []


def test_pairs_stand_side_by_side() -> None:
    table = comparisons([(2, 3, 1), (1, 1, 4)])
    batch = collate_pairs(table, [1, 0])
    prompts, chosen, rejected = (table[f"{n}_ids"].to_pylist() for n in ("prompt", "chosen", "rejected"))
    expected = [prompts[1] + chosen[1], prompts[1] + rejected[1], prompts[0] + chosen[0], prompts[0] + rejected[0]]
    assert [ids[: len(e)] for ids, e in zip(batch.input_ids.tolist(), expected, strict=True)] == expected
    assert batch.input_ids.flatten()[batch.last].tolist() == [e[-1] for e in expected]
    assert pair_lengths(table, np.arange(table.num_rows)).tolist() == [2 * 5, 2 * 5]


def test_the_pairs_of_rankings_point_at_their_responses() -> None:
    nan = float("nan")
    table = rankings([(2, [3, 1, 2]), (1, [2, 4])], [[1, 0, 0.5], [nan]])
    batch = collate_rankings(table, [1, 0])
    prompts, responses = table["prompt_ids"].to_pylist(), table["responses"].to_pylist()
    expected = [prompts[r] + ids for r in (1, 0) for ids in responses[r]]
    assert [ids[: len(e)] for ids, e in zip(batch.input_ids.tolist(), expected, strict=True)] == expected
    assert batch.input_ids.flatten()[batch.last].tolist() == [e[-1] for e in expected]
    assert batch.columns["pair"].tolist() == [[2, 3], [2, 4], [3, 4]], "nobody compared the two of row 1"
    assert batch.columns["preference"].tolist() == [1, 0, 0.5]
    assert batch.columns["prompt"].tolist() == [1, 1, 1]
    assert ranking_lengths(table, np.arange(2)).tolist() == [3 * 5, 2 * 5]


# The layout changes no figure


@settings(max_examples=15, deadline=None)
@given(shape=shapes)
def test_padded_and_packed_agree(shape: list[tuple[int, int]]) -> None:
    # Without an attention mask transformers takes the borders from position_ids, for sdpa as for varlen kernels.
    table, rows = rollouts(shape), list(range(len(shape)))
    policy = PolicyModule(POLICY, temperature=0.7)
    with torch.no_grad():
        padded = collate(table, rows)
        packed = collate(table, rows, packing=True)
        for a, b in zip(policy(padded, entropy="yes"), policy(packed, entropy="yes"), strict=True):
            np.testing.assert_allclose(padded.gather(a), packed.gather(b), rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(shape=shapes)
def test_neighbours_in_a_micro_batch_do_not_matter(shape: list[tuple[int, int]]) -> None:
    table = rollouts(shape)
    module = PolicyModule(POLICY)
    with torch.no_grad():
        together = collate(table, range(len(shape)))
        alone = [(one := collate(table, [r])).gather(module(one)[0]) for r in range(len(shape))]
        np.testing.assert_allclose(together.gather(module(together)[0]), np.concatenate(alone), rtol=1e-5, atol=1e-5)


def test_values_agree_in_both_layouts() -> None:
    from transformers import AutoModelForSequenceClassification

    table = rollouts([(3, 2), (1, 5), (4, 0)])
    torch.manual_seed(0)
    config = copy.deepcopy(POLICY.config)
    config.num_labels = 1
    module = ScalarModule(AutoModelForSequenceClassification.from_config(config)).eval()
    with torch.no_grad():
        padded = module.scores(collate(table, [0, 1, 2]))
        packed = module.scores(collate(table, [0, 1, 2], packing=True))
    torch.testing.assert_close(padded, packed, atol=1e-5, rtol=0)
    assert padded.unique().numel() == 3


POLICY = tiny_llama()
