"""Arrow schemas of everything that travels between processes.

One row of a rollout table is one sample. The generator makes the columns of
``ROLLOUT``; every later stage returns a table of *new* columns for the same
rows, and :func:`with_columns` puts them beside the old ones without a copy.

Ragged columns are Arrow lists. Columns of the response (``*_logprobs``,
``values``, ``advantages`` ...) have exactly one element per response token.
"""

from __future__ import annotations

import pyarrow as pa

_ids = pa.list_(pa.int32())
_floats = pa.list_(pa.float32())

#: ``sample_index`` of the greedy response to a prompt. It is scored and never trained: its ``response_mask`` is 0.
GREEDY = -1

#: Tokenized prompts. ``fields`` is the source row as JSON: reward functions and tables by group read it.
PROMPT = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("prompt_ids", _ids),
        ("prompt", pa.string()),
        ("fields", pa.string()),
    ]
)

#: Tokenized demonstrations (SFT). The loss is on ``response_ids`` only.
DEMONSTRATION = pa.schema([("prompt_ids", _ids), ("response_ids", _ids)])

#: Tokenized comparisons (reward model). ``preference`` is the share of the annotators who prefer the chosen side, 0.5
#: or more; ``margin`` is 0 where none is given.
COMPARISON = pa.schema(
    [
        ("prompt_ids", _ids),
        ("chosen_ids", _ids),
        ("rejected_ids", _ids),
        ("preference", pa.float32()),
        ("margin", pa.float32()),
        ("source", pa.string()),
    ]
)

#: Tokenized rankings (K-wise reward model) of K responses each. ``preferences`` has a number for each of the K(K-1)/2
#: pairs, in the order (1, 2), (1, 3) ... (K-1, K): the probability that the first is the better one, 0.5 for a tie, NaN
#: where they are not compared.
RANKING = pa.schema(
    [
        ("prompt_ids", _ids),
        ("responses", pa.list_(_ids)),
        ("preferences", _floats),
    ]
)

#: What the generator returns for each sample.
ROLLOUT = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("group_id", pa.int64()),
        ("sample_index", pa.int32()),
        ("prompt_ids", _ids),
        ("response_ids", _ids),
        ("rollout_logprobs", _floats),
        ("policy_version", pa.list_(pa.int32())),
        ("finish_reason", pa.dictionary(pa.int32(), pa.string())),
        # Arrow's bool is packed in bits and cannot be read without a copy.
        ("response_mask", pa.list_(pa.uint8())),
    ]
)

#: Columns added by later stages. Reward components add ``score/NAME``, other figures ``metric/NAME``.
STAGE_COLUMNS: dict[str, pa.DataType] = {
    "score": pa.float32(),
    "metric": pa.float32(),
    "ref_logprobs": _floats,
    "old_logprobs": _floats,
    "values": _floats,
    "rewards": _floats,
    "advantages": _floats,
    "returns": _floats,
    # k numbers for each response token, one after the other: more than 2^31 in a column soon.
    "teacher_ids": pa.large_list(pa.int32()),
    "teacher_logprobs": pa.large_list(pa.float32()),
}

#: Stage columns that may hold nulls until the batch is complete: samples whose reward was given up.
NULLABLE = ("score",)

#: What the learners read in ``update``; with a critic also ``values`` and ``returns``, and ``old_logprobs`` unless the
#: update's own pass has them (``Config.recomputes_logprobs``).
EXPERIENCE = pa.schema(
    [
        *ROLLOUT,
        ("score", pa.float32()),
        *[(name, _floats) for name in ("rewards", "advantages")],
    ]
)

#: Columns in which NaN has a meaning.
MAY_BE_NAN = ("preferences",)

#: Columns with one element per response token.
PER_TOKEN = (
    "rollout_logprobs",
    "policy_version",
    "response_mask",
    "ref_logprobs",
    "old_logprobs",
    "values",
    "rewards",
    "advantages",
    "returns",
)


def check(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return ``table`` if it holds every column of ``schema`` with its type; extra columns are allowed.

    Raises:
        ValueError: names the column, its type and the expected type, or the row
            of a per-token column whose length differs from ``response_ids``.
    """
    for field in schema:
        if field.name not in table.column_names:
            raise ValueError(f"{where}: column {field.name!r} is missing; the table has {table.column_names}")
        found = table.schema.field(field.name).type
        if found != field.type:
            raise ValueError(f"{where}: column {field.name!r} has type {found}, expected {field.type}")
        if table[field.name].null_count:
            raise ValueError(f"{where}: column {field.name!r} has {table[field.name].null_count} null values")
    if "response_ids" in table.column_names:
        _check_token_lengths(table, where)
    return table


def _check_token_lengths(table: pa.Table, where: str) -> None:
    import pyarrow.compute as pc

    expected = pc.list_value_length(table["response_ids"])
    for name in PER_TOKEN:
        if name not in table.column_names:
            continue
        differs = pc.not_equal(pc.list_value_length(table[name]), expected)
        if pc.any(differs).as_py():
            row = pc.index(differs, True).as_py()
            raise ValueError(
                f"{where}: column {name!r} has {len(table[name][row])} elements in row {row}, "
                f"but response_ids has {len(table['response_ids'][row])}"
            )


def with_columns(table: pa.Table, columns: pa.Table, where: str) -> pa.Table:
    """``table`` with the columns of ``columns`` added; both have the same rows in the same order. No copy.

    Raises:
        ValueError: if the row counts differ, a column exists already, has the wrong type, or nulls where none may be.
    """
    if columns.num_rows != table.num_rows:
        raise ValueError(f"{where}: got {columns.num_rows} rows for a table of {table.num_rows}")
    for field in columns.schema:
        if field.name in table.column_names:
            raise ValueError(f"{where}: column {field.name!r} exists already")
        kind = field.name.split("/")[0]
        expected = STAGE_COLUMNS.get(kind)
        if expected is not None and field.type != expected:
            raise ValueError(f"{where}: column {field.name!r} has type {field.type}, expected {expected}")
        if kind not in NULLABLE and columns[field.name].null_count:
            raise ValueError(f"{where}: column {field.name!r} has {columns[field.name].null_count} null values")
        table = table.append_column(field, columns[field.name])
    return table
