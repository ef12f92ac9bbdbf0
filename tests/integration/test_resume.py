"""The same command again goes on where a run ended, whatever ended it."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job
from killed import POINTS
from safetensors.torch import load_file

from rlhf_dist.checkpoint import complete
from rlhf_dist.data.trained import final_line

PPO = [
    "algo={advantage_estimator: gae, kl_coef: 0.1, kl_target: 0.5, kl_horizon: 100, kl_estimator: k1}",
    "algo.use_kl_loss=false",
    "critic={learner: {cpus: 0.2}, warmup_steps: 1}",
    "data.world={prompts: 32, test_prompts: 16}",
    "train={steps: 6, batch_size: 16, epochs: 1, micro_batch_tokens: 400}",
    "run={checkpoint_every: 2, eval_every: 3}",
]
#: Figures that say what was learnt; the others are seconds, or of the machine.
LEARNT = ("rollout/", "train/")


def kill(job: Job) -> None:
    job.process.send_signal(signal.SIGKILL)
    job.process.wait()
    job.assert_nothing_left()


def assert_same(resumed: Job, whole: Job) -> None:
    """The same prompts in the same order, the same figures, the same weights bit for bit."""
    ours, theirs = (final_line(job.folder / "ledger.jsonl") for job in (resumed, whole))
    assert [(s.step, s.rows) for s in ours] == [(s.step, s.rows) for s in theirs]
    for stage in ("ppo", "eval"):
        found, expected = resumed.metrics(stage), whole.metrics(stage)
        assert [r["step"] for r in found] == [r["step"] for r in expected]
        for one, other in zip(found, expected, strict=True):
            for name in [n for n in other if n.startswith(LEARNT) or (stage == "eval" and n.startswith("eval/"))]:
                assert one[name] == pytest.approx(other[name], abs=1e-6), f"{name} in step {other['step']}"
    weights = [load_file(job.folder / "policy" / "model.safetensors") for job in (resumed, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.fixture(scope="module")
def whole(finish: Callable[..., Job]) -> Job:
    """A run without a break."""
    return finish(*PPO)


def test_after_kill_9_it_goes_on_as_if_nothing_had_happened(whole: Job, start: Callable[..., Job], config: str) -> None:
    kill(start("--config", config, *PPO).wait_for_step(3))
    job = start("--config", config, *PPO).wait()
    assert job.code == 0, job.output
    assert "going on after step 2" in job.output
    assert_same(job, whole)
    versions = [s.version for s in final_line(job.folder / "ledger.jsonl")]
    assert versions[:2] == [1, 2]
    assert versions[2] >= 5, "version 3 was published by the run that was killed, and 4 began the new one"
    assert job.summary["resumed"] == 1
    again = start("--config", config, *PPO).wait(60)
    again.assert_failed(2, "is finished; choose another name")


@pytest.mark.slow  # test_submit.py stops a job
def test_sigterm_saves_first(whole: Job, start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, *PPO).wait_for_step(3)
    job.process.send_signal(signal.SIGTERM)
    job.wait(60)
    assert job.code == 130, job.output
    assert "SIGTERM: saving after this step" in job.output
    stopped_after = job.summary["steps"]
    job.assert_nothing_left()
    other = start("--config", config, *PPO, "policy.optim.lr=1e-4").wait(60)
    other.assert_failed(2, "policy.optim.lr: 0.001 then, 0.0001 now")
    job = start("--config", config, *PPO, "run.keep_last=3").wait()
    assert job.code == 0, job.output
    assert f"going on after step {stopped_after}" in job.output
    assert_same(job, whole)


def prompts_trained(job: Job) -> Counter[int]:
    return Counter(row for step in final_line(job.folder / "ledger.jsonl") for row in step.rows.values())


@pytest.mark.slow
def test_ahead_of_the_learner_every_prompt_is_trained_once_per_epoch(start: Callable[..., Job], config: str) -> None:
    """32 prompts, 8 in a step, 8 steps: two epochs, with a kill in the second."""
    options = [*PPO, "train.steps=8", "rollout.max_staleness=2", "generator={replicas: 2, cpus: 0.2}"]
    kill(start("--config", config, *options).wait_for_step(5))
    job = start("--config", config, *options).wait()
    assert job.code == 0, job.output
    assert set(prompts_trained(job).values()) == {2}
    assert len(prompts_trained(job)) == 32
    assert max(r["train/policy_age_max"] for r in job.metrics("ppo")) <= 2
    first_epoch: list[int] = []
    for step in final_line(job.folder / "ledger.jsonl"):
        first_epoch += [row for group, row in step.rows.items() if group < 32]
    assert sorted(first_epoch) == list(range(32))


@pytest.mark.slow
def test_a_pipeline_makes_no_stage_twice(start: Callable[..., Job]) -> None:
    from test_main import PIPELINE

    job = start(*PIPELINE, "train.steps=6").wait_for_step(2)
    made = {
        name: (job.folder / name / "manifest.json").stat().st_mtime for name in ("sft", "comparisons", "reward_model")
    }
    figures = {stage: len(job.metrics(stage)) for stage in ("sft", "reward_model")}
    kill(job)
    job = start(*PIPELINE, "train.steps=6").wait()
    assert job.code == 0, job.output
    for name in made:
        assert f"{name} is there already" in job.output
    assert made == {name: (job.folder / name / "manifest.json").stat().st_mtime for name in made}
    assert figures == {stage: len(job.metrics(stage)) for stage in figures}
    assert [r["step"] for r in job.metrics("ppo")] == [1, 2, 3, 4, 5, 6]
    assert 0 <= job.summary["reward_model"]["accuracy"] <= 1, "figures of the stages before are kept"
    assert 0 <= job.summary["eval"]["sft"]["gold_score"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point(point: str, whole: Job, start: Callable[..., Job], config: str) -> None:
    """At the second time after a checkpoint, so that there is something to lose."""
    saves = point in ("before saving", "while the ranks write") or "manifest" in point or "old ones" in point
    count = 2 if saves else 5
    job = start("--config", config, *PPO, program=["killed", point, str(count)])
    job.process.wait(300)
    assert job.process.returncode == -signal.SIGKILL, job.wait().output
    job.assert_nothing_left()
    job = start("--config", config, *PPO).wait()
    assert job.code == 0, job.output
    assert "going on after step 2" in job.output or "going on after step 4" in job.output
    assert_same(job, whole)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_ahead_of_the_learner(point: str, start: Callable[..., Job], config: str) -> None:
    options = [*PPO, "train.steps=8", "rollout.max_staleness=2", "run.checkpoint_every=1"]
    job = start("--config", config, *options, program=["killed", point, "5"])
    job.process.wait(300)
    job = start("--config", config, *options).wait()
    assert job.code == 0, job.output
    assert set(prompts_trained(job).values()) == {2}
    assert len(prompts_trained(job)) == 32
    groups = [group for step in final_line(job.folder / "ledger.jsonl") for group in step.rows]
    assert sorted(groups) == list(range(64))


def damage(folder: Path, rng: Any) -> None:
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    file = files[rng.integers(len(files))]
    data = file.read_bytes()
    file.write_bytes(data[: rng.integers(len(data))])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    whole: Job, start: Callable[..., Job], config: str
) -> None:
    import numpy as np

    job = start("--config", config, *PPO).wait_for_step(5)
    kill(job)
    damage(job.folder / "checkpoints" / "step_000004", np.random.default_rng(0))
    job = start("--config", config, *PPO).wait()
    assert job.code == 0, job.output
    assert "not used: " in job.output
    assert "going on after step 2" in job.output
    assert_same(job, whole)


@pytest.fixture
def small_disk(whole: Job, tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    newest = Path(complete(whole.folder / "checkpoints")[-1])
    size = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    whole: Job, small_disk: Path, start: Callable[..., Job], config: str
) -> None:
    options = [*PPO, f"run.checkpoint_dir={small_disk}"]
    job = start("--config", config, *options).wait_for_step(5)
    kill(job)
    assert [Path(folder).name for folder in complete(small_disk)] == ["step_000002"]
    job = start("--config", config, *options).wait()
    assert job.code == 0, job.output
    assert "going on after step 2" in job.output
    assert "checkpoint of step 4 was not written: " in job.output
    assert "No space left on device" in job.output, job.output
    assert_same(job, whole)
