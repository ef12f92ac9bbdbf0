"""The plan of a pipeline: names, inputs and configs of its stages."""

from __future__ import annotations

import pytest

from rlhf_dist.config import Stage
from rlhf_dist.config_io import ConfigError, load

BY = "compare.by=rlhf_dist.data.world:gold_score"


def planned(*overrides: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in load(None, list(overrides)).stages}


def test_the_default_and_a_recipe_alone() -> None:
    stages = planned()
    assert list(stages) == ["sft", "comparisons", "reward_model", "policy"]
    assert [s.label for s in stages.values()] == ["sft", "compare", "reward_model", "ppo"]
    assert stages["sft"].start is None
    assert stages["comparisons"].start == "sft"
    assert stages["reward_model"] == Stage("reward_model", "reward_model", "sft", comparisons=("comparisons",))
    assert stages["policy"] == Stage("ppo", "policy", "sft", reward="reward_model", reference="sft")
    assert "comparisons" not in planned("compare={by: null, label_noise: 0}"), "nobody compares"
    assert planned("recipe=sft") == {"sft": Stage("sft", "sft")}


def test_rounds_go_on_with_the_newest_policy_and_stay_near_the_first() -> None:
    stages = planned("pipeline={stages: [sft], round: [compare, reward_model, ppo], rounds: 3}", BY)
    assert list(stages) == [
        "sft",
        *(f"round_{i}/{n}" for i in (1, 2, 3) for n in ("comparisons", "reward_model", "policy")),
    ]
    assert [stages[f"round_{i}/policy"].start for i in (1, 2, 3)] == ["sft", "round_1/policy", "round_2/policy"]
    assert {stages[f"round_{i}/policy"].reference for i in (1, 2, 3)} == {"sft"}
    assert stages["round_3/comparisons"].start == "round_2/policy", "the newest policy is sampled"
    assert stages["round_3/reward_model"].start == "sft", "a reward model does not start from what ppo has bent"
    assert stages["round_3/reward_model"].comparisons == tuple(f"round_{i}/comparisons" for i in (1, 2, 3))
    assert [stages[f"round_{i}/policy"].reward for i in (1, 2)] == ["round_1/reward_model", "round_2/reward_model"]
    assert [s.round for s in stages.values()] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert (stages["round_2/policy"].parent, stages["sft"].parent) == ("round_2", ".")


def test_a_stage_has_keys_of_its_own() -> None:
    cfg = load(
        None,
        [
            "pipeline.stages=[sft, {recipe: reward_model, name: pm_test, set: {reward_model.epochs: 2, seed: 7}}, "
            "reward_model, {recipe: ppo, start: sft, reward: reward_model}]",
        ],
    )
    test, train = cfg.stages[1:3]
    assert (cfg.of(test).reward_model.epochs, cfg.of(test).seed) == (2, 7)
    assert cfg.of(train) is cfg
    assert cfg.stages[3].inputs == ("sft", "reward_model")


def test_inputs_are_looked_for_in_the_own_round_first() -> None:
    stages = planned(
        "pipeline={stages: [sft, reward_model], round: [{recipe: reward_model, start: sft}, "
        "{recipe: ppo, reward: reward_model}], rounds: 2}",
    )
    assert [stages[f"round_{i}/policy"].reward for i in (1, 2)] == ["round_1/reward_model", "round_2/reward_model"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[]", "pipeline.stages is empty: give at least one stage"),
        ("[sft, sft]", "two stages are called sft; give one another `name`"),
        (
            "[sft, reward_model, ppo, {recipe: ppo, name: second}]",
            "the checkpoints of policy and second would lie in one folder; .* such as second/policy",
        ),
        ("[sft, {recipe: dpo, start: stf}]", r"dpo: start=stf: no such stage before it; there are: \['sft'\]"),
        ("[{recipe: reward_model, start: sft}, sft]", "start=sft: no such stage before it; there are: none"),
        ("[sft, {recipe: sft, name: again, reward: sft}]", "reward is for ppo, not for sft"),
        ("[sft, {recipe: dpo, set: {run.name: x}}]", "set: run.name belongs to the whole run"),
        ("[sft, {recipe: dpo, set: {dpo.lrr: 1}}]", "what stage dpo sets is not valid: dpo.lrr .*not permitted"),
        ("[sft, {recipe: dpo, set: {dop.lr: 1}}]", "stage dpo sets dop.lr, and there is no such key"),
        (
            "[sft, {recipe: dpo, set: {dpo.epochs: -1}}]",
            "what stage dpo sets is not valid: dpo.epochs .*greater than 0",
        ),
        ("[sft, ppo]", "policy needs the reward model that reward.components asks for"),
        ("[sft, tfs]", "input should be 'sft', 'distill'"),
        ("[{recipe: sft, name: ../x}]", "string should match pattern"),
    ],
)
def test_what_cannot_be_made_is_said(stages: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [f"pipeline.stages={stages}"])


def test_compare_needs_somebody_who_compares() -> None:
    with pytest.raises(ConfigError, match=r"compare\.by must say who compares what comparisons samples"):
        load(None, ["pipeline.stages=[sft,compare]", "compare={by: null, label_noise: 0}"])
    with pytest.raises(ConfigError, match=r"by must be `people` or read package\.module:function"):
        load(None, ["compare.by=gold"])
    with pytest.raises(ConfigError, match="people make their own"):
        load(None, ["compare.by=people"])
