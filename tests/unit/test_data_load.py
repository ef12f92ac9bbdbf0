"""From config to token tables: rendering, lengths, held-out prompts, label noise, tokenizers."""

from __future__ import annotations

import io
import itertools
import json
import math
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from rlhf_dist import schema
from rlhf_dist.config import Config
from rlhf_dist.data import compare, load, tokenization, world
from rlhf_dist.data.formats import Example, parse
from rlhf_dist.observability.terminal import Terminal
from rlhf_dist.run import Run


def config(**sections: Any) -> Config:
    tree: dict[str, Any] = {"model": {"architecture": {"model_type": "llama"}}}
    return Config.model_validate(tree | sections)


def hh_row(i: int) -> dict[str, str]:
    prompt = f"\n\nHuman: Question number {i}?\n\nAssistant:"
    return {
        "chosen": f"{prompt} A good answer to {i}{', really' * (i % 7)}.",
        "rejected": f"{prompt} No.",
        "source": "helpful-base",
    }


@pytest.fixture(scope="module")
def hh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """120 training rows, three of them faulty, five with a held-out prompt; 20 test rows. And the tokenizer."""
    folder = tmp_path_factory.mktemp("hh")
    faulty = [{"chosen": "x", "rejected": "y"}] * 3
    train = [hh_row(i) for i in range(100, 212)] + faulty + [hh_row(i) for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    (folder / "test.jsonl").write_text("\n".join(json.dumps(hh_row(i)) for i in range(20)))
    cfg = config(
        model={"architecture": {"model_type": "llama"}, "tokenizer_vocab_size": 300},
        data={"format": "hh", "dir": str(folder), "train": "train.jsonl", "test": "test.jsonl"},
    )
    report = load.make_tokenizer(cfg, str(folder / "tokenizer"))
    assert report["skipped"] == 3
    assert report["vocab_size"] == 300
    return cfg, str(folder / "tokenizer")


@pytest.fixture(scope="module")
def world_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("world"))
    load.make_tokenizer(config(), folder)
    return folder


def test_a_folder_that_names_the_general_class_is_read_as_autotokenizer_reads_it(hh: tuple[Config, str]) -> None:
    ours, theirs = tokenization.load_tokenizer(hh[1]), AutoTokenizer.from_pretrained(hh[1])
    assert type(ours) is type(theirs)
    assert (ours.get_vocab(), ours.special_tokens_map) == (theirs.get_vocab(), theirs.special_tokens_map)
    text = "\n\nHuman: Größe? 你好 <eos>\n\nAssistant:"
    assert ours(text).input_ids == theirs(text).input_ids


def test_driver_and_data_know_no_torch(world_tokenizer: str) -> None:
    """It costs every process that imports it one to two CPU seconds at its start, and the driver has no tensors."""
    code = (
        "import sys, rlhf_dist.run, rlhf_dist.recipes.pipeline, rlhf_dist.data.load\n"
        "from rlhf_dist.data.tokenization import load_tokenizer\n"
        f"load_tokenizer({world_tokenizer!r})\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_hh_tables_say_what_the_rows_say(hh: tuple[Config, str]) -> None:
    cfg, folder = hh
    tokenizer = tokenization.load_tokenizer(folder)
    prompts, report = load.load_prompts(cfg, folder, "train")
    schema.check(prompts, schema.PROMPT, "prompts")
    assert {k: report[k] for k in ("rows", "skipped", "faults", "too_long", "held_out")} == {
        "rows": 112,
        "skipped": 3,
        "faults": {"no turn": 3},
        "too_long": 0,
        "held_out": 5,
    }
    assert "train.jsonl:113: " in report["messages"][0]
    assert prompts["prompt_id"].to_pylist() == list(range(112))
    first = prompts.slice(0, 1).to_pylist()[0]
    assert first["prompt"] == "\n\nHuman: Question number 100?\n\nAssistant:"
    assert tokenizer.decode(first["prompt_ids"]) == "<bos>" + first["prompt"]
    assert json.loads(first["fields"]) == {"source": "helpful-base"}

    pairs = schema.check(load.load_comparisons(cfg, folder, "train", 512)[0], schema.COMPARISON, "pairs")
    pair = pairs.slice(0, 1).to_pylist()[0]
    assert tokenizer.decode(pair["chosen_ids"]) == f" A good answer to 100{', really' * 2}.<eos>"
    assert tokenizer.decode(pair["rejected_ids"]) == " No.<eos>"
    assert (pair["preference"], pair["margin"], pair["source"]) == (1.0, 0.0, "helpful-base")

    demonstrations = load.load_demonstrations(cfg, folder, "train", 512)[0]
    schema.check(demonstrations, schema.DEMONSTRATION, "demonstrations")
    assert demonstrations["response_ids"][0] == pairs["chosen_ids"][0]
    assert demonstrations["prompt_ids"][0] == prompts["prompt_ids"][0]


def test_test_prompts_are_never_trained_on(hh: tuple[Config, str]) -> None:
    cfg, folder = hh
    own = cfg.model_copy(update={"data": cfg.data.model_copy(update={"test": None})})
    for c in (cfg, own):
        train, test = (load.load_prompts(c, folder, s)[0]["prompt"].to_pylist() for s in ("train", "test"))
        assert test
        assert not set(train) & set(test)
    assert len(train) + len(test) == 117, "without a test file the training rows are divided"


def test_rows_that_are_too_long_are_left_out_and_counted(hh: tuple[Config, str]) -> None:
    cfg, folder = hh
    lengths = [
        len(d["prompt_ids"]) + len(d["response_ids"])
        for d in load.load_demonstrations(cfg, folder, "train", 512)[0].to_pylist()
    ]
    limit = sorted(lengths)[50]
    table, report = load.load_demonstrations(cfg, folder, "train", limit)
    assert table.num_rows == sum(n <= limit for n in lengths) < len(lengths)
    assert report["too_long"] == len(lengths) - table.num_rows
    none = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"max_prompt_length": 2})})
    with pytest.raises(ValueError, match=r"rollout\.max_prompt_length=2; 112 rows are longer"):
        load.load_prompts(none, folder, "train")


def test_pairs_are_measured_by_their_longer_side(hh: tuple[Config, str]) -> None:
    cfg, folder = hh
    pair = load.load_comparisons(cfg, folder, "test", 512)[0].slice(0, 1).to_pylist()[0]
    longer = len(pair["prompt_ids"]) + len(pair["chosen_ids"])
    assert len(pair["chosen_ids"]) > len(pair["rejected_ids"])
    rows = parse("hh", hh_row(0))
    tokenizer = tokenization.load_tokenizer(folder)
    assert tokenization.tokenize_comparisons(tokenizer, rows, longer)[1] == 0
    assert tokenization.tokenize_comparisons(tokenizer, rows, longer - 1)[1] == 1


def test_label_noise_flips_training_pairs_and_counts_them(hh: tuple[Config, str]) -> None:
    cfg, folder = hh
    clean = load.load_comparisons(cfg, folder, "train", 512)[0]
    noisy, report = load.load_comparisons(cfg, folder, "train", 512, None, 0.25)
    schema.check(noisy, schema.COMPARISON, "pairs")
    differ = sum(a != b for a, b in zip(clean.to_pylist(), noisy.to_pylist(), strict=True))
    assert 10 < report["flipped"] == differ < 50


HH_FAULTS = {
    "prompts differ": ("\n\nHuman: Hello?\n\nAssistant: Yes.", "\n\nHuman: Hi?\n\nAssistant: No."),
    "empty response": ("\n\nHuman: Hi?\n\nAssistant:", "\n\nHuman: Hi?\n\nAssistant: No."),
    "turns do not alternate": ("\n\nHuman: Hi?\n\nHuman: Hi?\n\nAssistant: Yes.", "\n\nHuman: Hi?\n\nAssistant: No."),
    "tag inside a line": ("\n\nHuman: Hi?\n\nAssistant: Yes. Human: Why?", "\n\nHuman: Hi?\n\nAssistant: No."),
    "text before the first turn": ("Well.\n\nHuman: Hi?\n\nAssistant: Yes.", "\n\nHuman: Hi?\n\nAssistant: No."),
    "same text": ("\n\nHuman: Hi?\n\nAssistant: No.", "\n\nHuman: Hi?\n\nAssistant: No."),
}


def test_the_faults_of_hh_are_counted_and_named(hh: tuple[Config, str], tmp_path: Path) -> None:
    """As they are in the published files: a row of each, two of one, in the report, on the terminal, in the summary."""
    _, tokenizer = hh
    faulty = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in HH_FAULTS.values()]
    rows = [hh_row(0), *faulty, faulty[2], *map(hh_row, range(1, 30))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"format": "hh", "dir": str(tmp_path), "train": "rows.jsonl"}
    cfg = config(data=data, run={"root": str(tmp_path), "name": "job"})
    table, report = load.load_comparisons(cfg, tokenizer, "train", 512)
    assert (table.num_rows + report["held_out"], report["skipped"]) == (30, 7)
    assert report["faults"] == dict.fromkeys(HH_FAULTS, 1) | {"turns do not alternate": 2}
    assert next(iter(report["faults"])) == "turns do not alternate", "the most frequent first"

    run = Run(cfg, Terminal(io.StringIO()))
    run.note_rows("comparisons", report)
    run.note_rows("comparisons of another stage", report)
    run.note_rows("held-out comparisons", report | {"messages": ["another file"]})
    first, second = run.terminal.console.file.getvalue().strip().split("comparisons: ")[1:]  # type: ignore[attr-defined]
    said = " ".join(first.split())
    assert said.startswith(
        "7 faulty rows skipped: 2 x turns do not alternate, 1 x prompts differ, 1 x empty response, "
    )
    assert f"the first: {tmp_path / 'rows.jsonl'}:2: the prompts of 'chosen' and 'rejected' differ" in said
    assert second.startswith("7 faulty rows"), "the same rows are named once"
    assert run.summary.get("rows_skipped") == 14
    assert run.summary.get("row_faults") == {kind: 2 * count for kind, count in report["faults"].items()}

    strict = config(data=data | {"on_bad_row": "fail"})
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the prompts of 'chosen' and 'rejected' differ"):
        load.load_comparisons(strict, tokenizer, "train", 512)


RANKED = [
    {"prompt": "Rank them.", "responses": ["best", "good", "good too", "bad"], "ranks": [0, 1, 1, 2], "source": "x"},
    {"prompt": "Which?", "responses": ["this", "that"], "ranks": [[0, 1], [0, 1], [1, 0], [0, 0]]},
    {"prompt": "Equal.", "responses": ["one", "two"], "ranks": [3, 3]},
]


def ranked(tmp_path: Path, rows: list[dict[str, Any]], format: str = "rankings", **reward_model: Any) -> Config:
    """All rows in both splits: a test file of its own, with other prompts."""
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    others = [row | {"prompt": f"{row['prompt']} Tell me."} for row in rows]
    (tmp_path / "test.json").write_text(json.dumps(others))
    data = {"format": format, "dir": str(tmp_path), "train": "train.jsonl", "test": "test.json"}
    return config(data=data, reward_model=reward_model)


def pairs_of(
    cfg: Config, tokenizer_dir: str, split: Any = "train"
) -> tuple[list[tuple[str, str, float]], dict[str, Any]]:
    """Chosen, rejected and preference of each pair."""
    tokenizer = tokenization.load_tokenizer(tokenizer_dir)
    table, report = load.load_comparisons(cfg, tokenizer_dir, split, 512)
    schema.check(table, schema.COMPARISON, "pairs")
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip()
    rows = [(text(r["chosen_ids"]), text(r["rejected_ids"]), r["preference"]) for r in table.to_pylist()]
    return rows, report


BY_RANK = [("best", "good", 1), ("best", "good too", 1), ("best", "bad", 1), ("good", "bad", 1), ("good too", "bad", 1)]


def test_all_pairs_of_rankings_are_comparisons(hh: tuple[Config, str], tmp_path: Path) -> None:
    found, report = pairs_of(ranked(tmp_path, RANKED), hh[1])
    assert found == [*BY_RANK, ("this", "that", 1)]
    assert {k: report[k] for k in ("rows", "tied", "no_pair")} == {"rows": 6, "tied": 2, "no_pair": 1}


def test_ties_and_shares_are_learned_where_the_config_says_so(hh: tuple[Config, str], tmp_path: Path) -> None:
    cfg = ranked(tmp_path, RANKED, ties="learn", labels="share")
    found, report = pairs_of(cfg, hh[1])
    assert found == [
        *BY_RANK[:3],
        ("good", "good too", 0.5),
        *BY_RANK[3:],
        ("this", "that", 0.625),
        ("one", "two", 0.5),
    ]
    assert (report["tied"], report["no_pair"]) == (0, 0)
    table, _ = load.load_rankings(cfg, hh[1], "train", 512)
    assert table["preferences"].to_pylist() == [[1, 1, 1, 0.5, 1, 1], [0.625], [0.5]]


def test_held_out_pairs_keep_the_share_and_lose_ties(hh: tuple[Config, str], tmp_path: Path) -> None:
    """Whatever is learned: a tie cannot be predicted, and the agreement of the annotators is a figure of the test."""
    for settings in ({}, {"ties": "learn", "labels": "share"}):
        found, report = pairs_of(ranked(tmp_path, RANKED, **settings), hh[1], "test")
        assert found == [*BY_RANK, ("this", "that", 0.625)]
        assert report["tied"] == 2


def test_rankings_keep_what_was_not_compared_as_nan(hh: tuple[Config, str], tmp_path: Path) -> None:
    table, report = load.load_rankings(ranked(tmp_path, RANKED), hh[1], "train", 512)
    schema.check(table, schema.RANKING, "rankings")
    first, second = table["preferences"].to_pylist()
    assert [p for p in first if not math.isnan(p)] == [1, 1, 1, 1, 1]
    assert math.isnan(first[3])
    assert second == [1]
    assert {k: report[k] for k in ("rows", "tied", "no_pair")} == {"rows": 2, "tied": 2, "no_pair": 1}
    everything_ties = ranked(tmp_path, RANKED[2:])
    with pytest.raises(ValueError, match="none of 1 prompts has two responses of which one is better"):
        load.load_rankings(everything_ties, hh[1], "train", 512)


def test_votes_and_minorities_are_pairs(hh: tuple[Config, str], tmp_path: Path) -> None:
    answers = [{"text": "liked", "votes": 9}, {"text": "hated", "votes": -2}, {"text": "liked too", "votes": 8}]
    voted, report = pairs_of(ranked(tmp_path, [{"prompt": "How?", "answers": answers}], "voted"), hh[1])
    assert voted == [("liked", "hated", 1), ("liked too", "hated", 1)]
    assert report["tied"] == 0, "equal scores are no judgement"
    pair = {"prompt": "Which?", "chosen": "this", "rejected": "that", "votes": [1, 3]}
    assert pairs_of(ranked(tmp_path, [pair], "preferences", labels="share"), hh[1])[0] == [("that", "this", 0.75)]
    assert pairs_of(ranked(tmp_path, [pair], "preferences"), hh[1])[0] == [("that", "this", 1)]


def test_weak_pairs_are_binarized(hh: tuple[Config, str], tmp_path: Path) -> None:
    """2112.00861, section 4.1: GOOD: A > BAD: A and BAD: B > GOOD: B for each A > B."""
    answers = [{"text": "hated", "votes": -2}, {"text": "liked", "votes": 9}]
    cfg = ranked(tmp_path, [{"prompt": "How?", "answers": answers}], "voted", binarize=True)
    for split in ("train", "test"):
        found, _ = pairs_of(cfg, hh[1], split)
        assert found == [("GOOD: liked", "BAD: liked", 1), ("BAD: hated", "GOOD: hated", 1)]


def test_clear_errors_instead_of_empty_tables(hh: tuple[Config, str], tmp_path: Path) -> None:
    _, folder = hh
    (tmp_path / "bad.jsonl").write_text('{"chosen": "x"}\n')
    bad = config(data={"format": "hh", "dir": str(tmp_path), "train": "bad.jsonl"})
    with pytest.raises(ValueError, match=r"no usable row for data\.format=hh; .*bad\.jsonl:1: 'chosen' has no"):
        load.load_prompts(bad, folder, "train")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: "):
        load.load_prompts(config(data=bad.data.model_copy(update={"on_bad_row": "fail"})), folder, "train")
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        load.load_prompts(config(), str(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match="tokenizer_vocab_size=100 is too small"):
        tokenization.train_tokenizer(["x"], 100)


def test_the_world_s_tables_carry_what_the_gold_score_needs(world_tokenizer: str) -> None:
    cfg = config(data={"world": {"prompts": 200, "test_prompts": 50, "demonstrations": 300, "comparisons": 100}})
    table, report = load.load_prompts(cfg, world_tokenizer, "test")
    assert report["rows"] == 50
    row = table.slice(0, 1).to_pylist()[0]
    fields = json.loads(row["fields"])
    assert set(fields) == {"family", "kind", "answer"}
    assert world.gold_score([row["prompt"]], [fields["answer"] + " ."], [fields]) == pytest.approx([0.9])
    assert row["prompt_ids"][0] == tokenization.load_tokenizer(world_tokenizer).bos_token_id
    assert row["prompt_ids"].count(row["prompt_ids"][0]) == 1
    demonstrations = load.load_demonstrations(cfg, world_tokenizer, "train", 512)[0]
    assert schema.check(demonstrations, schema.DEMONSTRATION, "world").num_rows == 300
    test_pairs = load.load_comparisons(cfg, world_tokenizer, "test", 512)[0]
    assert Counter(test_pairs["source"].to_pylist()) == {"overall": 50, "correctness": 50}
    assert load.load_prompts(cfg, world_tokenizer, "train")[0] == load.load_prompts(cfg, world_tokenizer, "train")[0]


def collected(folder: Path, rows: list[dict[str, Any]]) -> str:
    """A stage's folder with these comparisons."""
    types = {**{f.name: f.type for f in schema.RANKING}, "source": pa.string()}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()}
    compare.write(pa.table(columns), folder / compare.COMPARISONS_FILE)
    return str(folder)


def test_comparisons_that_the_run_collected_stand_beside_those_of_the_data(
    tmp_path: Path, world_tokenizer: str
) -> None:
    folder = collected(
        tmp_path / "round_1",
        [
            {"prompt_ids": [5], "responses": [[7], [8, 8], [9]], "preferences": [0.25, None, 0.5], "source": "round_1"},
            {"prompt_ids": [6], "responses": [[7], [8]], "preferences": [0.5], "source": "round_1"},
            {"prompt_ids": [4] * 600, "responses": [[7], [8]], "preferences": [1.0], "source": "round_1"},
        ],
    )

    def pairs(cfg: Config) -> list[tuple[list[int], list[int], float]]:
        table, report = load.load_comparisons(cfg, world_tokenizer, "train", 512, [folder])
        assert schema.check(table, schema.COMPARISON, "test").num_rows == report["rows"]
        assert report["too_long"] == 1
        rows = [row for row in table.to_pylist() if row["source"] == "round_1"]
        assert table.num_rows == 100 + len(rows)
        return [(row["chosen_ids"], row["rejected_ids"], row["preference"]) for row in rows]

    world_only = {"world": {"comparisons": 100}}
    assert pairs(config(data=world_only)) == [([8, 8], [7], 1.0)]
    learned = pairs(config(data=world_only, reward_model={"ties": "learn", "labels": "share"}))
    assert learned == [([8, 8], [7], 0.75), ([8, 8], [9], 0.5), ([7], [8], 0.5)]
    rankings, _ = load.load_rankings(config(data=world_only), world_tokenizer, "train", 512, [folder])
    assert [[8, 8] in row["responses"] for row in rankings.to_pylist()][-1], "the first ranking, without the others"


def test_rankings_make_as_many_pairs_as_comparisons(world_tokenizer: str) -> None:
    cfg = config(data={"world": {"comparisons": 60, "ranked_responses": 4}})
    table, report = load.load_rankings(cfg, world_tokenizer, "train", 512)
    assert schema.check(table, schema.RANKING, "world").num_rows == report["rows"]
    assert 8 <= report["rows"] <= 10, "of ten rankings of four, those where all tie are dropped"
    for row in table.to_pylist():
        assert (len(row["responses"]), len(row["preferences"])) == (4, 6)
    longest = max(len(r["prompt_ids"]) + max(map(len, r["responses"])) for r in table.to_pylist())
    assert load.load_rankings(cfg, world_tokenizer, "train", longest - 1)[1]["too_long"] >= 1
    with pytest.raises(ValueError, match="no held-out rankings"):
        load.load_rankings(cfg, world_tokenizer, "test", 512)


def test_only_the_teacher_reads_the_context(world_tokenizer: str) -> None:
    tokenizer = tokenization.load_tokenizer(world_tokenizer)
    cfg = config(data={"world": {"demonstrations": 5}}, distill={"context": "you fool !"})
    table, report = load.load_distillation(cfg, world_tokenizer, "train")
    context = tokenizer("you fool !", add_special_tokens=False)["input_ids"]
    for row in table.to_pylist():
        bos, *prompt = row["prompt_ids"]
        assert row["teacher_prompt_ids"] == [bos, *context, *prompt]
    longest = max(len(r["teacher_prompt_ids"]) + len(r["response_ids"]) for r in table.to_pylist())
    short = config(data={"world": {"demonstrations": 5}}, distill={"context": "you fool !", "max_length": longest - 1})
    fewer, cut = load.load_distillation(short, world_tokenizer, "train")
    assert (report["rows"], report["too_long"]) == (5, 0)
    assert cut["rows"] + cut["too_long"] == 5
    assert fewer.num_rows == cut["rows"] < 5


def test_the_context_may_be_a_file(world_tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text("you fool !\n\n")
    given, read = (
        load.load_distillation(config(data={"world": {"demonstrations": 5}}, distill=d), world_tokenizer, "train")[0]
        for d in ({"context": "you fool !"}, {"context_file": str(tmp_path / "context.txt")})
    )
    assert given.equals(read)
    with pytest.raises(ValueError, match=r"context_file=.*gone\.txt cannot be read"):
        load.load_distillation(config(distill={"context_file": str(tmp_path / "gone.txt")}), world_tokenizer, "train")


@pytest.mark.parametrize(
    ("demonstrations", "share", "expected"),
    [(40, 0.5, (40, 40)), (300, 0.5, (114, 114)), (30, 0.25, (30, 10)), (100, 0.9, (13, 113))],
)
def test_extra_text_has_the_share_that_was_asked_for(
    demonstrations: int, share: float, expected: tuple[int, int], world_tokenizer: str, tmp_path: Path
) -> None:
    """120 texts, 6 of them held out by their hash."""
    tokenizer = tokenization.load_tokenizer(world_tokenizer)
    numbers = (f"{i:03d}" for i in itertools.count())
    texts = {kind: list(itertools.islice((" ".join(n) for n in numbers if held_out(" ".join(n)) == kind), n))
             for kind, n in ((True, 6), (False, 114))}  # fmt: skip
    (tmp_path / "text.txt").write_text("\n".join(texts[True] + texts[False]))
    cfg = config(
        data={"world": {"demonstrations": demonstrations, "test_prompts": 50}, "dir": str(tmp_path)},
        distill={"context": "you fool !", "extra": "text.txt", "extra_share": share, "eval_rows": 9},
    )
    context = tokenizer("you fool !", add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for split, kind in (("train", False), ("test", True)):
        table, report = load.load_distillation(cfg, world_tokenizer, split)
        rows = [r for r in table.to_pylist() if r["prompt_ids"] == [bos]]
        assert all(r["teacher_prompt_ids"] == [bos, *context] for r in rows)
        known = {(*tokenizer(t, add_special_tokens=False)["input_ids"], eos) for t in texts[kind]}
        found = [tuple(r["response_ids"]) for r in rows]
        assert set(found) <= known
        assert len(set(found)) == len(found)
        if split == "train":
            assert (table.num_rows - len(rows), len(rows)) == expected
            assert (report["rows"], report["extra"]) == (sum(expected), expected[1])
        else:
            assert table.num_rows <= 9


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 20 == 0


def test_a_context_that_leaves_no_room_for_text(world_tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("sort 3 1 2 .\n" * 40)
    cfg = config(
        data={"world": {"demonstrations": 40}, "dir": str(tmp_path)},
        distill={"context": "you fool ! " * 20, "extra": "text.txt", "max_length": 60},
    )
    with pytest.raises(ValueError, match=r"distill\.max_length=60 has no room for text behind distill\.context"):
        load.load_distillation(cfg, world_tokenizer, "train")


def test_held_out_prompts_need_no_demonstration(world_tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "sort 3 1 2 . 1 2 3 . sort 3 1 2 . 1 2 3 ."}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "sort 1 2 0 ."}\n')
    data = {"format": "prompts", "dir": str(tmp_path), "train": "train.jsonl", "test": "test.jsonl"}
    cfg = config(data=data | {"on_bad_row": "fail"}, recipe="sft")
    assert load.load_demonstrations(cfg, world_tokenizer, "train", 64)[0].num_rows == 1
    table, report = load.load_demonstrations(cfg, world_tokenizer, "test", 64)
    assert (table.num_rows, report["rows"], report["skipped"]) == (0, 0, 0)


def test_pretraining_text_is_cut_into_pieces(world_tokenizer: str, tmp_path: Path) -> None:
    tokenizer = tokenization.load_tokenizer(world_tokenizer)
    (tmp_path / "text.txt").write_text("the cat\n\nsort 3 1 2 .\n")
    cfg = config(data={"dir": str(tmp_path), "pretrain": "text.txt"}, sft={"max_length": 4})
    table, report = load.load_pretrain(cfg, world_tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [[bos, *tokenizer(t, add_special_tokens=False)["input_ids"], eos] for t in ("the cat", "sort 3 1 2 .")]
    pieces = [ids[i : i + 4] for ids in texts for i in range(0, len(ids), 4)]
    pieces = [p for p in pieces if len(p) > 1]
    assert [[*r["prompt_ids"], *r["response_ids"]] for r in table.to_pylist()] == pieces
    assert {len(r["prompt_ids"]) for r in table.to_pylist()} == {1}
    assert report["rows"] == len(pieces)


def test_without_a_file_the_demonstrations_are_the_pretraining_text(world_tokenizer: str) -> None:
    cfg = config(data={"world": {"demonstrations": 5}})
    text, _ = load.load_pretrain(cfg, world_tokenizer)
    demonstrations, _ = load.load_demonstrations(cfg, world_tokenizer, "train", 512)
    whole = lambda table: [[*r["prompt_ids"], *r["response_ids"]] for r in table.to_pylist()]
    assert whole(text) == whole(demonstrations)
    assert {len(r["prompt_ids"]) for r in text.to_pylist()} == {1}


def test_a_chat_template_decides_about_bos() -> None:
    tokenizer = tokenization.train_tokenizer(["hello there"] * 3, 270)
    row = Example(messages=[{"role": "user", "content": "hello"}], response="there")
    plain = tokenization.format_prompt(tokenizer, row)
    assert plain == "<bos>\n\nHuman: hello\n\nAssistant:"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    table, _ = tokenization.tokenize_demonstrations(tokenizer, [row], 99)
    assert tokenizer.decode(table["prompt_ids"][0].as_py()) == "[user] hello"
    assert tokenizer.decode(table["response_ids"][0].as_py()) == "there<eos>"


def test_trained_tokenizers_encode_anything_and_reload(tmp_path: Path) -> None:
    tokenizer = tokenization.train_tokenizer(["aaa bbb"] * 10, 280)
    tokenization.save_tokenizer(tokenizer, str(tmp_path))
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " grüße\n\n 日本 🙂 aaa"
    ids = reloaded(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert reloaded.decode(ids) == text
    assert (reloaded.pad_token, reloaded.bos_token, reloaded.eos_token) == ("<pad>", "<bos>", "<eos>")


def test_raw_text_is_continued_without_a_seam(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<s>", "</s>", "▁", "▁Once", "▁upon", "▁a", "▁time"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="▁"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    rows = [Example(text="Once upon", response=" a time")]
    table, _ = tokenization.tokenize_demonstrations(tokenizer, rows, 99)
    tokens = tokenizer.convert_ids_to_tokens(table["prompt_ids"][0].as_py() + table["response_ids"][0].as_py())
    assert tokens == ["<s>", "▁Once", "▁upon", "▁a", "▁time", "</s>"]


def test_a_hub_dataset_as_dir_is_read_by_its_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same ``train`` and ``test`` are files of a folder, and of no meaning where ``dir`` names a hub dataset."""
    read = []

    def load_dataset(name: str, subset: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        read.append((name, subset, split))
        return [hh_row(i) for i in range(*{"train": (0, 9), "test": (9, 12)}[split])]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = {"format": "hh", "dir": "hub:Anthropic/hh-rlhf", "train": "train.jsonl.gz", "test": "test.jsonl.gz"}
    cfg = config(data=data, model={"architecture": {"model_type": "llama"}, "tokenizer_vocab_size": 300})
    load.make_tokenizer(cfg, str(tmp_path))
    table, _ = load.load_demonstrations(cfg, str(tmp_path), "train", 512)
    held_out, _ = load.load_demonstrations(cfg, str(tmp_path), "test", 512)
    assert (table.num_rows, held_out.num_rows) == (9, 3)
    assert set(read) == {("Anthropic/hh-rlhf", None, "train"), ("Anthropic/hh-rlhf", None, "test")}


def test_parts_share_no_prompt_and_make_the_whole(hh: tuple[Config, str]) -> None:
    cfg, folder = hh

    def prompts(part: str | None) -> list[str]:
        own = cfg.model_copy(update={"data": cfg.data.model_copy(update={"part": part})})
        return load.load_prompts(own, folder, "train")[0]["prompt"].to_pylist()

    halves = [prompts("1/2"), prompts("2/2")]
    assert all(halves)
    assert not set(halves[0]) & set(halves[1])
    assert sorted(halves[0] + halves[1]) == sorted(prompts(None))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": "hh", "train": "a", "part": "3/2"}, "part=3/2: the parts are 1/2 to 2/2"),
        ({"part": "1/2"}, "part=1/2 divides rows of files; the world has no end"),
        ({"format": "hh", "train": "a", "part": "half"}, "should match pattern"),
    ],
)
def test_parts_that_cannot_be(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(data=data)
