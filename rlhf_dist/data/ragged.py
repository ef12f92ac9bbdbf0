"""List columns of Arrow tables as NumPy arrays, without a copy and without torch: the driver imports this too."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa


class Ragged(NamedTuple):
    """A list column without a copy: row ``i`` is ``values[offsets[i]:offsets[i+1]]``."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:  # type: ignore[override]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Lengths of some rows, without a look at the others."""
        return self.offsets[rows + 1] - self.offsets[rows]

    @classmethod
    def of(cls, table: pa.Table, column: str) -> Ragged:
        chunks = table[column]
        data = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()  # the latter always copies
        return cls(data.values.to_numpy(zero_copy_only=True), data.offsets.to_numpy())

    @staticmethod
    def to_arrow(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
        """Flat values and the length of each row to an Arrow list column."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
