"""A reward model from noisy labels, and the same report of it by training and from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from jobs import Job

SMALL = [
    "data.world={comparisons: 320, test_prompts: 32}",
    "reward_model={batch_size: 16, learner: {cpus: 0.5}, optim: {lr: 2.0e-3}}",
]


@pytest.mark.slow
def test_a_reward_model_is_judged_alike_in_training_and_from_disk(start: Callable[..., Job], config: str) -> None:
    options = ["--config", config, *SMALL]
    trained = start(*options, "recipe=reward_model", "reward_model.label_noise=0.2", folder="trained").wait()
    assert trained.code == 0, trained.output
    figures = trained.summary["reward_model"]
    assert 30 < figures["flipped"] < 100
    assert figures["mean"] != 0
    assert json.loads((trained.folder / "reward_model" / "config.json").read_text())["reward_mean"] == figures["mean"]
    low, high = figures["interval"]
    assert low <= figures["difference"] <= high
    assert sum(part["pairs"] for part in figures["by_source"].values()) == figures["pairs"] == 64
    assert "predicted win probability" in (trained.folder / "report.html").read_text()
    for shown in ("longer wins", "shorter wins", "95 % interval", "calibration error"):
        assert shown in trained.output

    # Another model in the config: model and tokenizer are those of the reward model's folder.
    judge = [*options, "recipe=evaluate_reward", "model={path: null, architecture: {model_type: llama}}"]
    again = start(*judge, f"reward_model.path={trained.folder / 'reward_model'}", folder="again").wait()
    assert again.code == 0, again.output
    for name, value in again.summary["evaluate_reward"].items():
        if isinstance(value, float):
            assert value == pytest.approx(figures[name], abs=1e-4), name
    results = (trained.folder / "reward_model", again.folder / "evaluate_reward")
    tables = [pq.read_table(folder / "held_out_pairs.parquet") for folder in results]
    assert tables[0]["row"].to_pylist() == tables[1]["row"].to_pylist() == list(range(64))
    np.testing.assert_allclose(*(table["difference"].to_numpy() for table in tables), atol=1e-4)

    policy = start(*judge, f"reward_model.path={Path(config).parent}", folder="policy").wait()
    policy.assert_failed(2, "all responses get the same score; is it a policy?")
