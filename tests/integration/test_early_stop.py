"""PPO ends when a figure no longer rises, and its result is the policy of the best evaluation; also after a break."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import Job
from safetensors.torch import load_file

from rlhf_dist.checkpoint import complete
from rlhf_dist.data.trained import final_line

#: A figure that never rises: the first evaluation, after step 2, stays the best. No checkpoint is due in that step.
STOPPING = [
    "evaluation.metrics=[{name: flat, function: 'my_rewards:constant'}]",
    "evaluation={n_samples_per_prompt: 4, best_of_n: [1, 2, 4]}",
    "train={steps: 20, early_stop: {metric: flat, patience: 2}}",
    "run={eval_every: 2, checkpoint_every: 5, keep_last: 1}",
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.fixture(scope="module")
def whole(finish: Callable[..., Job]) -> Job:
    """A run without a break."""
    return finish(*STOPPING)


def test_the_result_is_the_policy_of_the_best_evaluation(whole: Job) -> None:
    assert [row["step"] for row in whole.metrics("eval")] == [0, 2, 4, 6]
    assert [row["step"] for row in whole.metrics("ppo")] == [1, 2, 3, 4, 5, 6]
    stopped = {"metric": "flat", "best": 1.0, "best_step": 2, "last_step": 6, "result_step": 2}
    assert (whole.summary["early_stop"], whole.summary["steps"]) == (stopped, 6)
    assert "flat was best after step 2 of 6; that policy is the result" in whole.output
    assert [Path(folder).name for folder in complete(whole.folder / "checkpoints")] == ["step_000002", "step_000005"]
    result, best, newest = (
        weights(whole.folder / name)
        for name in ("policy", "checkpoints/step_000002/policy", "checkpoints/step_000005/policy")
    )
    assert same(result, best)
    assert not same(result, newest)
    assert [s.step for s in final_line(whole.folder / "ledger.jsonl")] == [1, 2]


def test_its_figures_are_those_of_that_evaluation(whole: Job) -> None:
    (second,) = [row for row in whole.metrics("eval") if row["step"] == 2]
    shown = whole.summary["eval"]["ppo"]
    for name in ("reward", "kl", "reward_best_of_1", "reward_best_of_2", "reward_best_of_4", "kl_bound_best_of_4"):
        assert shown[name] == second[f"eval/{name}"]
    assert shown["reward_best_of_1"] == pytest.approx(shown["reward"])
    assert shown["reward_best_of_1"] < shown["reward_best_of_2"] < shown["reward_best_of_4"]
    over = whole.summary["overoptimization"]
    assert (over["evaluations"], over["flat"]["turn"]) == (4, None)
    assert over["reward"]["start"] == whole.summary["eval"]["sft"]["reward"]
    assert "Over-optimisation" in (whole.folder / "report.html").read_text()


@pytest.mark.slow
def test_after_a_break_it_ends_in_the_same_place(whole: Job, start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, *STOPPING).wait_for_step(4)
    job.process.send_signal(signal.SIGKILL)
    job.process.wait()
    job.assert_nothing_left()
    job = start("--config", config, *STOPPING).wait()
    assert job.code == 0, job.output
    assert "going on after step 2" in job.output
    assert job.summary["early_stop"] == whole.summary["early_stop"]
    assert same(weights(job.folder / "policy"), weights(whole.folder / "policy"))


@pytest.mark.slow
def test_where_no_checkpoint_can_be_written_the_result_is_the_last_policy(
    start: Callable[..., Job], config: str
) -> None:
    job = start("--config", config, *STOPPING, "run.checkpoint_dir=/proc/nowhere").wait()
    assert job.code == 0, job.output
    assert "the result is the policy of the last step, not that of the best" in job.output
    assert (job.summary["early_stop"]["best_step"], job.summary["early_stop"]["result_step"]) == (2, 6)
    (last,) = [row for row in job.metrics("eval") if row["step"] == 6]
    assert job.summary["eval"]["ppo"]["reward"] == pytest.approx(last["eval/reward"])
    assert (job.folder / "policy" / "model.safetensors").exists()
