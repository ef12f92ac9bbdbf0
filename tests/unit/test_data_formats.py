"""Readers and formats: what a row means, and that every fault is named with file, line and reason."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_dist.config import COMPARISON_FORMATS, RANKING_FORMATS, DataConfig
from rlhf_dist.data import formats
from rlhf_dist.data.formats import Example
from rlhf_dist.data.labels import NOT_COMPARED
from rlhf_dist.data.readers import KEPT_MESSAGES, BadRow, Fault, RowErrors, read_rows

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


def parse(format: str, row: dict[str, Any], purpose: Any = "prompts") -> Example:
    """Of a row that is one example."""
    (example,) = formats.parse(format, row, purpose)
    return example


def test_hh_splits_prompt_and_responses() -> None:
    row = parse("hh", GOOD_HH)
    assert [m["role"] for m in row.messages or []] == ["user", "assistant", "user"]
    assert [m["content"] for m in row.messages or []] == ["Hi", "Hello.", "Bye"]
    assert (row.response, row.source) == ("Goodbye!", "helpful-base")
    assert (row.responses, row.preferences) == (("Goodbye!", "Go away."), (1.0,))
    assert row.fields == {"source": "helpful-base"}


def _hh(chosen: str, rejected: str = GOOD_HH["rejected"]) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


QA: dict[str, Any] = {
    "question": "Who?",
    "passages": [["A title", "One sentence.", "Two."], ["Another", "Three."]],
    "prediction 1": "a",
    "prediction 2": "b",
    "prediction 3": "c",
    "prediction 4": "d",
    "preference": [1, 2, 0, 1, 2, 0],
    "gold": "Me.",
}
TURNS = [{"role": "user", "content": "x"}]
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def _voted(*answers: tuple[Any, Any, Any]) -> dict[str, Any]:
    return {"prompt": "p", "answers": [{"text": t, "votes": v, "accepted": a} for t, v, a in answers]}


#: Format, row, kind of the fault, part of the message.
FAULTS: list[tuple[str, Any, Fault, str]] = [
    ("hh", '{"chosen": "x"', "not JSON", "not JSON"),
    ("hh", "[1, 2]", "not an object", "expected a JSON object, got list"),
    ("hh", {"chosen": GOOD_HH["chosen"]}, "missing key", "key 'rejected' is missing"),
    ("hh", _hh("no turns at all"), "no turn", "has no"),
    ("hh", _hh(""), "empty text", "'chosen' is empty"),
    ("hh", {"chosen": 3, "rejected": "x"}, "wrong type", "'chosen' must be a string, got int"),
    ("hh", _hh("Preamble\n\nHuman: Hi\n\nAssistant: Ho"), "text before the first turn", "text before its first turn"),
    (
        "hh",
        _hh("\n\nHuman: Hello\n\nAssistant: Hello."),
        "prompts differ",
        "prompts of 'chosen' and 'rejected' differ",
    ),
    ("hh", _hh("\n\nHuman: Hi\n\nAssistant:"), "empty response", "turn 2 (Assistant) is empty"),
    ("hh", _hh("\n\nHuman: Hi\n\nAssistant:\n\nHuman: Ho"), "empty turn", "turn 2 (Assistant) is empty"),
    ("hh", _hh("\n\nHuman:\n\nAssistant: Ho"), "empty turn", "turn 1 (Human) is empty"),
    ("hh", _hh("\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: x"), "turns do not alternate", "alternate, turn 2"),
    ("hh", _hh("\n\nAssistant: Hi\n\nHuman: Ho"), "turns do not alternate", "turns do not alternate, turn 1"),
    ("hh", _hh("\n\nHuman: Hi\n\nAssistant: well Human: no"), "tag inside a line", "tag 'Human:' inside a line"),
    (
        "hh",
        _hh("\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Bye"),
        "last turn not the assistant's",
        "last turn is not the Assistant's",
    ),
    ("hh", _hh(GOOD_HH["rejected"]), "same text", "are the same text: 'Go away.'"),
    ("messages", {"messages": []}, "wrong type", "'messages' must be a list"),
    ("messages", {"messages": ["hi"]}, "wrong type", "message 1 must be {role, content}"),
    ("messages", {"messages": [{"role": "bot", "content": "x"}]}, "unknown role", "message 1 has role 'bot'"),
    ("messages", {"messages": [{"role": "user", "content": " "}]}, "empty turn", "message 1 (user) is empty"),
    (
        "messages",
        {"messages": [{"role": "assistant", "content": "x"}]},
        "turns do not alternate",
        "user and assistant must alternate",
    ),
    (
        "messages",
        {"messages": [*TURNS, {"role": "system", "content": "y"}]},
        "system message not first",
        "a system message may stand first only",
    ),
    (
        "preferences",
        PAIR | {"prompt": [*TURNS, {"role": "assistant", "content": "y"}]},
        "last turn not the user's",
        "must end with the user's message",
    ),
    ("preferences", PAIR | {"chosen": "b"}, "same text", "are the same text"),
    ("preferences", PAIR | {"margin": "big"}, "wrong margin", "'margin' must be a number"),
    ("preferences", PAIR | {"margin": -1}, "wrong margin", "'margin' must be a number"),
    ("preferences", PAIR | {"margin": 1, "votes": [1, 1]}, "wrong margin", "only 0.50 of the annotators prefer it"),
    ("preferences", PAIR | {"rejected": None}, "wrong type", "'rejected' must be a string, got NoneType"),
    ("preferences", PAIR | {"votes": [0, 0]}, "wrong labels", "'votes' must be two numbers"),
    ("preferences", PAIR | {"votes": [1]}, "wrong labels", "'votes' must be two numbers"),
    ("preferences", PAIR | {"labels": []}, "wrong labels", "'labels' must be a list of chosen, tie, rejected"),
    ("preferences", PAIR | {"labels": ["chosen", "b"]}, "wrong labels", "'labels' must be a list of chosen"),
    ("preferences", PAIR | {"labels": ["tie"], "votes": [1, 0]}, "wrong labels", "'votes' and 'labels' are both"),
    ("prompts", {"story": "x"}, "missing key", "key 'prompt' is missing; the row has ['story']"),
    ("gsm8k", {"question": "1+1?", "answer": "two"}, "no final number", "must end with '#### NUMBER'"),
    ("gsm8k", {"question": "1+1?", "answer": "#### two"}, "no final number", "must end with '#### NUMBER'"),
    ("instructions", {"instruction": "Add.", "output": ""}, "empty text", "'output' is empty"),
    ("instructions", {"instruction": "Add.", "instances": []}, "no response", "'instances' is empty"),
    ("instructions", {"instruction": "Add.", "instances": ["2"]}, "wrong type", "'instances' must be a list of"),
    (
        "instructions",
        {"instruction": "Add.", "instances": [{"output": "2"}, {"output": 3}]},
        "wrong type",
        "'output' must be a string, got int",
    ),
    ("rankings", {"prompt": "p", "responses": []}, "too few responses", "at least 2 responses, got 0"),
    ("rankings", {"prompt": "p", "responses": ["a"]}, "too few responses", "at least 2 responses, got 1"),
    ("rankings", {"prompt": "p", "responses": ["a", " "]}, "empty response", "response 2 is empty"),
    ("rankings", {"prompt": "p", "responses": ["a", "b", "a"]}, "same text", "are the same text: 'a'"),
    ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [0]}, "wrong labels", "each of the 2 responses"),
    (
        "rankings",
        {"prompt": "p", "responses": ["a", "b"], "ranks": [[0, 1], [0]]},
        "wrong labels",
        "each of the 2 responses, got [0]",
    ),
    ("rankings", {"responses": ["a", "b"]}, "missing key", "key 'prompt' is missing"),
    (
        "rankings",
        {"conversation": [{"role": "initiator", "text": "x"}], "responses": ["a", "b"]},
        "unknown role",
        "message 1 has role 'initiator'",
    ),
    ("qa_feedback", QA | {"preference": [0, 1, 2]}, "wrong labels", "'preference' must be six of 0, 1 and 2"),
    ("qa_feedback", QA | {"preference": [0, 1, 2, 3, 0, 0]}, "wrong labels", "'preference' must be six of 0"),
    ("qa_feedback", QA | {"prediction 3": "b"}, "same text", "are the same text: 'b'"),
    ("voted", _voted(("a", 3, False)), "too few responses", "at least 2 responses, got 1"),
    ("voted", _voted(("a", 3, False), ("b", "many", False)), "wrong labels", "answer 2 needs 'votes'"),
    ("voted", _voted(("a", 3, False), ("b", 1, 1)), "wrong labels", "'accepted' true or false: 1, 1"),
]
GOOD_ROWS: dict[str, dict[str, Any]] = {
    "hh": GOOD_HH,
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    "preferences": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "prompts": {"prompt": "Once upon a time"},
    "gsm8k": {"question": "1+1?", "answer": "It is 2.\n#### 2"},
    "instructions": {"instruction": "Add.", "input": "1 1", "output": "2"},
    "rankings": {"prompt": "p", "responses": ["a", "b", "c"]},
    "qa_feedback": QA,
    "voted": {"prompt": "p", "answers": [{"text": "a", "votes": 3}, {"text": "b", "votes": 0}]},
}


@pytest.mark.parametrize(("format", "fault", "kind", "reason"), FAULTS)
def test_a_faulty_row_is_counted_by_its_fault_and_named_by_file_and_line(
    tmp_path: Path, format: str, fault: Any, kind: str, reason: str
) -> None:
    good = GOOD_ROWS[format]
    path = write_jsonl(tmp_path / "rows.jsonl", [good, fault, good])
    rows, errors = read(path, format)
    assert (len(rows), errors.count, errors.faults) == (2, 1, {kind: 1})
    assert errors.messages[0].startswith(f"{path}:2: ")
    assert reason in errors.messages[0]
    with pytest.raises(BadRow) as caught:
        read(path, format, policy="fail")
    assert (caught.value.kind, caught.value.file, caught.value.line) == (kind, path, 2)
    assert str(caught.value) == errors.messages[0]


def test_every_kind_of_fault_is_tested() -> None:
    assert {kind for _, _, kind, _ in FAULTS} | {"not UTF-8"} == set(get_args(Fault))


def test_a_line_that_is_not_utf8_is_a_faulty_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n\n{"prompt": "b"}\n')
    rows, errors = read(str(path), "prompts")
    assert [r.text for r in rows] == ["a", "b"]
    assert errors.messages == [f"{path}:2: not UTF-8: invalid start byte at byte 12"]
    assert errors.faults == {"not UTF-8": 1}


def test_line_numbers_count_blank_lines_and_only_the_first_messages_are_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["", *["oops"] * 30])
    _, errors = read(path, "prompts")
    assert errors.count == 30
    assert len(errors.messages) == KEPT_MESSAGES
    assert errors.messages[0].startswith(f"{path}:2: ")


def test_bad_row_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadRow("no turn", "why", "file.jsonl", 7)))
    assert (error.kind, error.reason, error.file, error.line) == ("no turn", "why", "file.jsonl", 7)
    assert str(error) == "file.jsonl:7: why"


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "eins"}, {"prompt": "zwei ü"}, {"prompt": "drei"}]
    plain = write_jsonl(tmp_path / "a.jsonl", rows)
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(plain).read_bytes()))
    parquet = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    text = tmp_path / "d.txt"
    text.write_text("eins\n\n<|endoftext|>\nzwei ü\ndrei")
    array = tmp_path / "e.json"
    array.write_text("\n" + json.dumps(rows, indent=2))
    zipped_array, lines = tmp_path / "f.json.gz", tmp_path / "g.json"
    zipped_array.write_bytes(gzip.compress(b"\xef\xbb\xbf" + array.read_bytes()))
    lines.write_bytes(Path(plain).read_bytes())
    for path in map(str, (plain, zipped, parquet, array, zipped_array, lines)):
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
        ("data.json", b'[{"prompt": "x"}, ', "is no JSON array: Expecting value: line 1 column 19"),
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
    row = parse("messages", {"messages": turns, "topic": "greeting"})
    assert (row.messages, row.response, row.fields) == (turns[:2], "Ho", {"topic": "greeting"})
    assert parse("messages", {"messages": turns[:2]}).response is None
    with pytest.raises(BadRow, match="no response to demonstrate") as caught:
        parse("messages", {"messages": turns[:2]}, "demonstrations")
    assert caught.value.kind == "no response"


def test_preferences_take_text_or_messages_and_a_margin() -> None:
    row = parse("preferences", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2})
    turns = [{"role": "user", "content": "p"}]
    assert (row.messages, row.response, row.responses, row.preferences, row.margin) == (
        turns,
        "a",
        ("a", "b"),
        (1.0,),
        2.0,
    )
    assert parse("preferences", {"prompt": turns, "chosen": "a", "rejected": "b"}).messages == turns


@pytest.mark.parametrize(
    ("given", "preference", "better"),
    [
        ({"votes": [3, 1]}, 0.75, "a"),
        ({"votes": [0, 2]}, 0.0, "b"),
        ({"votes": [2, 2]}, 0.5, "a"),
        ({"labels": ["chosen", "tie", "rejected", "rejected"]}, 0.375, "b"),
        ({"labels": None, "votes": None}, 1.0, "a"),
    ],
)
def test_several_annotators_of_a_pair(given: dict[str, Any], preference: float, better: str) -> None:
    row = parse("preferences", PAIR | given)
    assert (row.responses, row.preferences, row.response) == (("a", "b"), (preference,), better)


def test_an_instruction_with_and_without_input() -> None:
    row = parse("instructions", {"instruction": "Add.", "input": "1 1", "output": "2", "id": 7})
    assert (row.messages, row.response) == ([{"role": "user", "content": "Add.\n\n1 1"}], "2")
    assert row.fields == {"id": 7}
    assert parse("instructions", {"instruction": "Hi.", "input": "", "output": "Ho"}).messages == [
        {"role": "user", "content": "Hi."}
    ]
    assert parse("instructions", {"instruction": "Hi."}).response is None


def test_every_instance_of_an_instruction_is_an_example(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}, {"input": "2 3", "output": "5"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, {"instruction": "Add.", "instances": [{"input": "1"}]}, row])
    found, errors = read(path, "instructions", purpose="demonstrations")
    assert [(e.messages or [])[0]["content"] for e in found] == ["Add.\n\n1 1", "Add.\n\n2 3"] * 2
    assert [e.response for e in found] == ["2", "5"] * 2
    assert errors.faults == {"no response": 1}


def test_rankings_are_best_first_unless_ranks_say_otherwise() -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c"], "source": "forum"}
    found = parse("rankings", row)
    assert (found.responses, found.preferences, found.response) == (("a", "b", "c"), (1.0, 1.0, 1.0), "a")
    assert found.source == "forum"
    tied = parse("rankings", row | {"ranks": [2, 0, 0]})
    assert (tied.preferences, tied.response) == ((0.0, 0.0, 0.5), "b")
    people = parse("rankings", row | {"ranks": [[0, 1, 2], [2, 1, 0], [1, 1, 0], [2, 0, 1]]})
    assert (people.preferences, people.response) == ((0.375, 0.25, 0.5), "b")


def test_a_conversation_of_open_assistant_is_a_prompt() -> None:
    turns = [{"role": r, "text": t} for r, t in (("prompter", "Hi"), ("assistant", "Ho"), ("prompter", "Hum"))]
    row = parse("rankings", {"conversation": turns, "responses": ["a", "b"]})
    assert [m["role"] for m in row.messages or []] == ["user", "assistant", "user"]
    assert [m["content"] for m in row.messages or []] == ["Hi", "Ho", "Hum"]


def test_pair_labels_of_answers_to_a_question_need_no_order() -> None:
    row = parse("qa_feedback", QA)
    assert row.messages == [
        {"role": "user", "content": "A title One sentence. Two.\n\nAnother Three.\n\nQuestion: Who?"}
    ]
    assert (row.responses, row.preferences) == (("a", "b", "c", "d"), (1.0, 0.0, 0.5, 1.0, 0.0, 0.5))
    assert (row.response, row.fields) == ("Me.", {"question": "Who?"})
    alone = parse("qa_feedback", QA | {"passages": []}).messages or []
    assert alone[0]["content"] == "Question: Who?"


def test_votes_compare_answers_of_different_score() -> None:
    """Scores -1, 3 (log2 of 8), 3 (2 and accepted), 0: the second and the third are not compared."""
    answers = _voted(("a", -4, False), ("b", 7, False), ("c", 3, True), ("d", 0, False))
    row = parse("voted", answers)
    assert row.preferences == pytest.approx((0, 0, 0, NOT_COMPARED, 1, 1), nan_ok=True)
    assert (row.responses, row.response) == (("a", "b", "c", "d"), "b")


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
    row = parse("prompts", {"text": text})
    assert row.text == opening
    assert opening + (row.response or "") == text


def test_a_prompt_is_taken_as_it_stands() -> None:
    long = "word " * 40
    assert parse("prompts", {"prompt": long, "id": 3}) == Example(text=long, fields={"id": 3})


@pytest.mark.parametrize(("final", "number"), [("18", "18"), ("$1,234.5", "1234.5"), ("-3", "-3")])
def test_gsm8k_keeps_the_number_after_the_mark(final: str, number: str) -> None:
    row = parse("gsm8k", {"question": "How many? ", "answer": f"It is.\n#### {final}"})
    assert (row.fields, row.response) == ({"answer": number}, f"It is.\n#### {final}")
    assert row.messages == [{"role": "user", "content": "How many?"}]


def test_a_format_that_cannot_serve_says_which_can() -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.format=gsm8k holds no comparisons; .* world, hh, preferences, rankings, qa_feedback, voted",
    ):
        formats.check_purpose("gsm8k", "comparisons")
    formats.check_purpose("gsm8k", "demonstrations")


#: Formats of the rows in docs/data.md, in their order.
DOCUMENTED = ["hh", "messages", *["instructions"] * 2, *["preferences"] * 2, *["rankings"] * 2, "qa_feedback", "voted"]


def test_the_docs_show_a_row_of_each_format_and_every_fault() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = page.partition("One row of each")[2].partition("```json\n")[2].partition("```")[0].splitlines()
    named = [*DOCUMENTED, "prompts", "gsm8k"]
    assert set(named) == set(formats.PURPOSES)
    for name, row in zip(named, rows, strict=True):
        assert formats.parse(name, json.loads(row), "demonstrations"), name
    for fault in get_args(Fault):
        assert f"`{fault}`" in page, fault


def test_the_config_knows_the_formats() -> None:
    assert set(get_args(DataConfig.model_fields["format"].annotation)) == {"world", *formats.PURPOSES}
    for purpose, names in (("comparisons", COMPARISON_FORMATS), ("rankings", RANKING_FORMATS)):
        assert names == ("world", *(name for name, able in formats.PURPOSES.items() if purpose in able))


@pytest.mark.skipif(
    "RLHF_DATA" not in os.environ, reason="RLHF_DATA (a folder with hh_small, gsm8k and others) is not set"
)
@pytest.mark.parametrize(
    ("file", "format", "rows", "most_skipped"),
    [
        ("self_instruct/seed_tasks.jsonl", "instructions", 175, 0),
        ("kway_oasst/ranked_nodes.jsonl", "rankings", 212, 0),
        ("kway_qa_feedback/dev_feedback.json", "qa_feedback", 500, 0),
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
