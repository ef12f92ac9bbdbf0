"""Readers and formats: what a row means, and that every fault is named with file, line and reason."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_dist.data import formats
from rlhf_dist.data.formats import Example
from rlhf_dist.data.readers import KEPT_MESSAGES, BadRow, RowErrors, read_rows

GOOD_HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Goodbye!",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Go away.",
    "source": "helpful-base",
}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(path: str, format: str, policy: Any = "skip", purpose: Any = "prompts") -> tuple[list[Example], RowErrors]:
    errors = RowErrors(policy)
    rows = errors.parsed(read_rows(path, errors), lambda row: formats.parse(format, row, purpose))
    return list(rows), errors


def test_hh_splits_prompt_and_responses() -> None:
    row = formats.parse("hh", GOOD_HH)
    assert [m["role"] for m in row.messages or []] == ["user", "assistant", "user"]
    assert [m["content"] for m in row.messages or []] == ["Hi", "Hello.", "Bye"]
    assert (row.response, row.rejected, row.source) == ("Goodbye!", "Go away.", "helpful-base")
    assert row.fields == {"source": "helpful-base"}


def _hh(chosen: str, rejected: str = GOOD_HH["rejected"]) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


FAULTS: list[tuple[str, Any, str]] = [
    ("hh", '{"chosen": "x"', "not JSON"),
    ("hh", "[1, 2]", "expected a JSON object, got list"),
    ("hh", {"chosen": GOOD_HH["chosen"]}, "key 'rejected' is missing"),
    ("hh", _hh("no turns at all"), "has no"),
    ("hh", _hh(""), "'chosen' is empty"),
    ("hh", {"chosen": 3, "rejected": "x"}, "'chosen' must be a string, got int"),
    ("hh", _hh("Preamble\n\nHuman: Hi\n\nAssistant: Ho"), "text before its first turn"),
    ("hh", _hh("\n\nHuman: Hello\n\nAssistant: Hello."), "prompts of 'chosen' and 'rejected' differ"),
    ("hh", _hh("\n\nHuman: Hi\n\nAssistant:"), "turn 2 (Assistant) is empty"),
    ("hh", _hh("\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: x"), "turns do not alternate, turn 2"),
    ("hh", _hh("\n\nAssistant: Hi\n\nHuman: Ho"), "turns do not alternate, turn 1"),
    ("hh", _hh("\n\nHuman: Hi\n\nAssistant: well Human: no"), "tag 'Human:' inside a line"),
    ("hh", _hh("\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Bye"), "last turn is not the Assistant's"),
    ("hh", _hh(GOOD_HH["rejected"]), "are the same text"),
    ("messages", {"messages": []}, "'messages' must be a list"),
    ("messages", {"messages": ["hi"]}, "message 1 must be {role, content}"),
    ("messages", {"messages": [{"role": "bot", "content": "x"}]}, "message 1 has role 'bot'"),
    ("messages", {"messages": [{"role": "user", "content": " "}]}, "message 1 (user) is empty"),
    ("messages", {"messages": [{"role": "assistant", "content": "x"}]}, "user and assistant must alternate"),
    (
        "messages",
        {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        "a system message may stand first only",
    ),
    ("preferences", {"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same text"),
    ("preferences", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}, "'margin' must be a number"),
    ("preferences", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}, "'margin' must be a number"),
    ("preferences", {"prompt": "p", "chosen": "a", "rejected": None}, "'rejected' must be a string, got NoneType"),
    ("prompts", {"story": "x"}, "key 'prompt' is missing; the row has ['story']"),
    ("gsm8k", {"question": "1+1?", "answer": "two"}, "must end with '#### NUMBER'"),
    ("gsm8k", {"question": "1+1?", "answer": "#### two"}, "must end with '#### NUMBER'"),
]
GOOD_ROWS: dict[str, dict[str, Any]] = {
    "hh": GOOD_HH,
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    "preferences": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "prompts": {"prompt": "Once upon a time"},
    "gsm8k": {"question": "1+1?", "answer": "It is 2.\n#### 2"},
}


@pytest.mark.parametrize(("format", "fault", "reason"), FAULTS)
def test_a_faulty_row_is_named_by_file_and_line(tmp_path: Path, format: str, fault: Any, reason: str) -> None:
    good = GOOD_ROWS[format]
    path = write_jsonl(tmp_path / "rows.jsonl", [good, fault, good])
    rows, errors = read(path, format)
    assert (len(rows), errors.count) == (2, 1)
    assert errors.messages[0].startswith(f"{path}:2: ")
    assert reason in errors.messages[0]
    with pytest.raises(BadRow) as caught:
        read(path, format, policy="fail")
    assert (caught.value.file, caught.value.line) == (path, 2)
    assert str(caught.value) == errors.messages[0]


def test_a_line_that_is_not_utf8_is_a_faulty_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n\n{"prompt": "b"}\n')
    rows, errors = read(str(path), "prompts")
    assert [r.text for r in rows] == ["a", "b"]
    assert errors.messages == [f"{path}:2: not UTF-8: invalid start byte at byte 12"]


def test_line_numbers_count_blank_lines_and_only_the_first_messages_are_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["", *["oops"] * 30])
    _, errors = read(path, "prompts")
    assert errors.count == 30
    assert len(errors.messages) == KEPT_MESSAGES
    assert errors.messages[0].startswith(f"{path}:2: ")


def test_bad_row_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadRow("why", "file.jsonl", 7)))
    assert (error.reason, error.file, error.line, str(error)) == ("why", "file.jsonl", 7, "file.jsonl:7: why")


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "eins"}, {"prompt": "zwei ü"}, {"prompt": "drei"}]
    plain = write_jsonl(tmp_path / "a.jsonl", rows)
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(plain).read_bytes()))
    parquet = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    text = tmp_path / "d.txt"
    text.write_text("eins\n\n<|endoftext|>\nzwei ü\ndrei")
    for path in (plain, str(zipped), str(parquet)):
        assert [r.values for r in read_rows(path, RowErrors("fail"))] == rows
        assert [r.values for r in read_rows(path, RowErrors("fail"), max_rows=2)] == rows[:2]
    found = list(read_rows(str(text), RowErrors("fail")))
    assert [(r.line, r.values["text"]) for r in found] == [(1, "eins"), (4, "zwei ü"), (5, "drei")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("data.csv", b"a,b", "unknown kind"),
        ("data.jsonl.gz", b"not gzip", "damaged or not gzip"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 999)[:-20], "damaged or not gzip"),
        ("data.parquet", b"nothing like it", "is not Parquet"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(str(tmp_path / name), "prompts")
    assert name in str(caught.value)


def test_a_hub_dataset_needs_its_library_and_a_readable_name() -> None:
    # In a process where the library cannot be imported, whether or not it is installed here.
    program = (
        "import sys; sys.modules['datasets'] = None\n"
        "from rlhf_dist.data.readers import RowErrors, read_rows\n"
        "list(read_rows('hub:Anthropic/hh-rlhf', RowErrors('fail')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "hub:Anthropic/hh-rlhf needs the `datasets` library" in done.stderr
    with pytest.raises(ValueError, match="must read hub:NAME"):
        list(read_rows("hub:", RowErrors("fail")))


def test_messages_with_and_without_a_last_answer() -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    row = formats.parse("messages", {"messages": turns, "topic": "greeting"})
    assert (row.messages, row.response, row.fields) == (turns[:2], "Ho", {"topic": "greeting"})
    assert formats.parse("messages", {"messages": turns[:2]}).response is None
    with pytest.raises(BadRow, match="no response to demonstrate"):
        formats.parse("messages", {"messages": turns[:2]}, "demonstrations")


def test_preferences_take_text_or_messages_and_a_margin() -> None:
    row = formats.parse("preferences", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2})
    turns = [{"role": "user", "content": "p"}]
    assert (row.messages, row.response, row.rejected, row.margin) == (turns, "a", "b", 2.0)
    assert formats.parse("preferences", {"prompt": turns, "chosen": "a", "rejected": "b"}).messages == turns


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("One day, a girl named Lily found a needle. She was glad.", "One day, a girl named Lily found a needle."),
        ("Hi. Tom had a big red ball. He ran away with it.", "Hi. Tom had a big red ball. He ran away with it."),
        ('He said to his old friend Tim, "Go now!" Then he went.', 'He said to his old friend Tim, "Go now!"'),
        (" ".join(f"w{i}" for i in range(40)), " ".join(f"w{i}" for i in range(16))),
        ("Too short.", "Too short."),
    ],
)
def test_a_story_is_opened_by_its_first_sentence(text: str, opening: str) -> None:
    row = formats.parse("prompts", {"text": text})
    assert row.text == opening
    assert opening + (row.response or "") == text


def test_a_prompt_is_taken_as_it_stands() -> None:
    long = "word " * 40
    assert formats.parse("prompts", {"prompt": long, "id": 3}) == Example(text=long, fields={"id": 3})


@pytest.mark.parametrize(("final", "number"), [("18", "18"), ("$1,234.5", "1234.5"), ("-3", "-3")])
def test_gsm8k_keeps_the_number_after_the_mark(final: str, number: str) -> None:
    row = formats.parse("gsm8k", {"question": "How many? ", "answer": f"It is.\n#### {final}"})
    assert (row.fields, row.response) == ({"answer": number}, f"It is.\n#### {final}")
    assert row.messages == [{"role": "user", "content": "How many?"}]


def test_a_format_that_cannot_serve_says_which_can() -> None:
    with pytest.raises(ValueError, match=r"data\.format=gsm8k holds no comparisons; .* world, hh, preferences"):
        formats.check_purpose("gsm8k", "comparisons")
    formats.check_purpose("gsm8k", "demonstrations")


@pytest.mark.skipif("RLHF_DATA" not in os.environ, reason="RLHF_DATA (a folder with hh_small and gsm8k) is not set")
@pytest.mark.parametrize(
    ("file", "format", "rows", "most_skipped"),
    [
        ("hh_small/train.jsonl.gz", "hh", 2800, 60),
        ("hh_small/test.jsonl.gz", "hh", 800, 10),
        ("gsm8k/train.jsonl", "gsm8k", 7473, 0),
        ("gsm8k/test.jsonl", "gsm8k", 1319, 0),
        ("tinystories/tinystories_197k.txt", "prompts", 1273, 0),
    ],
)
def test_real_files(file: str, format: str, rows: int, most_skipped: int) -> None:
    found, errors = read(str(Path(os.environ["RLHF_DATA"]) / file), format)
    assert len(found) + errors.count == rows
    assert errors.count <= most_skipped, errors.messages
