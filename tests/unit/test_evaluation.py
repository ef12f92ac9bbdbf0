"""Figures of held-out samples, by hand, with scores that were given up."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import rollouts

from rlhf_dist import schema
from rlhf_dist.data.world import build_tokenizer
from rlhf_dist.evaluation.summary import summarize
from rlhf_dist.recipes.ppo import initial_scale

PROMPTS = pa.table(
    {
        "prompt_id": [0, 1, 2],
        "prompt_ids": [[1]] * 3,
        "prompt": ["a", "b", "c"],
        "fields": [json.dumps({"family": f}) for f in ("sort", "sort", "copy")],
    },
    schema=schema.PROMPT,
)


def figures(rewards: Sequence[float | None], gold: Sequence[float]) -> dict[str, Any]:
    """Of three prompts with two samples each."""
    columns = {"score": pa.array(rewards, pa.float32()), "metric/gold": pa.array(gold, pa.float32())}
    table = schema.with_columns(rollouts([(2, 3)] * 6, n_samples=2), pa.table(columns), "test")
    return summarize(table, PROMPTS, build_tokenizer(), "family", 2, best_of_n=[1, 2])


def test_figures_by_hand() -> None:
    found = figures([1, 2, 4, 3, 5, 6], [1, 0, 1, 0, 1, 0])
    assert (found["metrics"]["reward"], found["metrics"]["gold"]) == (3.5, 0.5)
    assert found["std"]["gold"] == 0.5
    assert found["best_of_n"]["1"] == {"reward": 3.5, "gold": 0.5, "kl_bound": 0}
    assert found["best_of_n"]["2"] == pytest.approx({"reward": 4, "gold": 1 / 3, "kl_bound": math.log(2) - 0.5})
    assert found["by_group"] == {"copy": {"reward": 5.5, "gold": 0.5}, "sort": {"reward": 2.5, "gold": 0.5}}
    assert found["unscored"] == 0
    scale = initial_scale(found)
    assert (scale.mean, scale.std) == (3.5, found["std"]["reward"])


def test_what_has_no_reward_is_left_out() -> None:
    found = figures([None, 2, 4, 3, None, None], [1, 0, 1, 0, 1, 0])
    assert (found["metrics"]["reward"], found["metrics"]["gold"]) == (3, 0.5)
    assert found["std"]["reward"] == pytest.approx((2 / 3) ** 0.5)
    best = found["best_of_n"]["2"]
    assert (best["reward"], best["gold"]) == (4, 1), "of the prompt whose samples all have a reward"
    assert found["by_group"] == {"copy": {"gold": 0.5}, "sort": {"reward": 3, "gold": 0.5}}
    assert found["unscored"] == 3
    assert [s["scores"] for s in found["samples"]] == [{"gold": 1}, {"reward": 4, "gold": 1}, {"gold": 1}]


def test_no_reward_at_all() -> None:
    found = figures([None] * 6, [1] * 6)
    assert "reward" not in found["metrics"] | found["std"] | found["stderr"]
    assert found["best_of_n"] == {}
    assert found["unscored"] == 6
    with pytest.raises(ValueError, match=r"reward\.normalize needs scores of the initial policy"):
        initial_scale(found)


def test_the_standard_error_counts_prompts() -> None:
    """Samples of a prompt that are all alike are one observation, samples that are not are as many as there are."""
    alike = figures([1, 1, 4, 4, 7, 7], [0] * 6)["stderr"]
    assert alike["reward"] == pytest.approx(np.std([1, 4, 7], ddof=1) / math.sqrt(3))
    assert alike["gold"] == 0
    missing = figures([1, None, 4, 4, None, None], [0] * 6)["stderr"]["reward"]
    # Two prompts with deviations of 1 - 3 and 2 (4 - 3) from the mean of three samples.
    assert missing == pytest.approx(math.sqrt(2 / 1 * (2**2 + 2**2)) / 3)
    assert figures([1, 2, None, None, None, None], [0] * 6)["stderr"]["reward"] == math.inf


def test_the_standard_error_is_that_of_the_mean() -> None:
    """Of 4 samples to each of 50 prompts that differ: as much as the mean varies over 500 evaluations."""
    from rlhf_dist.evaluation.summary import _stderr

    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(500):
        x = (rng.normal(size=(50, 1)) + rng.normal(size=(50, 4))).reshape(-1)
        means.append(x.mean())
        errors.append(_stderr(x, 4))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
