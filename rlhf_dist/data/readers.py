"""Streams raw rows out of files and hub datasets; a faulty row is named by file and line.

    errors = RowErrors("skip")
    examples = list(errors.parsed(read_rows("train.jsonl.gz", errors), lambda row: formats.parse("hh", row)))

Files: .jsonl, .jsonl.gz (also .json.gz), .parquet, .txt (one text a line, also .txt.gz). ``hub:NAME[:SUBSET[:SPLIT]]``
reads a Hugging Face dataset through the optional ``datasets`` library.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

#: Lines of .txt files that separate texts.
SEPARATORS = ("<|endoftext|>",)
KEPT_MESSAGES = 20


class BadRow(ValueError):
    """A row that cannot be used. ``line`` counts from 1 (rows of Parquet files and hub datasets likewise)."""

    def __init__(self, reason: str, file: str = "", line: int = 0) -> None:
        super().__init__(f"{file}:{line}: {reason}" if file else reason)
        self.reason, self.file, self.line = reason, file, line

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str, int]]:
        return type(self), (self.reason, self.file, self.line)  # exceptions travel through Ray pickled


@dataclass(frozen=True)
class RawRow:
    """A row and where it stands."""

    file: str
    line: int
    values: dict[str, Any]


@dataclass
class RowErrors:
    """What happens to faulty rows: ``skip`` counts them and keeps the first messages, ``fail`` raises the first."""

    policy: Literal["skip", "fail"]
    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, error: BadRow) -> None:
        """Count a faulty row. Raises it where the policy is ``fail``."""
        if self.policy == "fail":
            raise error
        self.count += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(str(error))

    def parsed(self, rows: Iterator[RawRow], parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
        """``parse`` of each row; the BadRow that it raises gets file and line."""
        for row in rows:
            try:
                yield parse(row.values)
            except BadRow as error:
                self.add(BadRow(error.reason, row.file, row.line))


def read_rows(path: str, errors: RowErrors, max_rows: int | None = None, hub_split: str = "train") -> Iterator[RawRow]:
    """Rows of a file or of ``hub:NAME[:SUBSET[:SPLIT]]``, at most the first ``max_rows``, in order.

    A .txt line becomes ``{"text": line}``; blank lines and separators are passed over. Lines that cannot be decoded
    go to ``errors``. ``hub_split`` is the split where ``path`` names none.

    Raises:
        ValueError: the file is missing, of unknown kind, damaged, or the dataset cannot be reached.
        BadRow: a faulty line, where ``errors`` says ``fail``.
    """
    if path.startswith("hub:"):
        rows = _hub(path, hub_split)
    else:
        rows = _file(path, errors)
    for i, row in enumerate(rows):
        if i == max_rows:
            return
        yield row


def _file(path: str, errors: RowErrors) -> Iterator[RawRow]:
    if not Path(path).is_file():
        raise ValueError(f"data file {path} does not exist; check data.dir, data.train and data.test")
    name = path.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return _jsonl(path, errors)
    if name.endswith(".txt"):
        return _txt(path, errors)
    if path.endswith(".parquet"):
        return _parquet(path)
    raise ValueError(f"data file {path} is of unknown kind; expected .jsonl, .jsonl.gz, .parquet or .txt")


def _lines(path: str, errors: RowErrors) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
                except UnicodeDecodeError as error:
                    errors.add(BadRow(f"not UTF-8: {error.reason} at byte {error.start}", path, number))
                    continue
                yield number, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"data file {path} is damaged or not gzip: {error}") from None


def _jsonl(path: str, errors: RowErrors) -> Iterator[RawRow]:
    for number, line in _lines(path, errors):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            errors.add(BadRow(f"not JSON: {error.msg} at column {error.colno}", path, number))
            continue
        if isinstance(values, dict):
            yield RawRow(path, number, values)
        else:
            errors.add(BadRow(f"expected a JSON object, got {type(values).__name__}", path, number))


def _txt(path: str, errors: RowErrors) -> Iterator[RawRow]:
    for number, line in _lines(path, errors):
        if line.strip() and line.strip() not in SEPARATORS:
            yield RawRow(path, number, {"text": line.strip()})


def _parquet(path: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"data file {path} is not Parquet: {error}") from None
    with file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield RawRow(path, number, values)


def _hub(path: str, default_split: str) -> Iterator[RawRow]:
    name, subset, split, *rest = [*path.removeprefix("hub:").split(":"), "", ""]
    if not name or any(rest):
        raise ValueError(f"{path!r} must read hub:NAME[:SUBSET[:SPLIT]], for example hub:Anthropic/hh-rlhf")
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path} needs the `datasets` library: pip install datasets, or give a local file") from None
    try:
        stream = datasets.load_dataset(name, subset or None, split=split or default_split, streaming=True)
    except (OSError, ValueError) as error:  # also the library's own errors: they derive from these
        raise ValueError(f"{path} (split {split or default_split}) cannot be read from the hub: {error}") from None
    for number, values in enumerate(stream, start=1):
        yield RawRow(path, number, dict(values))
