"""When early stop ends PPO, and after which step the result is; integration/test_early_stop has the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config_io import load
from rlhf_dist.recipes.history import History
from rlhf_dist.run import Run

STOP = ["train.early_stop={metric: gold_score, patience: 2}", "run.eval_every=10"]


def evaluation(gold: float, reward: float | None = 0.0) -> dict[str, Any]:
    scores = {"gold_score": gold} | ({} if reward is None else {"reward": reward})
    return {"metrics": scores | {"kl": 1.0}, "std": dict.fromkeys(scores, 1.0), "stderr": dict.fromkeys(scores, 0.1)}


def history(tmp_path: Path, *options: str, state: dict[str, Any] | None = None) -> History:
    run = Run(load(None, [f"run.root={tmp_path}", *options]))
    run.stage = run.cfg.stages[-1]
    return History(run, evaluation(0.9), state or {})


def after(found: History, golds: Sequence[float]) -> list[tuple[int | None, bool]]:
    """Best step and whether the run has ended, after each evaluation."""
    course = []
    for gold in golds:
        score = found.add(10 * len(found.rows), evaluation(gold))
        assert score == gold
        course.append((found.best_step, found.ended))
    return course


@pytest.mark.parametrize(
    ("golds", "expected"),
    [
        ([0.1, 0.2, 0.3], [(10, False), (20, False), (30, False)]),
        ([0.3, 0.2, 0.1], [(10, False), (10, False), (10, True)]),
        ([0.2, 0.2, 0.2], [(10, False), (10, False), (10, True)]),
        ([0.1, 0.3, 0.2, 0.4, 0.4, 0.3], [(10, 0), (20, 0), (20, 0), (40, 0), (40, 0), (40, 1)]),
    ],
    ids=["rises", "falls", "stays", "falls once and rises again"],
)
def test_patience_counts_evaluations_since_the_best(
    golds: list[float], expected: list[tuple[int, bool]], tmp_path: Path
) -> None:
    """The initial policy, whose gold score of 0.9 nobody reaches, is not among them."""
    assert after(history(tmp_path, *STOP), golds) == expected


def test_a_run_that_goes_on_decides_as_one_without_a_break(tmp_path: Path) -> None:
    golds = [0.1, 0.3, 0.2, 0.1]
    whole = history(tmp_path, *STOP)
    expected = after(whole, golds)
    for cut in range(5):
        before = history(tmp_path, *STOP)
        course = after(before, golds[:cut])
        resumed = history(tmp_path, *STOP, state=json.loads(json.dumps(before.state_dict())))
        assert course + after(resumed, golds[cut:]) == expected
        assert resumed.state_dict() == whole.state_dict()


def test_without_early_stop_the_newest_is_the_result_and_nothing_ends(tmp_path: Path) -> None:
    found = history(tmp_path)
    for step in (10, 20, 30):
        assert found.add(step, evaluation(0.5, reward=-step)) == -step, "checkpoints are kept by the reward"
        assert (found.best_step, found.ended, found.result["step"]) == (None, False, step)
    over = found.run.summary.get("overoptimization")
    assert over["evaluations"] == 4
    assert over["reward"]["last"] == -30
    assert over["gold_score"]["turn"]["step"] == 0


def test_an_evaluation_without_a_score_is_never_the_best(tmp_path: Path) -> None:
    found = history(tmp_path, "train.early_stop.metric=reward", "run.eval_every=10")
    assert found.add(10, evaluation(0.5, reward=None)) is None
    assert found.add(20, evaluation(0.5, reward=-9)) == -9
    assert found.add(30, evaluation(0.5, reward=None)) is None
    assert found.best_step == 20
