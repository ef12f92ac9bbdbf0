"""Comparisons of sampled responses: which pairs are compared, by whom, and what becomes of the answers.

A stage that compares keeps in its folder

    samples.parquet        one row a prompt, with its different responses (``SAMPLES``)
    to_compare.jsonl       what people are asked: {id, prompt, a, b} a line          } only where
    compared.jsonl         what they say: {id, better: "a" | "b" | "tie"} a line     } people do it
    comparisons.parquet    the samples with ``preferences``, as ``schema.RANKING``

Several answers with one id are those of several annotators.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_dist import schema
from rlhf_dist.data import labels
from rlhf_dist.data.parquet import write
from rlhf_dist.data.ragged import Ragged

SAMPLES_FILE, ASKED_FILE, ANSWERS_FILE, COMPARISONS_FILE = (
    "samples.parquet",
    "to_compare.jsonl",
    "compared.jsonl",
    "comparisons.parquet",
)
ANSWERS = {"a": 1.0, "b": 0.0, "tie": 0.5}

SAMPLES = pa.schema(
    [
        ("prompt", pa.string()),
        ("response_texts", pa.list_(pa.string())),
        ("fields", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.list_(pa.int32()))),
    ]
)

#: A prompt's row, and the numbers of two of its responses.
Pair = tuple[int, int, int]


def collect(rollouts: pa.Table, prompts: pa.Table, tokenizer: Any) -> pa.Table:
    """The different responses to each prompt (``SAMPLES``), in the order of the samples; prompts with one are left out.

    Args:
        rollouts: ``schema.ROLLOUT``; prompts: ``schema.PROMPT``.
    """
    rollouts = rollouts.sort_by([("group_id", "ascending"), ("sample_index", "ascending")])
    ids = Ragged.of(rollouts, "response_ids")
    by_prompt: dict[int, dict[tuple[int, ...], None]] = {}
    for i, row in enumerate(rollouts["prompt_id"].to_pylist()):
        by_prompt.setdefault(row, {})[tuple(ids[i].tolist())] = None
    rows = [row for row, found in by_prompt.items() if len(found) > 1]
    responses = [[list(r) for r in by_prompt[row]] for row in rows]
    asked = prompts.take(pa.array(rows, pa.int64()))
    columns = {
        "prompt": asked["prompt"],
        "response_texts": [tokenizer.batch_decode(r, skip_special_tokens=True) for r in responses],
        "fields": asked["fields"],
        "prompt_ids": asked["prompt_ids"],
        "responses": responses,
    }
    return pa.table(columns, schema=SAMPLES)


def draw(candidates: Sequence[Sequence[Pair]], most: int | None, rng: random.Random) -> list[Pair]:
    """At most ``most`` pairs, one of each prompt in turn until none is left; no pair twice.

    Args:
        candidates: pairs of each prompt.
    """
    decks = [rng.sample(pairs, len(pairs)) for pairs in candidates if pairs]
    limit = sum(map(len, decks)) if most is None else most
    found: list[Pair] = []
    while decks and len(found) < limit:
        rng.shuffle(decks)
        found += [deck.pop() for deck in decks[: limit - len(found)]]
        decks = [deck for deck in decks if deck]
    return found


def by_function(
    folder: Path, function: Callable[..., Sequence[float]], most: int | None, noise: float, seed: int, source: str
) -> int:
    """Compare pairs whose numbers differ, the higher one better, a share ``noise`` turned around; returns how many.

    Args:
        function: as a reward's: f(prompts, responses, fields) -> numbers.

    Raises:
        ValueError: it returns another number of numbers, or one that is not finite.
    """
    samples = pq.read_table(folder / SAMPLES_FILE)
    texts = samples["response_texts"].to_pylist()
    k = [len(row) for row in texts]
    prompts, fields = (
        np.repeat(np.array(samples[name].to_pylist(), object), k).tolist() for name in ("prompt", "fields")
    )
    flat = [text for row in texts for text in row]
    numbers = np.asarray(function(prompts, flat, [json.loads(f) for f in fields]), np.float64)
    if numbers.shape != (len(flat),) or not np.isfinite(numbers).all():
        raise ValueError(f"compare.by returned {numbers.size} numbers for {len(flat)} responses, or one is not finite")
    scores = np.split(numbers, np.cumsum(k)[:-1])
    differ = [[pair for pair in _pairs(row, len(s)) if s[pair[1]] != s[pair[2]]] for row, s in enumerate(scores)]
    rng = random.Random(f"{seed} compared")
    answers: dict[Pair, list[float]] = {}
    for row, i, j in draw(differ, most, rng):
        first_wins = (scores[row][i] > scores[row][j]) != (rng.random() < noise)
        answers[row, i, j] = [float(first_wins)]
    return _write_comparisons(samples, answers, folder, source)


def ask_people(folder: Path, most: int | None, seed: int) -> int:
    """Write ``to_compare.jsonl``; which response is a and which is b is drawn by lot. Returns the number of pairs."""
    samples = pq.read_table(folder / SAMPLES_FILE)
    rng = random.Random(f"{seed} asked")
    pairs = draw([_pairs(row, len(r)) for row, r in enumerate(samples["responses"].to_pylist())], most, rng)
    prompts, texts = samples["prompt"].to_pylist(), samples["response_texts"].to_pylist()
    with open(folder / ASKED_FILE, "w", encoding="utf-8") as file:
        for row, i, j in pairs:
            first, second = rng.sample([i, j], 2)
            line = {"prompt": prompts[row], "a": texts[row][first], "b": texts[row][second]}
            file.write(json.dumps({"id": f"{row}-{first}-{second}"} | line, ensure_ascii=False) + "\n")
    return len(pairs)


def by_people(folder: Path, source: str) -> int:
    """Take over ``compared.jsonl``; returns the number of pairs.

    A preference is the share of the pair's annotators, a tie counting half.

    Raises:
        ValueError: a line that is not an answer to a line of ``to_compare.jsonl``; names file and line.
    """
    asked = {json.loads(line)["id"] for line in (folder / ASKED_FILE).read_text(encoding="utf-8").splitlines()}
    answers: dict[Pair, list[float]] = {}
    for number, line in enumerate((folder / ANSWERS_FILE).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            said = json.loads(line)
            known, better = said["id"] in asked, ANSWERS[said["better"]]
        except (json.JSONDecodeError, KeyError, TypeError):
            known, better = False, 0.0
        if not known:
            raise ValueError(
                f"{folder / ANSWERS_FILE}, line {number}: expected {{id, better}}, an id of {ASKED_FILE} and one of "
                f"{', '.join(ANSWERS)}; got {line[:80]}"
            )
        row, first, second = map(int, said["id"].split("-"))
        low_wins = better if first < second else 1 - better
        answers.setdefault((row, min(first, second), max(first, second)), []).append(low_wins)
    if not answers:
        raise ValueError(f"{folder / ANSWERS_FILE} holds no answer")
    return _write_comparisons(pq.read_table(folder / SAMPLES_FILE), answers, folder, source)


def comparisons_of(rankings: pa.Table) -> pa.Table:
    """The compared pairs of ``schema.RANKING`` as ``schema.COMPARISON``; of a tie the first counts as chosen."""
    pairs = [
        (row["prompt_ids"], chosen, rejected, preference, 0.0, row["source"])
        for row in rankings.to_pylist()
        for chosen, rejected, preference in labels.compared(row["responses"], row["preferences"])
    ]
    columns = zip(*pairs, strict=True) if pairs else [()] * len(schema.COMPARISON)
    return pa.table([list(column) for column in columns], schema=schema.COMPARISON)


def _pairs(row: int, responses: int) -> list[Pair]:
    return [(row, i, j) for i, j in itertools.combinations(range(responses), 2)]


def _write_comparisons(samples: pa.Table, answers: dict[Pair, list[float]], folder: Path, source: str) -> int:
    """Prompts with a compared pair; ``preferences`` in the order (1,2), (1,3) ... (K-1,K), NaN: not compared."""
    rows = sorted({row for row, _, _ in answers})
    preferences = [
        [float(np.mean(answers.get(pair, [np.nan]))) for pair in _pairs(row, len(samples["responses"][row]))]
        for row in rows
    ]
    table = samples.take(pa.array(rows, pa.int64()))
    table = table.append_column("preferences", pa.array(preferences, pa.list_(pa.float32())))
    table = table.append_column("source", pa.array([source] * len(rows)))
    write(schema.check(table, schema.RANKING, "comparisons"), folder / COMPARISONS_FILE)
    return len(answers)


def read(folder: Path) -> pa.Table:
    """The comparisons in the folder of a stage: ``schema.RANKING`` with ``source``."""
    names = [*schema.RANKING.names, "source"]
    return pq.read_table(folder / COMPARISONS_FILE, columns=names)
