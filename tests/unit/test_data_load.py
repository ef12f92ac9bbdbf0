"""From config to token tables: rendering, lengths, held-out prompts, label shuffling, tokenizers."""

from __future__ import annotations

import itertools
import json
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
from rlhf_dist.data import load, tokenization, world
from rlhf_dist.data.formats import Example, parse


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


def test_hh_tables_say_what_the_rows_say(hh: tuple[Config, str]) -> None:
    cfg, folder = hh
    tokenizer = tokenization.load_tokenizer(folder)
    prompts, report = load.load_prompts(cfg, folder, "train")
    schema.check(prompts, schema.PROMPT, "prompts")
    assert {k: report[k] for k in ("rows", "skipped", "too_long", "held_out")} == {
        "rows": 112,
        "skipped": 3,
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
    assert (pair["margin"], pair["source"]) == (0.0, "helpful-base")

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
    rows = [parse("hh", hh_row(0))]
    tokenizer = tokenization.load_tokenizer(folder)
    assert tokenization.tokenize_comparisons(tokenizer, rows, longer)[1] == 0
    assert tokenization.tokenize_comparisons(tokenizer, rows, longer - 1)[1] == 1


def test_shuffled_labels_keep_the_pairs_and_lose_the_order(hh: tuple[Config, str]) -> None:
    cfg, folder = hh
    control = cfg.model_copy(update={"reward_model": cfg.reward_model.model_copy(update={"shuffle_labels": True})})
    clean = load.load_comparisons(cfg, folder, "train", 512)[0].to_pylist()
    shuffled = load.load_comparisons(control, folder, "train", 512)[0]
    schema.check(shuffled, schema.COMPARISON, "pairs")
    swapped = 0
    for a, b in zip(clean, shuffled.to_pylist(), strict=True):
        if a != b:
            swapped += 1
            assert b == a | {"chosen_ids": a["rejected_ids"], "rejected_ids": a["chosen_ids"]}
    assert 35 < swapped < 77
    tests = [load.load_comparisons(c, folder, "test", 512)[0] for c in (cfg, control)]
    assert tests[0] == tests[1], "the control is measured on clean pairs"


def test_clear_errors_instead_of_empty_tables(hh: tuple[Config, str], tmp_path: Path) -> None:
    cfg, folder = hh
    (tmp_path / "bad.jsonl").write_text('{"chosen": "x"}\n')
    bad = config(data={"format": "hh", "dir": str(tmp_path), "train": "bad.jsonl"})
    with pytest.raises(ValueError, match=r"no usable row for data\.format=hh; .*bad\.jsonl:1: 'chosen' has no"):
        load.load_prompts(bad, folder, "train")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: "):
        load.load_prompts(config(data=bad.data.model_copy(update={"on_bad_row": "fail"})), folder, "train")
    with pytest.raises(ValueError, match="takes no sampled pairs"):
        load.load_comparisons(cfg, folder, "train", 512, sampled=pa.table({"prompt_id": [0]}))
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


def test_sampled_pairs_of_the_world_are_made_of_the_rollouts(world_tokenizer: str) -> None:
    cfg = config(data={"world": {"prompts": 30, "comparisons": 100, "label_noise": 0.0, "sampled_pairs": 0.5}})
    tokenizer = tokenization.load_tokenizer(world_tokenizer)
    prompts, _ = load.load_prompts(cfg, world_tokenizer, "train")
    rows: list[dict[str, Any]] = []
    for p in prompts.to_pylist():
        answer = json.loads(p["fields"])["answer"]
        for text in (f"of course ! {answer} .", f"{answer} {answer} ."):
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            rows.append({"prompt_id": p["prompt_id"], "response_ids": ids})
    table, report = load.load_comparisons(cfg, world_tokenizer, "train", 512, sampled=pa.Table.from_pylist(rows))
    assert (report["rows"], report["sampled_pairs"]) == (100, 30), "one pair of a prompt, the rest from demonstrations"
    right = {tuple(r["response_ids"]) for r in rows[::2]}
    wrong = {tuple(r["response_ids"]) for r in rows[1::2]}
    pairs = table.to_pylist()
    assert sum(tuple(p["rejected_ids"]) in wrong and tuple(p["chosen_ids"]) in right for p in pairs) == 30
    assert {p["source"] for p in pairs} == {"helpful", "harmless"}


def test_rankings_make_as_many_pairs_as_comparisons(world_tokenizer: str) -> None:
    cfg = config(data={"world": {"comparisons": 60, "ranked_responses": 4}})
    table, report = load.load_rankings(cfg, world_tokenizer, "train", 512)
    assert schema.check(table, schema.RANKING, "world").num_rows == report["rows"]
    assert 8 <= report["rows"] <= 10, "of ten rankings of four, those where all tie are dropped"
    for row in table.to_pylist():
        assert len(row["responses"]) == len(row["ranks"]) == 4
    longest = max(len(r["prompt_ids"]) + max(map(len, r["responses"])) for r in table.to_pylist())
    assert load.load_rankings(cfg, world_tokenizer, "train", longest - 1)[1]["too_long"] >= 1
    with pytest.raises(ValueError, match="holds no rankings"):
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
