"""Rows whose numbers are not finite: how they are called, and which of their columns are to blame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_dist import schema

#: Columns that say which sample a row is.
IDS = ("prompt_id", "group_id", "sample_index")
#: Column of a saved table: the number of each row in the table that the run read.
ROW = "row"
#: Rows that a message names.
LISTED = 5


@dataclass(frozen=True)
class RowFigures:
    """Loss of one row alone and the norm of its gradient, both as shares of the optimizer step."""

    row: int
    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Source:
    """A table that an update reads, and its rows for each optimizer step."""

    name: str
    """``batch``, or ``pretrain`` for the text of PPO-ptx."""
    table: pa.Table
    minibatches: list[np.ndarray]

    def kept(self) -> Source:
        """Only the rows that the update reads; the column ``row`` has their numbers in the whole table."""
        rows = np.unique(np.concatenate(self.minibatches))
        table = self.table.take(pa.array(rows))
        if ROW not in table.column_names:
            table = table.append_column(ROW, pa.array(rows, pa.int64()))
        return Source(self.name, table, [np.searchsorted(rows, m) for m in self.minibatches])

    def name_of(self, row: int) -> str:
        """As :func:`row_name`; a row of the pretraining text says so."""
        name = row_name(self.table, row)
        return name if self.name == "batch" else f"pretraining text, {name}"

    def describe(self, found: RowFigures) -> str:
        """Name of a row that is not finite, what of it is not, and its columns with such numbers, if there are any."""
        wrong = f"gradient norm {found.grad_norm}" if math.isfinite(found.loss) else f"loss {found.loss}"
        columns = columns_not_finite(self.table, found.row)
        return f"{self.name_of(found.row)} ({wrong}{'; not finite: ' + ', '.join(columns) if columns else ''})"


def row_name(table: pa.Table, row: int) -> str:
    """``prompt_id 7, group_id 12, sample_index 0``, as far as the table has these columns; else ``row 3``."""
    ids = [f"{name} {table[name][int(row)].as_py()}" for name in IDS if name in table.column_names]
    if ids:
        return ", ".join(ids)
    return f"row {table[ROW][int(row)].as_py() if ROW in table.column_names else row}"


def columns_not_finite(table: pa.Table, row: int) -> list[str]:
    """Columns, numbers or lists of numbers, that hold NaN or an infinity in ``row``."""
    return [
        name
        for name in table.column_names
        if name not in schema.MAY_BE_NAN and not _all_finite(table[name].slice(int(row), 1))
    ]


def _all_finite(values: pa.ChunkedArray) -> bool:
    while pa.types.is_list(values.type):
        values = pc.list_flatten(values)
    if not pa.types.is_floating(values.type):
        return True
    return not pc.any(pc.invert(pc.is_finite(values))).as_py()


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - LISTED
    return "; ".join(names[:LISTED]) + (f"; and {more} more" if more > 0 else "")
