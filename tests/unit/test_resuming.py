"""Which run folders are gone on with, and which changes of the config are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf_dist.config import Config
from rlhf_dist.config_io import dump, load
from rlhf_dist.data.trained import TrainedLedger, TrainedStep, final_line
from rlhf_dist.resuming import differences, unfinished


def leave(folder: Path, status: str = "interrupted", *overrides: str, trained: bool = True) -> Path:
    """What a run with the embedded config leaves behind."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(load(None, ["run.name=a", *overrides])))
    (folder / "summary.json").write_text(json.dumps({"status": status}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "stage": "sft"}\n' if trained else "")
    return folder


def now(*overrides: str) -> Config:
    return load(None, ["run.name=a", *overrides])


def test_a_run_that_is_not_finished_is_gone_on_with(tmp_path: Path) -> None:
    assert not unfinished(tmp_path / "a", now())
    for i, status in enumerate(("running", "interrupted", "failed")):
        assert unfinished(leave(tmp_path / str(i), status), now())
    assert not unfinished(leave(tmp_path / "untrained", trained=False), now("seed=3")), "nothing to go on with"


def test_a_finished_run_and_resume_never_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.name=a: the run in .* is finished; choose another name"):
        unfinished(leave(tmp_path / "a", "finished"), now())
    with pytest.raises(ValueError, match=r"was left failed, and run\.resume is never"):
        unfinished(leave(tmp_path / "b", "failed"), now("run.resume=never"))


@pytest.mark.parametrize(
    "override",
    [
        "run.wait_limit=5",
        "cluster.local_cpus=9",
        "generator={replicas: 3}",
        "policy.learner={ranks: 2}",
        "reward.replicas=2",
        "reference.cpus=2",
        "train.micro_batch_tokens=77",
        "weight_sync.shard_mb=1",
        "description=other",
        "evaluation.cpus=0.5",
    ],
)
def test_where_and_how_fast_may_change(override: str, tmp_path: Path) -> None:
    assert unfinished(leave(tmp_path / "a"), now(override))


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        ("seed=1", "seed", "0 then, 1 now"),
        ("policy.optim.lr=0.1", "policy.optim.lr", "0.0005 then, 0.1 now"),
        ("rollout.batch_size=64", "rollout.batch_size", "128 then, 64 now"),
        ("algo.kl_coef=0", "algo.kl_coef", "0.05 then, 0.0 now"),
        ("rollout.max_staleness=1", "rollout.max_staleness", "0 then, 1 now"),
        ("train.steps=101", "train.steps", "100 then, 101 now"),
        ("pipeline.stages=[sft]", "pipeline.stages", "None then, ['sft'] now"),
        ("data.world={comparisons: 9}", "data.world.comparisons", "18000 then, 9 now"),
    ],
)
def test_what_is_learnt_may_not_change(override: str, key: str, values: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"  {key}: {values}")):
        unfinished(leave(tmp_path / "a"), now(override))


def test_what_is_learnt_may_change_on_request(tmp_path: Path) -> None:
    assert unfinished(leave(tmp_path / "a"), now("policy.optim.lr=0.1", "run.resume=changed"))


def test_differences_name_the_leaf() -> None:
    old, new = {"a": [{"b": 1}, {"b": 2}], "c": [1]}, {"a": [{"b": 1}, {"b": 3}], "c": [1, 2], "d": None, "e": 0}
    assert differences(old, new) == {"a.1.b": (2, 3), "c": ([1], [1, 2]), "e": (None, 0)}


def test_the_ledger_knows_the_line_of_the_final_weights(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = TrainedLedger(path)
    assert ledger.begin(0) == 0
    for step in (1, 2, 3):
        ledger.trained(TrainedStep(step, step, {step: 10 * step}))
    with open(path, "a") as file:
        file.write('{"step": 4, "ver')  # killed
    ledger = TrainedLedger(path)
    assert ledger.begin(2) == 4, "version 3 was used"
    ledger.trained(TrainedStep(3, 5, {3: 30}))
    assert final_line(path) == [TrainedStep(1, 1, {1: 10}), TrainedStep(2, 2, {2: 20}), TrainedStep(3, 5, {3: 30})]
    assert TrainedLedger(path).begin(3) == 6
