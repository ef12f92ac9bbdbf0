"""What the benchmark of the learners draws and counts: lengths, padding, micro-batches; when it refuses to report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import learner

    return learner


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
def test_all_spreads_have_the_tokens_that_were_asked_for(learner: Any, sigma: float) -> None:
    for seed in range(20):
        lengths = learner.response_lengths(sigma, 30, 30 * 40 + 7, 160, np.random.default_rng(seed))
        assert lengths.sum() == 30 * 40 + 7
        assert lengths.min() >= 1
        assert lengths.max() <= 160
        assert sigma or set(lengths.tolist()) == {40, 41}


def test_lengths_spread_as_a_log_normal_does(learner: Any) -> None:
    lengths = learner.response_lengths(0.5, 20_000, 20_000 * 1000, 10**6, np.random.default_rng(0))
    assert np.log(lengths).std() == pytest.approx(0.5, abs=0.01)


def test_lengths_that_cannot_be_are_refused(learner: Any) -> None:
    assert learner.response_lengths(1.0, 4, 4, 9, np.random.default_rng(0)).tolist() == [1] * 4
    assert learner.response_lengths(1.0, 4, 36, 9, np.random.default_rng(0)).tolist() == [9] * 4
    for total in (3, 37):
        with pytest.raises(ValueError, match=f"4 responses of 1 to 9 tokens cannot have {total} tokens"):
            learner.response_lengths(1.0, 4, total, 9, np.random.default_rng(0))


def test_padding_is_what_is_computed_beyond_the_tokens(learner: Any) -> None:
    lengths = np.array([2, 6, 6, 1])
    assert learner.padding_share(lengths, [[1, 2], [0], [3]]) == 0
    assert learner.padding_share(lengths, [[0, 1], [2, 3]]) == pytest.approx(9 / 24)  # 15 tokens in 2 x 6 + 2 x 6


def test_both_sides_learn_from_every_row_once(learner: Any) -> None:
    settings = learner.Settings(rows=9, optimizer_steps=2, mean=20, longest=60, prompt=4, micro_batch_tokens=150)
    batch = learner.Batch.random(settings, 1.0, np.random.default_rng(0))
    assert batch.table["response_ids"].combine_chunks().value_lengths().to_numpy().tolist() == [
        n - 4 for n in batch.lengths
    ]
    size = 150 // batch.lengths.max()
    for plan, in_order in ((batch.bucketed(150), False), (batch.in_order(150), True)):
        for step, rows in zip(plan, batch.minibatches, strict=True):
            found = [row for part in step for row in part]
            assert (found if in_order else sorted(found)) == rows.tolist()
            assert all(len(part) * batch.lengths[part].max() <= 150 for part in step)
            assert not in_order or [len(part) for part in step][:-1] == [size] * (len(step) - 1)


def test_loops_that_differ_are_not_reported(learner: Any) -> None:
    same = [(0.5, 2.0), (0.25, 1.0)]
    steps = {"ours": same, "bare": [(0.500001, 2.0), (0.25, 1.0)], "deepspeed": same}
    learner.check(steps, "policy, long")
    steps["deepspeed"] = [(0.5, 2.0), (0.25, 1.001)]
    with pytest.raises(ValueError, match=r"policy, long, optimizer step 2: .* in 'deepspeed'"):
        learner.check(steps, "policy, long")
    steps["deepspeed"] = [(float("nan"), 2.0), (0.25, 1.0)]
    with pytest.raises(ValueError, match="optimizer step 1"):
        learner.check(steps, "policy, long")
