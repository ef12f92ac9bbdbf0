"""``--dry-run``: which processes a config means, whether they fit, which files are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config import Config
from rlhf_dist.config_io import load
from rlhf_dist.main import main
from rlhf_dist.planner import check_files, check_fits, roles

CONFIGS = Path(__file__).parents[2] / "configs"
FUNCTION = {"components": [{"name": "r", "function": "rlhf_dist.data.world:gold_score"}]}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


def ppo(model: str, **sections: Any) -> Config:
    return Config.model_validate({"recipe": "ppo", "model": {"path": model}, "reward": FUNCTION, **sections})


def shape(cfg: Config) -> list[tuple[str, str, int]]:
    return [(r.stage, r.role, r.processes) for r in roles(cfg)]


# Roles


def test_the_embedded_default_runs_all_stages() -> None:
    assert shape(load()) == [
        ("sft", "sft", 2),
        ("compare", "generator", 1),
        ("reward_model", "reward_model", 2),
        ("ppo", "policy", 1),
        ("ppo", "critic", 1),
        ("ppo", "generator", 1),
        ("ppo", "reward", 1),
        ("ppo", "reference", 1),
    ]


def test_without_critic_reference_and_trained_reward(model: str) -> None:
    cfg = ppo(model, algo={"advantage_estimator": "reinforce", "kl_coef": 0}, generator={"replicas": 3})
    assert shape(cfg) == [("ppo", "policy", 1), ("ppo", "generator", 3), ("ppo", "reward", 1)]


def test_a_pipeline_with_a_function_trains_no_reward_model() -> None:
    cfg = load(None, [f"reward.components={FUNCTION['components']}"])
    assert [stage for stage, *_ in shape(cfg)] == ["sft", "ppo", "ppo", "ppo", "ppo", "ppo"]


def test_a_reward_model_is_judged_by_its_learners_processes_alone() -> None:
    cfg = load(None, ["recipe=evaluate_reward", "reward_model.path=r", "reward_model.learner.ranks=3"])
    assert shape(cfg) == [("evaluate_reward", "reward_model", 3)]
    assert cfg.initial_model == "r"


@pytest.mark.parametrize("recipe", ["sft", "reward_model"])
def test_one_stage_alone(recipe: str) -> None:
    assert shape(load(None, [f"recipe={recipe}"])) == [(recipe, recipe, 2)]


def test_evaluate_needs_no_learner(model: str) -> None:
    cfg = Config.model_validate({"recipe": "evaluate", "model": {"path": model}, "reward": FUNCTION})
    assert shape(cfg) == [("evaluate", "generator", 1), ("evaluate", "reward", 1)]


def test_an_endpoint_is_shown_without_its_secrets(model: str) -> None:
    components = [{"url": "https://me:sesame@judge.example:8443/score?key=sesame", "weight": 2}]
    (reward,) = [r for r in roles(ppo(model, reward={"components": components})) if r.role == "reward"]
    assert reward.what == "2 * https://judge.example:8443/score"


def test_resources_are_those_of_the_config(model: str) -> None:
    cfg = ppo(
        model,
        policy={"learner": {"ranks": 4, "cpus": 2, "gpus": 1, "zero_stage": 3}},
        generator={"cpus": 1.5, "gpus": 2, "tensor_parallel_size": 2},
        reference={"sharded": True, "replicas": 2, "gpus": 0.5},
    )
    found = {r.role: (r.processes, r.cpus, r.gpus, r.what) for r in roles(cfg)}
    assert found["policy"] == (4, 2, 1, "DeepSpeed ZeRO-3")
    assert found["generator"] == (1, 3, 2, "vLLM, tensor parallel 2")
    assert found["reference"] == (2, 1, 0.5, "one ZeRO-3 group")


def test_a_model_among_the_metrics_has_a_process_of_its_own(model: str) -> None:
    metrics = [{"name": "test_pm", "model": model}, {"function": "rlhf_dist.data.world:gold_score"}]
    evaluation = {"metrics": metrics, "cpus": 0.5, "gpus": 1}
    cfgs = [ppo(model, evaluation=evaluation), load(None, ["evaluation.cpus=0.5", "pipeline.stages=[sft,dpo]"])]
    cfgs.append(Config.model_validate({"recipe": "evaluate", "model": {"path": model}, "evaluation": evaluation}))
    found = [next(r for r in roles(cfg) if r.role == "metrics") for cfg in cfgs]
    assert [(r.stage, r.processes, r.cpus, r.gpus, r.what) for r in found] == [
        ("ppo", 1, 0.5, 1, "test_pm and gold_score"),
        ("dpo evaluation", 1, 0.5, 0, "gold_score"),
        ("evaluate", 1, 0.5, 1, "test_pm and gold_score"),
    ]


# Does it fit


def test_the_default_fits_two_cores_and_not_one() -> None:
    check_fits(load(), cpus=2.6, gpus=0)
    with pytest.raises(ValueError, match=r"stage sft needs 2 CPUs \(sft 2x1\), but the cluster has 1\. Lower the cpus"):
        check_fits(load(), cpus=1, gpus=0)


def test_all_groups_of_a_stage_count(model: str) -> None:
    cfg = ppo(model, algo={"kl_coef": 0}, policy={"learner": {"gpus": 1}}, generator={"replicas": 2, "gpus": 0.5})
    check_fits(cfg, cpus=5, gpus=2)
    with pytest.raises(ValueError, match=r"stage ppo needs 2 GPUs \(policy 1x1, critic 1x0, generator 2x0.5, reward"):
        check_fits(cfg, cpus=5, gpus=1)
    with pytest.raises(ValueError, match=r"stage ppo needs 5 CPUs .* but the cluster has 4"):
        check_fits(cfg, cpus=4, gpus=2)


def test_fractions_add_up_without_rounding_errors() -> None:
    check_fits(load(None, ["recipe=sft", "sft.learner.ranks=10", "sft.learner.cpus=0.1"]), cpus=1, gpus=0)


# Are the files there


def test_nothing_is_missing(model: str) -> None:
    assert check_files(load()) == []
    assert check_files(ppo(model)) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.path", "nowhere", "model.path=nowhere: no folder with a config.json there"),
        ("model.path", "./a/b", "model.path=./a/b: no folder with a config.json there"),
        ("model.tokenizer", "/nowhere", "model.tokenizer=/nowhere: no folder"),
        ("critic.path", "~/nowhere", "critic.path=~/nowhere: no folder"),
        ("reward_model.path", "nowhere", "reward_model.path=nowhere: no folder"),
        ("reward.components", "[{model: ./rm}]", "reward.components[0].model=./rm: no folder"),
        ("reward.components", '[{function: "no_such:f"}]', "reward.components[0].function=no_such:f: no such module"),
        ("reward.components", '[{function: "no.such:f"}]', "reward.components[0].function=no.such:f: no such module"),
        ("evaluation.metrics", '[{function: "gone:f"}]', "evaluation.metrics[0].function=gone:f: no such module"),
        ("evaluation.metrics", "[{model: ./test_pm}]", "evaluation.metrics[0].model=./test_pm: no folder"),
        ("distill.extra", "gone.txt", "distill.extra=gone.txt: no such file in"),
        ("distill.context_file", "gone.txt", "distill.context_file=gone.txt: no such file"),
    ],
)
def test_what_is_missing_is_named(key: str, value: str, message: str) -> None:
    overrides = [f"{key}={value}"]
    if key == "model.path":
        overrides.append("model.architecture={}")
    [problem] = check_files(load(None, overrides))
    assert problem.startswith(message)


def test_hub_names_are_not_looked_for_on_disk(model: str) -> None:
    cfg = ppo(
        model,
        critic={"path": "owner/name"},
        data={"format": "prompts", "dir": "hub:owner/data", "train": "train"},
    )
    assert check_files(cfg) == []


def test_data_files(model: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    data = {"format": "prompts", "dir": str(tmp_path), "train": "train.jsonl", "test": "test.jsonl"}
    assert check_files(ppo(model, data=data)) == [f"data.test=test.jsonl: no such file in {tmp_path}"]


# Through the command line


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("gpu_*.yaml")), ids=lambda p: p.stem)
def test_dry_run_accepts_the_gpu_configs_where_there_is_no_gpu(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--config", str(file), "--dry-run"])
    text = capsys.readouterr()
    missing = [line for line in (text.out + text.err).splitlines() if "no such" in line or "no folder" in line]
    assert code == (2 if missing else 0)
    assert "stage ppo needs" in text.out
    assert all("data." in line for line in missing), "only the user's own data may be missing"


def test_dry_run_prints_arithmetic_and_placement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "rollout.batch_size=32", "rollout.n_samples_per_prompt=4", "train.epochs=2"]) == 0
    text = capsys.readouterr().out
    assert "32 x 4 (rollout.n_samples_per_prompt) = 128" in text
    assert "2 (train.epochs) x 128 / 64 (train.batch_size) = 4" in text
    for role in ("sft", "generator", "policy", "critic", "reward", "reference"):
        assert role in text
    assert "files: all there" in text


def test_dry_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "model.path=nowhere", "model.architecture={}"]) == 2
    text = capsys.readouterr()
    assert "model.path=nowhere: no folder with a config.json there" in text.out + text.err


def test_a_broken_override_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "train.stebs=3"]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err


def test_print_config_is_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--print-config", "seed=7"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load(str(tmp_path / "printed.yaml")) == load(None, ["seed=7"])
