"""Which groups of a batch are replaced, how often, and what is written of scores that were given up."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.actors.rewards import GivenUp
from rlhf_dist.config import Config
from rlhf_dist.observability.summary import Summary
from rlhf_dist.observability.terminal import Terminal
from rlhf_dist.recipes.ppo import replace_groups

ENDPOINT = {"url": "http://judge.example/score", "on_failure": "skip"}


def given_up(groups: list[int], ends_run: bool = False) -> GivenUp:
    where = "http://judge.example/score"
    ids = [100 + g for g in groups]
    return GivenUp(12.5, "judge", where, "status 500", 500, 4, 0.25, ids, groups, ends_run, "reward 'judge': it failed")


class Step:
    """One step of a run in which the process that joins the batch finds ``rounds`` of groups, one after the other."""

    def __init__(self, folder: Path, rounds: list[tuple[list[int], list[int]]], reports: Any = (), **config: Any):
        tree = {
            "recipe": "ppo",
            "model": {"path": "-"},
            "reward": {"components": [ENDPOINT]},
            "algo": {"advantage_estimator": "grpo"},
        }
        tree["rollout"] = {"n_samples_per_prompt": 2, **config.pop("rollout", {})}
        tree["reward"] = tree["reward"] | config.pop("reward", {})
        self.cfg = Config.model_validate(tree)
        self.folder, self.rounds, self.reports = folder, list(rounds), list(reports)
        self.summary, self.printed = Summary(), io.StringIO()
        self.terminal = Terminal(self.printed)
        self.replaced: list[list[int]] = []

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def unfit(self, rollouts: Any, scores: Any) -> tuple[list[int], list[int]]:
        return self.rounds.pop(0)

    def given_up(self) -> list[GivenUp]:
        return self.reports.pop(0) if self.reports else []

    def replace(self, rollouts: Any, groups: list[int]) -> None:
        self.replaced.append(groups)

    def wait(self, seconds: float) -> None:
        """All are there."""

    def __call__(self) -> dict[str, float]:
        step: Any = self
        return replace_groups(step, step, step, step, step, step)

    @property
    def records(self) -> list[dict[str, Any]]:
        file = self.folder / "given_up.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_groups_without_a_reward_are_replaced_until_there_are_none(tmp_path: Path) -> None:
    step = Step(tmp_path, [([3, 4], [1]), ([8], []), ([], [2])], [[given_up([3, 3]), given_up([4])], [given_up([8])]])
    assert step() == {"rollout/unscored_groups": 3}
    assert step.replaced == [[3, 4], [8]], "groups of equal scores stay without dynamic sampling"
    assert [r["group_ids"] for r in step.records] == [[3, 3], [4], [8]]
    assert step.records[0] == {
        "time": 12.5,
        "component": "judge",
        "endpoint": "http://judge.example/score",
        "cause": "status 500",
        "status": 500,
        "attempts": 4,
        "seconds": 0.25,
        "prompt_ids": [103, 103],
        "group_ids": [3, 3],
    }
    assert step.summary.get("reward.given_up") == 4
    (warning,) = [line for line in step.printed.getvalue().splitlines() if "warning" in line]
    assert warning.startswith(
        "warning: 3 groups without a reward were replaced; the last: http://judge.example/score: "
    )


def test_nothing_was_given_up(tmp_path: Path) -> None:
    step = Step(tmp_path, [([], [1])])
    assert step() == {"rollout/unscored_groups": 0}
    assert (step.replaced, step.records, step.summary.get("reward.given_up")) == ([], [], 0)
    assert step.printed.getvalue() == ""


def test_rounds_come_to_an_end(tmp_path: Path) -> None:
    rounds: list = [([i, i + 1], []) for i in range(0, 8, 2)]
    step = Step(tmp_path, rounds, [[given_up([i])] for i in range(4)])
    with pytest.raises(
        ValueError, match=r"^8 groups in 4 rounds got no reward \(reward.skip_rounds=3\). The last: rew"
    ):
        step()
    assert len(step.replaced) == 3
    assert len(step.records) == 4, "the last one is written too"


def test_dynamic_sampling_counts_rounds_of_its_own(tmp_path: Path) -> None:
    rounds = [([], [1]), ([5], [6]), ([7], [2]), ([], [2])]
    step = Step(tmp_path, rounds, rollout={"dynamic_sampling": True, "dynamic_sampling_rounds": 2})
    assert step() == {"rollout/unscored_groups": 2}
    assert step.replaced == [[1], [5, 6], [7]]


def test_a_failure_that_ends_the_run(tmp_path: Path) -> None:
    step = Step(tmp_path, [([3], [])], [[given_up([2]), given_up([3], ends_run=True)]])
    with pytest.raises(ValueError, match=r"^reward 'judge': it failed$"):
        step()
    assert step.replaced == []
    assert len(step.records) == 2


def test_without_endpoints_nobody_looks(tmp_path: Path) -> None:
    components = [{"function": "my_rewards:length"}]
    assert Step(tmp_path, [], reward={"components": components})() == {}
    equal = Step(tmp_path, [([], [1]), ([], [])], reward={"components": components}, rollout={"dynamic_sampling": True})
    assert equal() == {}
    assert equal.replaced == [[1]]
    assert equal.summary.get("reward.given_up") is None
