"""Tables on disk that are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write(table: pa.Table, path: Path) -> None:
    """Write a Parquet file, and its folder if need be, so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    pq.write_table(table, partial)
    partial.rename(path)
