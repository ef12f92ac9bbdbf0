"""Every fault of a table is refused with the column or row named."""

from __future__ import annotations

import pyarrow as pa
import pytest
from tiny import experience, ragged, rollouts

from rlhf_dist import schema

SHAPE = [(2, 3), (1, 0), (3, 2)]


def test_a_good_table_is_returned_as_it_is() -> None:
    table = rollouts(SHAPE)
    assert schema.check(table, schema.ROLLOUT, "test") is table
    assert schema.check(experience(SHAPE), schema.EXPERIENCE, "test").num_rows == 3


def test_extra_columns_are_allowed() -> None:
    table = rollouts(SHAPE).append_column("reward", pa.array([1, 2, 3]))
    assert schema.check(table, schema.ROLLOUT, "test") is table


@pytest.mark.parametrize("name", schema.ROLLOUT.names)
def test_a_missing_column(name: str) -> None:
    with pytest.raises(ValueError, match=f"generator: column '{name}' is missing; the table has"):
        schema.check(rollouts(SHAPE).drop_columns(name), schema.ROLLOUT, "generator")


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("group_id", pa.int32(), "column 'group_id' has type int32, expected int64"),
        ("response_ids", pa.list_(pa.int64()), r"column 'response_ids' has type list<.*int64>, expected list<.*int32>"),
        ("rollout_logprobs", pa.list_(pa.float64()), r"has type list<.*double>, expected list<.*float>"),
        ("response_mask", pa.list_(pa.int32()), r"column 'response_mask' has type list<.*int32>, expected"),
        ("finish_reason", pa.string(), r"column 'finish_reason' has type string, expected dictionary"),
    ],
)
def test_a_wrong_type(name: str, wrong: pa.DataType, message: str) -> None:
    table = rollouts(SHAPE)
    i = table.column_names.index(name)
    with pytest.raises(ValueError, match=message):
        schema.check(table.set_column(i, name, table[name].cast(wrong)), schema.ROLLOUT, "generator")


def test_null_values() -> None:
    table = rollouts(SHAPE)
    i = table.column_names.index("group_id")
    broken = table.set_column(i, "group_id", pa.array([0, None, None], pa.int64()))
    with pytest.raises(ValueError, match="column 'group_id' has 2 null values"):
        schema.check(broken, schema.ROLLOUT, "generator")


@pytest.mark.parametrize("name", schema.PER_TOKEN)
def test_a_per_token_column_of_another_length(name: str) -> None:
    table = experience(SHAPE)
    i = table.column_names.index(name)
    kind = table.schema.field(name).type.value_type
    broken = table.set_column(i, name, ragged([3, 0, 1], lambda n: [0] * n, kind))
    with pytest.raises(ValueError, match=f"column '{name}' has 1 elements in row 2, but response_ids has 2"):
        schema.check(broken, schema.EXPERIENCE, "experience")


def test_with_columns_adds_without_a_copy() -> None:
    table = rollouts(SHAPE)
    column = pa.array([0.5, 1.0, 1.5], pa.float32())
    joined = schema.with_columns(table, pa.table({"score": column, "score/model": column}), "reward")
    assert joined.column_names == [*table.column_names, "score", "score/model"]
    assert joined["score"].chunk(0).buffers()[1].address == column.buffers()[1].address


def test_with_columns_refuses_other_rows() -> None:
    with pytest.raises(ValueError, match="reward: got 2 rows for a table of 3"):
        schema.with_columns(rollouts(SHAPE), pa.table({"score": pa.array([1.0, 2.0], pa.float32())}), "reward")


def test_with_columns_refuses_what_is_there() -> None:
    with pytest.raises(ValueError, match="reward: column 'score' exists already"):
        score = pa.table({"score": pa.array([0.0] * 3, pa.float32())})
        schema.with_columns(experience(SHAPE), score, "reward")


@pytest.mark.parametrize("name", ["score", "score/model"])
def test_a_score_may_be_missing_until_the_batch_is_complete(name: str) -> None:
    columns = pa.table({name: pa.array([1.0, None, 2.0], pa.float32())})
    assert schema.with_columns(rollouts(SHAPE), columns, "reward")[name].null_count == 1


@pytest.mark.parametrize("name", ["metric/gold", "ref_logprobs", "other"])
def test_no_other_column_may_have_nulls(name: str) -> None:
    column = pa.array([None] * 3, schema.STAGE_COLUMNS.get(name.split("/")[0], pa.float32()))
    with pytest.raises(ValueError, match=f"stage: column '{name}' has 3 null values"):
        schema.with_columns(rollouts(SHAPE), pa.table({name: column}), "stage")


def test_nothing_is_trained_without_a_score() -> None:
    table = experience(SHAPE)
    i = table.column_names.index("score")
    broken = table.set_column(i, "score", pa.array([1.0, None, 2.0], pa.float32()))
    with pytest.raises(ValueError, match="experience: column 'score' has 1 null values"):
        schema.check(broken, schema.EXPERIENCE, "experience")


@pytest.mark.parametrize("name", ["score", "score/model"])
def test_with_columns_refuses_a_wrong_type(name: str) -> None:
    with pytest.raises(ValueError, match=f"reward: column '{name}' has type double, expected float"):
        schema.with_columns(rollouts(SHAPE), pa.table({name: pa.array([1.0, 2.0, 3.0])}), "reward")
