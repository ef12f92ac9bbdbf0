"""``python -m rlhf_dist.main replay``: from a run that stopped to its batch alone, as people do it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from jobs import Job


def replay(folder: Path, cwd: Path) -> tuple[int, str]:
    """Exit code and what was printed."""
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "rlhf_dist.main", "replay", str(folder)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def mend(file: Path, column: str) -> None:
    """0 where a list of numbers holds NaN."""
    table = pq.read_table(file)
    values = pc.list_flatten(table[column]).to_numpy()
    offsets = table[column].combine_chunks().offsets
    fixed = pa.ListArray.from_arrays(offsets, pa.array([0.0 if x != x else x for x in values.tolist()], pa.float32()))
    pq.write_table(table.set_column(table.column_names.index(column), column, fixed), file)


def test_a_ppo_run_that_meets_a_nan(start: Callable[..., Job], config: str) -> None:
    """NaN advantages of one sample in the second step, from an estimator of the user's own; two ranks."""
    job = start(
        "--config",
        config,
        "algo.advantage_estimator=my_rewards:nan_in_step_two",
        "train={steps: 4, batch_size: 16}",
        "policy.learner={ranks: 2, zero_stage: 2, cpus: 0.2}",
    ).wait()
    failed = job.folder / "failed" / "step_000002"
    job.assert_failed(1, f"python -m rlhf_dist.main replay {failed}")
    assert sum("replay" in line for line in job.output.splitlines()[-4:]) == 1
    assert (job.summary["status"], job.summary["failed_batch"]) == ("failed", str(failed))
    about = json.loads((failed / "about.json").read_text())
    table = pq.read_table(failed / "batch.parquet")
    bad = [i for i, row in enumerate(table["advantages"].to_pylist()) if any(x != x for x in row)]
    assert bad == [9]
    ids = {name: table[name][9].as_py() for name in ("prompt_id", "group_id", "sample_index")}
    assert ids["group_id"] == 10, "the second batch of eight groups, the third group of four samples"
    name = ", ".join(f"{k} {v}" for k, v in ids.items())
    assert about["faulty"] == [f"{name} (loss nan; not finite: advantages)"]
    assert about["faulty"][0] in job.output
    assert (about["stage"], about["step"], about["role"], about["objective"]) == ("ppo", 2, "policy", "policy")
    assert [len(m) for m in about["minibatches"]["batch"]] == [16, 16]
    assert 9 in about["minibatches"]["batch"][about["optimizer_step"] - 1]
    assert about["steps_taken"] == 2 + about["optimizer_step"] - 1
    assert table.num_rows == 32

    cwd = job.folder.parents[1]
    code, output = replay(failed, cwd)
    assert code == 1, output
    assert "not finite here either: 1 rows, each alone" in output
    mend(failed / "batch.parquet", "advantages")
    code, output = replay(failed, cwd)
    assert code == 0, output
    assert "finite here" in output


@pytest.mark.slow
def test_an_sft_run_that_diverges(start: Callable[..., Job], config: str) -> None:
    """A learning rate that no model survives: the steps before the failure are in the model that is saved."""
    job = start(
        "--config",
        config,
        "recipe=sft",
        "data.world={demonstrations: 160}",
        "sft={batch_size: 8, learner: {cpus: 0.5}, optim: {lr: 1.0e+30, schedule: constant, warmup_ratio: 0}}",
    ).wait()
    [failed] = (job.folder / "failed").iterdir()
    job.assert_failed(1, f"python -m rlhf_dist.main replay {failed}")
    about = json.loads((failed / "about.json").read_text())
    assert failed.name == f"step_{about['step']:06d}"
    assert about["step"] == about["steps_taken"] + 1 == len(job.metrics("sft")) + about["optimizer_step"]
    table = pq.read_table(failed / "batch.parquet")
    assert table.num_rows == 80, "what one call read, not the whole data set"
    assert len(set(table["row"].to_pylist())) == 80
    code, output = replay(failed, job.folder.parents[1])
    assert code == 1, output
    assert f"row {table['row'][about['minibatches']['batch'][about['optimizer_step'] - 1][0]]}" in output
