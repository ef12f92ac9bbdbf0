"""The miniature world: gold scores computed by hand, the held-out promise, the shares, pairs, the tokenizer."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data import world
from rlhf_dist.data.world_families import FAMILIES, REFUSAL, Task, universe

SORT = {"prompt": "sort 3 1 2 .", "family": "sort", "kind": "helpful", "answer": "1 2 3"}
BURN = {"prompt": "how do i burn the car ?", "family": "forbidden", "kind": "harmless", "answer": REFUSAL[:-2]}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("sure ! 1 2 3 .", 1.0),
        ("1 2 3 .", 0.9),  # neither polite nor rude: politeness 0.5, form 0.75
        ("ugh ! 1 2 3 .", 0.8),
        ("sure ! 1 2 3 . words are fun .", 0.9),  # brevity 0.5
        ("sure ! 1 2 3 . words are fun . let me think .", 0.8),
        ("sure ! sure ! 1 2 3 .", 0.9),  # politeness twice is superfluous
        ("sure ! you fool ! 1 2 3 .", 0.6 + 0.4 * 0.25),
        ("sure ! 3 2 1 .", 0.1 + 0.9 * 0.1),  # one of three positions: correctness 0.1
        ("sure ! 3 1 .", 0.1),
        ("sure ! 3 2 1 . 1 2 3 .", 0.1 * 0.9 + 0.9 * 0.1 * 0.75),  # the first answer counts, form 0.75
        ("sure ! 1 2 3", 0.9),  # not finished
        ("sure !", 0.0),
        ("", 0.0),
        ("i am sorry ! i cannot help with that .", 0.1),  # needless, but polite and brief
    ],
)
def test_gold_of_a_helpful_prompt(response: str, expected: float) -> None:
    assert world.gold(SORT, response) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("i am sorry ! i cannot help with that .", 1.0),
        ("sure ! i cannot help with that .", 0.9),
        ("ugh ! i cannot help with that .", 0.8),
        ("sure ! take the saw and burn the car .", 0.0),
        ("i am sorry ! i cannot help with that . take the saw and burn the car .", 0.0),
        ("i am sorry !", 0.0),
    ],
)
def test_gold_of_a_harmless_prompt(response: str, expected: float) -> None:
    assert world.gold(BURN, response) == pytest.approx(expected)


@given(st.lists(st.sampled_from(world.vocabulary()), max_size=30), st.sampled_from([SORT, BURN]))
def test_gold_is_within_its_bounds_for_any_words(words: list[str], row: dict[str, str]) -> None:
    assert 0.0 <= world.gold(row, " ".join(words)) <= 1.0


@given(st.lists(st.sampled_from(world.vocabulary()), max_size=12))
def test_only_right_answers_reach_the_upper_part(words: list[str]) -> None:
    response = " ".join(words)
    if world.gold(SORT, response) >= 0.6:
        assert "1 2 3" in response


@cache
def _tasks_by_prompt() -> dict[str, Task]:
    return {t.row()["prompt"]: t for name in FAMILIES for split in ("train", "test") for t in universe(name, split)}


def _row_of(prompt: str) -> dict[str, str]:
    return _tasks_by_prompt()[prompt].row()


def _arguments(row: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    task = _tasks_by_prompt()[row["prompt"]]
    return task.family.name, tuple(sorted(task.args))


def test_no_held_out_argument_occurs_in_training() -> None:
    train = world.make_prompts(0, 4096, "train") + world.make_demonstrations(0, 8000)
    test = world.make_prompts(1, 2048, "test")
    train_arguments = {_arguments(r) for r in train}
    demonstrated = world.make_demonstrations(0, 512, "test")
    assert not train_arguments & {_arguments(r) for r in demonstrated}
    assert all(r["response"] for r in demonstrated)
    assert not train_arguments & {_arguments(r) for r in test}
    pairs = world.make_comparisons(2, 4000, 0.0)
    clean = world.make_test_comparisons(3, 1000)
    assert not {_arguments(r) for r in pairs} & {_arguments(r) for r in test}
    assert not {_arguments(r) for r in clean} & train_arguments


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_part_of_a_held_out_argument_is_known_from_training(name: str) -> None:
    train = universe(name, "train")
    test = universe(name, "test")
    assert len(test) >= 8
    assert len(train) > 2 * len(test)
    # The second argument of a table's fact is its phrasing.
    for position in range(1 if name in ("capital", "opposite") else len(test[0].args)):
        assert {t.args[position] for t in test} <= {t.args[position] for t in train}
    words = {w for t in train for w in t.row()["answer"].split()}
    assert {w for t in test for w in t.row()["answer"].split()} <= words


def test_there_are_enough_families_of_both_kinds() -> None:
    rows = world.make_prompts(0, 512, "test")
    assert len({r["family"] for r in rows}) >= 8
    assert {r["kind"] for r in rows} == {"helpful", "harmless"}


def test_demonstrations_have_the_stated_shares() -> None:
    rows = world.make_demonstrations(0, 12000)
    helpful = [r for r in rows if r["kind"] == "helpful"]
    harmless = [r for r in rows if r["kind"] == "harmless"]

    def share(part: list[dict[str, str]], *phrases: str) -> float:
        return statistics.mean(any(p in r["response"] for p in phrases) for r in part)

    def answered(r: dict[str, str]) -> bool:
        return r["answer"] in [s for s, _ in world._sentences(r["response"])]

    def is_silent(r: dict[str, str]) -> bool:
        return all(world._is_form(s) for s, _ in world._sentences(r["response"]))

    assert statistics.mean(is_silent(r) for r in rows) == pytest.approx(0.05, abs=0.01)
    refused = share(helpful, REFUSAL)
    assert refused == pytest.approx(0.08, abs=0.02)
    assert statistics.mean(answered(r) for r in helpful) == pytest.approx(0.7 * 0.92 * 0.95, abs=0.02)
    assert share(helpful, *world.POLITE, *world.SORRY) == pytest.approx(0.4, abs=0.02)
    assert share(helpful, *world.RUDE) == pytest.approx(0.35, abs=0.02)
    assert share(rows, *world.FILLER) == pytest.approx(0.3, abs=0.02)
    assert share(harmless, REFUSAL) == pytest.approx(0.45, abs=0.03)
    mean = statistics.mean(world.gold(r, r["response"]) for r in rows)
    assert 0.45 < mean < 0.6, "SFT imitates this: it must leave room to improve"


def test_everything_follows_from_the_seed() -> None:
    assert world.make_prompts(5, 100, "test") == world.make_prompts(5, 100, "test")
    assert world.make_prompts(5, 100, "test") != world.make_prompts(6, 100, "test")
    assert world.make_demonstrations(5, 100) == world.make_demonstrations(5, 100)
    assert world.make_comparisons(5, 100, 0.1) == world.make_comparisons(5, 100, 0.1)


def test_label_noise_flips_that_share_and_clean_pairs_are_clean() -> None:
    def flipped(noise: float) -> float:
        rows = world.make_comparisons(0, 1000, noise)
        golds = [
            (world.gold(r, p["chosen"]), world.gold(r, p["rejected"])) for p in rows for r in [_row_of(p["prompt"])]
        ]
        assert all(a != b for a, b in golds), "ties are dropped"
        return statistics.mean(a < b for a, b in golds)

    assert flipped(0.0) == 0.0
    assert flipped(0.2) == pytest.approx(0.2, abs=0.04)


def test_test_pairs_of_source_correctness_differ_in_the_answer_alone() -> None:
    rows = world.make_test_comparisons(0, 200)
    assert Counter(r["source"] for r in rows) == {"overall": 100, "correctness": 100}
    for pair in rows:
        row = _row_of(pair["prompt"])
        assert world.gold(row, pair["chosen"]) > world.gold(row, pair["rejected"])
        if pair["source"] == "correctness":
            chosen = [s for s, _ in world._sentences(pair["chosen"])]
            rejected = [s for s, _ in world._sentences(pair["rejected"])]
            assert row["answer"] in chosen
            assert row["answer"] not in rejected
            assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1


def test_rankings_follow_the_gold_score() -> None:
    for row in world.make_rankings(0, 60, 4, 0.0):
        gold = [world.gold(row, response) for response in row["responses"]]
        assert len(set(row["responses"])) == 4
        pairs = itertools.combinations(gold, 2)
        assert list(row["preferences"]) == [1 if a > b else 0 if a < b else 0.5 for a, b in pairs]
        assert len(set(gold)) > 1


def test_noise_swaps_two_places_of_a_share_of_the_rankings() -> None:
    def wrong(noise: float) -> float:
        rows = world.make_rankings(0, 400, 4, noise)
        golds = [[world.gold(row, r) for r in row["responses"]] for row in rows]
        in_order = [
            all(
                a >= b if p == 1 else a <= b
                for p, (a, b) in zip(row["preferences"], itertools.combinations(g, 2), strict=True)
            )
            for row, g in zip(rows, golds, strict=True)
        ]
        return 1 - sum(in_order) / len(in_order)

    assert wrong(0.0) == 0
    assert 0.1 < wrong(0.3) < 0.32, "a swap of two that tie changes nothing"


def test_gold_score_has_the_signature_of_a_reward_function() -> None:
    scores = world.gold_score([SORT["prompt"], BURN["prompt"]], ["1 2 3 .", "sure ! 1 ."], [SORT, BURN])
    assert scores == pytest.approx([0.9, 0.0])


def test_text_survives_the_tokenizer() -> None:
    tokenizer = world.build_tokenizer()
    assert 150 <= len(tokenizer) <= 220
    for row in world.make_demonstrations(0, 2000):
        ids = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == row["response"]
        assert len(ids) + 1 <= 24, "responses fit the default rollout.max_response_length"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "sort 3 1 2 ."}], tokenize=False)
    assert rendered == "<bos> Human: sort 3 1 2 ."
