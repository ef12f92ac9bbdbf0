"""Streams raw rows out of files and hub datasets; a faulty row is named by file and line.

    errors = RowErrors("skip")
    examples = list(errors.parsed(read_rows("train.jsonl.gz", errors), lambda row: formats.parse("hh", row)))
    errors.faults  # Counter({"turns do not alternate": 5, "prompts differ": 4})

Files: .jsonl; .json (one array of objects, or one object a line); .txt (one text a line), all of them also with .gz;
.parquet. ``hub:NAME[:SUBSET[:SPLIT]]`` reads a Hugging Face dataset through the optional ``datasets`` library.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

#: Lines of .txt files that separate texts.
SEPARATORS = ("<|endoftext|>",)
KEPT_MESSAGES = 20


#: What can be wrong with a row. Faults are counted by these kinds; the reason of each says what it is in this row.
Fault = Literal[
    "not UTF-8",
    "not JSON",
    "not an object",
    "missing key",
    "wrong type",
    "empty text",
    "no turn",
    "text before the first turn",
    "turns do not alternate",
    "empty turn",
    "empty response",
    "tag inside a line",
    "last turn not the assistant's",
    "last turn not the user's",
    "system message not first",
    "unknown role",
    "prompts differ",
    "same text",
    "no response",
    "too few responses",
    "wrong labels",
    "wrong margin",
    "no final number",
]


class BadRow(ValueError):
    """A row that cannot be used. ``line`` counts from 1 (rows of arrays, Parquet files and hub datasets likewise)."""

    def __init__(self, kind: Fault, reason: str, file: str = "", line: int = 0) -> None:
        super().__init__(f"{file}:{line}: {reason}" if file else reason)
        self.kind, self.reason, self.file, self.line = kind, reason, file, line

    def __reduce__(self) -> tuple[type[BadRow], tuple[Fault, str, str, int]]:
        return type(self), (self.kind, self.reason, self.file, self.line)  # exceptions travel through Ray pickled


@dataclass(frozen=True)
class RawRow:
    """A row and where it stands."""

    file: str
    line: int
    values: dict[str, Any]


@dataclass
class RowErrors:
    """What happens to faulty rows: ``skip`` counts them by kind and keeps the first messages; ``fail`` raises."""

    policy: Literal["skip", "fail"]
    faults: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)

    def add(self, error: BadRow) -> None:
        """Count a faulty row. Raises it where the policy is ``fail``."""
        if self.policy == "fail":
            raise error
        self.faults[error.kind] += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(str(error))

    @property
    def count(self) -> int:
        """Faulty rows of all kinds."""
        return self.faults.total()

    def parsed(self, rows: Iterator[RawRow], parse: Callable[[dict[str, Any]], Iterable[T]]) -> Iterator[T]:
        """What ``parse`` makes of each row, one thing or several; the BadRow that it raises gets file and line."""
        for row in rows:
            try:
                found = parse(row.values)
            except BadRow as error:
                self.add(BadRow(error.kind, error.reason, row.file, row.line))
            else:
                yield from found


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
    if name.endswith(".json") and _begins_with(path, b"["):
        return _array(path, errors)
    if name.endswith((".jsonl", ".json")):
        return _jsonl(path, errors)
    if name.endswith(".txt"):
        return _txt(path, errors)
    if path.endswith(".parquet"):
        return _parquet(path)
    raise ValueError(f"data file {path} is of unknown kind; expected .jsonl, .jsonl.gz, .json, .parquet or .txt")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        try:
            yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"data file {path} is damaged or not gzip: {error}") from None


def _begins_with(path: str, character: bytes) -> bool:
    with _opened(path) as file:
        texts = (line.strip(codecs.BOM_UTF8 + b" \t\r\n") for line in file)
        return next((text for text in texts if text), b"").startswith(character)


def _lines(path: str, errors: RowErrors) -> Iterator[tuple[int, str]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                errors.add(BadRow("not UTF-8", f"not UTF-8: {error.reason} at byte {error.start}", path, number))
                continue
            yield number, text


def _jsonl(path: str, errors: RowErrors) -> Iterator[RawRow]:
    for number, line in _lines(path, errors):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            errors.add(BadRow("not JSON", f"not JSON: {error.msg} at column {error.colno}", path, number))
            continue
        yield from _object(values, path, number, errors)


def _array(path: str, errors: RowErrors) -> Iterator[RawRow]:
    with _opened(path) as file:
        try:
            rows = json.load(file)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
            raise ValueError(f"data file {path} is no JSON array: {error}") from None
    for number, values in enumerate(rows, start=1):
        yield from _object(values, path, number, errors)


def _object(values: Any, path: str, number: int, errors: RowErrors) -> Iterator[RawRow]:
    if isinstance(values, dict):
        yield RawRow(path, number, values)
    else:
        errors.add(BadRow("not an object", f"expected a JSON object, got {type(values).__name__}", path, number))


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
