"""Comparisons of sampled responses: pairs, a function's answers, people's answers."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_dist import schema
from rlhf_dist.data import compare, world


def samples(folder: Path, *responses: list[str]) -> Path:
    """A stage's folder with the samples of one prompt for each list; a response's ids are its length."""
    columns = {
        "prompt": [f"prompt {i}" for i in range(len(responses))],
        "response_texts": list(responses),
        "fields": [json.dumps({"row": i}) for i in range(len(responses))],
        "prompt_ids": [[i] for i in range(len(responses))],
        "responses": [[[len(text)] for text in row] for row in responses],
    }
    compare.write(pa.table(columns, schema=compare.SAMPLES), folder / compare.SAMPLES_FILE)
    return folder


def written(folder: Path) -> pa.Table:
    return schema.check(pq.read_table(folder / compare.COMPARISONS_FILE), schema.RANKING, "test")


def length(prompts: list[str], responses: list[str], fields: list[dict]) -> list[float]:
    assert all(p == f"prompt {f['row']}" for p, f in zip(prompts, fields, strict=True))
    return [float(len(r)) for r in responses]


def test_every_prompt_has_its_turn_before_one_has_a_second() -> None:
    candidates = [[(row, i, j) for i, j in itertools.combinations(range(k), 2)] for row, k in enumerate((4, 2, 3))]
    for most in range(12):
        found = compare.draw(candidates, most, random.Random(most))
        assert len(found) == len(set(found)) == min(most, 10)
        shares = Counter(row for row, _, _ in found)
        most_of_one = max(shares.values(), default=0)
        assert all(shares[row] >= min(len(candidates[row]), most_of_one - 1) for row in range(3))
    assert len(compare.draw(candidates, None, random.Random(0))) == 10


def test_a_function_prefers_the_higher_number_and_equal_ones_are_no_pair(tmp_path: Path) -> None:
    folder = samples(tmp_path, ["a", "bbb", "cc"], ["x", "y"])
    assert compare.by_function(folder, length, None, 0.0, 0, "here") == 3
    table = written(folder)
    assert table["preferences"].to_pylist() == [[0.0, 0.0, 1.0]], "(a, bbb), (a, cc), (bbb, cc); x and y tie"
    assert table["source"].to_pylist() == ["here"]
    pairs = compare.comparisons_of(table)
    assert list(zip(pairs["chosen_ids"].to_pylist(), pairs["rejected_ids"].to_pylist(), strict=True)) == [
        ([3], [1]),
        ([2], [1]),
        ([3], [2]),
    ]
    assert pairs["preference"].to_pylist() == [1.0] * 3


def test_noise_turns_its_share_around(tmp_path: Path) -> None:
    folder = samples(tmp_path, *[["a", "bb"]] * 2000)
    compare.by_function(folder, length, None, 0.25, 0, "")
    wrong = np.mean([p[0] for p in written(folder)["preferences"].to_pylist()])
    assert abs(wrong - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    compare.by_function(folder, length, 50, 0.0, 0, "")
    assert written(folder).num_rows == 50


@pytest.mark.parametrize("answer", [[1.0], [1.0, float("nan")]])
def test_a_function_must_give_every_response_a_number(tmp_path: Path, answer: list[float]) -> None:
    with pytest.raises(ValueError, match=r"compare.by returned \d numbers for 2 responses"):
        compare.by_function(samples(tmp_path, ["a", "bb"]), lambda *_: answer, None, 0.0, 0, "")


def test_people_are_asked_in_random_order_and_their_shares_come_back(tmp_path: Path) -> None:
    folder = samples(tmp_path, *[["a", "bb"]] * 200, ["a", "bb", "ccc"])
    assert compare.ask_people(folder, None, 0) == 203
    asked = [json.loads(line) for line in (folder / compare.ASKED_FILE).read_text().splitlines()]
    first = sum(len(line["a"]) > len(line["b"]) for line in asked)
    assert 60 < first < 143, "which is a and which is b tells nothing"
    answers = [{"id": line["id"], "better": "a" if len(line["a"]) > len(line["b"]) else "b"} for line in asked]
    answers += [answers[0], {"id": answers[0]["id"], "better": "tie"}]
    three = [line["id"] for line in asked if line["id"].startswith("200-")]
    answers = [a for a in answers if a["id"] not in three[1:]]
    (folder / compare.ANSWERS_FILE).write_text("".join(json.dumps(a) + "\n" for a in answers))
    assert compare.by_people(folder, "people") == 201
    pairs = compare.comparisons_of(written(folder))
    assert all(c > r for c, r in zip(pairs["chosen_ids"].to_pylist(), pairs["rejected_ids"].to_pylist(), strict=True))
    shares = Counter(round(p, 3) for p in pairs["preference"].to_pylist())
    assert shares == {1.0: 200, round(2.5 / 3, 3): 1}, "a tie counts half"
    last = written(folder)["preferences"].to_pylist()[-1]
    assert np.isnan(last).sum() == 2, "two of the three pairs were not compared"


@pytest.mark.parametrize(
    "line", ['{"id": "9-0-1", "better": "a"}', '{"id": "0-0-1", "better": "c"}', "a", "[1]", '{"better": "a"}']
)
def test_an_answer_to_nothing_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    folder = samples(tmp_path, ["a", "bb"])
    compare.ask_people(folder, None, 0)
    asked = json.loads((folder / compare.ASKED_FILE).read_text())["id"]
    (folder / compare.ANSWERS_FILE).write_text(json.dumps({"id": asked, "better": "a"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"compared.jsonl, line 2: expected \{id, better\}, an id of to_compare.jsonl"):
        compare.by_people(folder, "")


def test_the_responses_of_rollouts_by_prompt() -> None:
    tokenizer = world.build_tokenizer()
    prompts = pa.table(
        {"prompt_id": [0, 1, 2], "prompt_ids": [[5], [6], [7]], "prompt": ["p", "q", "r"], "fields": ["{}"] * 3},
        schema=schema.PROMPT,
    )
    rollouts = pa.table(
        {
            "prompt_id": [2, 2, 0, 0, 2],
            "group_id": [11, 11, 10, 10, 11],
            "sample_index": pa.array([1, 0, 0, 1, 2], pa.int32()),
            "response_ids": pa.array([[9, 8], [9], [8], [8], [9]], pa.list_(pa.int32())),
        }
    )
    table = compare.collect(rollouts, prompts, tokenizer)
    assert table.schema == compare.SAMPLES
    assert table["prompt"].to_pylist() == ["r"], "p has one response only"
    assert table["responses"].to_pylist() == [[[9], [9, 8]]]
    assert table["response_texts"].to_pylist() == [tokenizer.batch_decode([[9], [9, 8]], skip_special_tokens=True)]
