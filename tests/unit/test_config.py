"""Configs: the shipped ones load, dump and load agree, overrides; every mistake has its one clear message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist.config import ADVANTAGE_ESTIMATORS, CORRECTION_BOUNDS, POLICY_LOSSES, Config, Section
from rlhf_dist.config_io import EMBEDDED_DEFAULT, ConfigError, all_keys, dump, load
from rlhf_dist.planner import check_fits

SHIPPED = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
ARCHITECTURE = "model: {architecture: {model_type: llama}}\n"


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return str(file)


def message(path: str | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert "Traceback" not in text
    assert "pydantic" not in text
    return text


@pytest.mark.parametrize("file", [*SHIPPED, EMBEDDED_DEFAULT], ids=lambda file: file.name)
def test_shipped_configs_load_and_survive_a_round_trip(file: Path, tmp_path: Path) -> None:
    cfg = load(str(file))
    assert cfg.description
    assert load(write(tmp_path, dump(cfg))) == cfg


def test_a_file_adds_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("base: default\ntrain: {steps: 7}\nalgo: {gamma: 0.9}\n")
    cfg = load(write(tmp_path, "base: base.yaml\nalgo: {gamma: 0.8}\n"), ["seed=3"])
    default = load()
    assert (cfg.train.steps, cfg.algo.gamma, cfg.seed) == (7, 0.8, 3)
    assert cfg.rollout == default.rollout


def test_every_algorithm_has_a_config() -> None:
    used = [load(str(file)) for file in SHIPPED if file.parent.name == "algorithms"]
    assert {c.algo.advantage_estimator for c in used} == set(ADVANTAGE_ESTIMATORS)
    assert {c.algo.policy_loss for c in used} == set(POLICY_LOSSES)
    assert {c.algo.rollout_correction for c in used} == {"auto", *CORRECTION_BOUNDS}
    assert {(c.dpo.loss, c.dpo.label_smoothing > 0) for c in used if "dpo" in c.recipes} == {
        ("dpo", False),
        ("dpo", True),
        ("ipo", False),
    }
    assert {c.reward_model.loss for c in used} == {"pairwise", "kwise"}
    assert {c.algo.use_kl_loss for c in used} == {True, False}
    assert any(c.algo.ptx_coef and c.rollout.dynamic_sampling is False for c in used)
    assert any(c.rollout.dynamic_sampling for c in used)
    assert any(c.algo.kl_target for c in used)
    assert any("distill" in c.recipes for c in used)


def test_names_of_the_config_are_those_of_the_tables() -> None:
    from rlhf_dist.algorithms import registry

    assert set(ADVANTAGE_ESTIMATORS) == set(registry.ADVANTAGE_ESTIMATORS)
    assert set(POLICY_LOSSES) == set(registry.POLICY_LOSSES)
    assert set(CORRECTION_BOUNDS) == set(registry.CORRECTIONS)


def test_the_correction_is_on_where_sampler_and_learner_can_differ() -> None:
    assert load().resolved_algo.rollout_correction == "none"
    assert load(None, ["model.dtype=bfloat16"]).resolved_algo.rollout_correction == "tis"
    own = load(None, ["model.dtype=bfloat16", "algo.policy_loss=decoupled_ppo"])
    assert own.resolved_algo.rollout_correction == "none"


@pytest.mark.parametrize(
    ("options", "recomputes"),
    [
        ([], True),
        (["algo={use_kl_loss: true, kl_estimator: k3}"], False),
        (["algo={use_kl_loss: true, kl_estimator: k3}", "train.epochs=2"], True),
        (["algo={use_kl_loss: true, kl_estimator: k3}", "train.batch_size=32"], True),
        (["algo.kl_coef=0"], False),
        (["algo.kl_coef=0", "train.epochs=2", "algo.old_logprobs=sampler"], False),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_the_learner_looks_at_a_batch_twice_only_where_it_must(options: list[str], recomputes: bool) -> None:
    """A second pass is for the KL in the reward, and for what an optimizer step has moved before a row is read."""
    cfg = load(None, ["rollout.batch_size=64", "train.batch_size=64", *options])
    assert cfg.recomputes_logprobs == recomputes


def test_there_is_a_config_for_every_use() -> None:
    names = {file.name for file in SHIPPED}
    assert names >= {"hh_cpu.yaml", "stories_cpu.yaml", "gsm8k_grpo.yaml", "world_two_ranks.yaml"}
    assert names >= {"gpu_0.5b_1gpu.yaml", "gpu_8b_8gpu.yaml", "gpu_70b_multinode.yaml"}


@pytest.mark.parametrize("file", [file for file in SHIPPED if file.name.startswith("gpu")], ids=lambda file: file.name)
def test_gpu_configs_say_that_they_have_not_been_run(file: Path) -> None:
    assert file.read_text().startswith("# NOT RUN YET")
    assert load(str(file)).description.startswith("not run yet")


@pytest.mark.parametrize(
    "file", [EMBEDDED_DEFAULT, *(f for f in SHIPPED if not f.name.startswith("gpu"))], ids=lambda file: file.name
)
def test_cpu_configs_fit_two_cores(file: Path) -> None:
    """All groups of a stage are up at once, and must fit on the machine that these configs are for."""
    check_fits(load(str(file)), cpus=2, gpus=0)


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    file = write(tmp_path, ARCHITECTURE + "train: {steps: 5, batch_size: 16}\n")
    cfg = load(file, ["train.steps=7", "train.steps=9", "rollout.stop=[a, b]", "data.dir=", "policy.optim.lr=3e-4"])
    assert (cfg.train.steps, cfg.train.batch_size) == (9, 16)
    assert cfg.rollout.stop == ["a", "b"]
    assert cfg.data.dir is None
    assert cfg.policy.optim.lr == 3e-4


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E3", 1e3), (".5e-1", 0.05), ("2.0e-05", 2e-5)])
def test_exponents_are_numbers(text: str, value: float, tmp_path: Path) -> None:
    assert load(write(tmp_path, ARCHITECTURE + f"sft: {{optim: {{lr: {text}}}}}\n")).sft.optim.lr == value
    assert load(None, [f"sft.optim.lr={text}"]).sft.optim.lr == value


def test_an_empty_mapping_takes_back_what_the_file_says() -> None:
    cfg = load(None, ["recipe=sft", "model.path=gpt2", "model.architecture={}"])
    assert cfg.model.path == "gpt2"
    assert cfg.model.architecture == {}


def test_a_mapping_as_override_adds_to_the_section() -> None:
    cfg = load(None, ["train={steps: 30}"])
    assert cfg.train.steps == 30
    assert cfg.train.batch_size == load().train.batch_size


def test_the_shipped_data_folder_can_be_overridden() -> None:
    hh = next(str(file) for file in SHIPPED if file.name == "hh_cpu.yaml")
    assert load(hh).data.dir == "hub:Anthropic/hh-rlhf"
    cfg = load(hh, ["data.dir=some/folder"])
    assert (cfg.data.dir, cfg.data.train, cfg.data.test) == ("some/folder", "train.jsonl.gz", "test.jsonl.gz")


def test_keys_are_documented_and_a_budget() -> None:
    sections, todo = set(), [Config]
    while todo:
        section = todo.pop()
        sections.add(section)
        for field in section.model_fields.values():
            for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(candidate, type) and issubclass(candidate, Section) and candidate not in sections:
                    todo.append(candidate)
    leaves = [
        (section.__name__, name)
        for section in sections
        for name, field in section.model_fields.items()
        if field.description is None
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    ]
    assert leaves == []
    assert len(all_keys()) == len(set(all_keys()))


# What is wrong in the file, and the whole message. {file} is the file's path.
BROKEN_FILES = [
    ("unknown key", "trian: {steps: 3}", "{file}: unknown key trian (value {{'steps': 3}}); did you mean train?"),
    (
        "unknown key in a section",
        "rollout: {temprature: 0.7}",
        "{file}: unknown key rollout.temprature (value 0.7); did you mean rollout.temperature?",
    ),
    ("key of another section", "kl_coef: 0.1", "{file}: unknown key kl_coef (value 0.1); did you mean algo.kl_coef?"),
    ("nothing is near", "zzz: 1", "{file}: unknown key zzz (value 1); see --print-config for all keys"),
    (
        "unknown key two levels down",
        "policy: {optim: {learning_rat: 1}}",
        "{file}: unknown key policy.optim.learning_rat (value 1); see --print-config for all keys",
    ),
    (
        "unknown key in a list",
        "reward: {components: [{modle: trained}]}",
        "{file}: unknown key reward.components.0.modle (value 'trained'); did you mean reward.components.0.model?",
    ),
    (
        "wrong type",
        "train: {steps: many}",
        "{file}: train.steps = 'many': input should be a valid integer, unable to parse string as an integer",
    ),
    (
        "a fraction of a step",
        "train: {steps: 2.5}",
        "{file}: train.steps = 2.5: input should be a valid integer, got a number with a fractional part",
    ),
    ("out of range", "train: {steps: 0}", "{file}: train.steps = 0: input should be greater than 0"),
    ("share above 1", "algo: {gamma: 1.5}", "{file}: algo.gamma = 1.5: input should be less than or equal to 1"),
    ("not a number", "sft: {optim: {lr: .nan}}", "{file}: sft.optim.lr = nan: input should be a finite number"),
    ("infinite", "algo: {kl_coef: .inf}", "{file}: algo.kl_coef = inf: input should be a finite number"),
    (
        "no such choice",
        "recipe: pppo",
        "{file}: recipe = 'pppo': input should be 'sft', 'distill', 'compare', 'reward_model', 'ppo', 'dpo', "
        "'pipeline', 'evaluate' or 'evaluate_reward'",
    ),
    (
        "no such ZeRO stage",
        "policy: {learner: {zero_stage: 0}}",
        "{file}: policy.learner.zero_stage = 0: input should be 1, 2 or 3",
    ),
    (
        "a section is a number",
        "train: 3",
        "{file}: train = 3: input should be a valid dictionary or instance of TrainConfig",
    ),
    ("a list is a string", "rollout: {stop: END}", "{file}: rollout.stop = 'END': input should be a valid list"),
    (
        "element of a list",
        "policy: {optim: {betas: [0.9, 1.5]}}",
        "{file}: policy.optim.betas.1 = 1.5: input should be less than or equal to 1",
    ),
    (
        "no reward",
        "reward: {components: []}",
        "{file}: reward: components is empty: PPO needs a reward",
    ),
    (
        "two sources of one component",
        "reward: {components: [{model: a, url: 'http://b'}]}",
        "{file}: reward.components.0: give exactly one of model, function, url; got ['model', 'url']",
    ),
    (
        "function without a module",
        "reward: {components: [{function: my_reward}]}",
        "{file}: reward.components.0: function must read package.module:function, got 'my_reward'",
    ),
    (
        "skipping what a function does",
        "reward: {components: [{function: 'a:b', on_failure: skip}]}",
        "{file}: reward.components.0: on_failure=skip is for a url; a function that fails ends the run",
    ),
    (
        "a URL of another kind, whose password is not shown",
        "reward: {components: [{url: 'ftp://me:sesame@host/'}]}",
        "{file}: reward.components.0: url must begin with http:// or https://",
    ),
    (
        "a URL without a host",
        "reward: {components: [{url: 'http://:sesame@/score'}]}",
        "{file}: reward.components.0: url must read http://HOST/PATH or http://HOST:PORT/PATH",
    ),
    (
        "two components of one name",
        "reward: {components: [{name: a, model: x}, {name: a, model: y}]}",
        "{file}: reward: components must have different names, got ['a', 'a']",
    ),
    (
        "offload without a GPU",
        "critic: {learner: {offload_optimizer: true}}",
        "{file}: critic.learner: offload_optimizer and offload_params move data off a GPU, but gpus is 0",
    ),
    (
        "biased sampling",
        "rollout: {top_p: 0.9}",
        "{file}: rollout: top_p=0.9, top_k=0 sample from another distribution than the learner computes, which biases "
        "the ratio; set rollout.allow_biased_sampling=true to accept that",
    ),
    (
        "KL that teaches nothing",
        "algo: {use_kl_loss: true}",
        "{file}: algo: kl_estimator=k1 in the loss has an expected gradient of zero; use k2 or k3, "
        "or use_kl_loss=false",
    ),
    (
        "batch that does not divide",
        "train: {batch_size: 48}",
        "{file}: train.batch_size=48 does not divide the 64 samples of a step (rollout.batch_size=64 * "
        "rollout.n_samples_per_prompt=1)",
    ),
    (
        "groups of one",
        "algo: {advantage_estimator: grpo}",
        "{file}: algo.advantage_estimator=grpo compares samples of one prompt, but rollout.n_samples_per_prompt=1; "
        "use 2 or more",
    ),
    (
        "no such estimator",
        "algo: {advantage_estimator: gpro}",
        "{file}: algo: advantage_estimator=gpro: did you mean grpo? expected one of gae, reinforce, "
        "reinforce_plus_plus, remax, rloo, grpo, dr_grpo, reinforce_plus_plus_baseline, or package.module:function",
    ),
    (
        "no such loss",
        "algo: {policy_loss: trpo}",
        "{file}: algo: policy_loss=trpo: expected one of ppo, a2c, gspo, cispo, decoupled_ppo, or "
        "package.module:function",
    ),
    (
        "a critic with GRPO",
        "{algo: {advantage_estimator: grpo}, rollout: {n_samples_per_prompt: 4}, critic: {warmup_steps: 2}}",
        "{file}: critic.warmup_steps=2, but algo.advantage_estimator=grpo has no critic",
    ),
    (
        "dynamic sampling with one sample",
        "rollout: {dynamic_sampling: true}",
        "{file}: rollout.dynamic_sampling=true looks for groups whose scores differ, but "
        "rollout.n_samples_per_prompt=1; use 2 or more",
    ),
    (
        "a correction where the sampler's own figures are taken",
        "algo: {old_logprobs: sampler, rollout_correction: icepop}",
        "{file}: algo: old_logprobs=sampler leaves no gap between π_old and the sampler to correct for, but "
        "policy_loss=ppo and rollout_correction=icepop correct for it; use learner",
    ),
    (
        "two corrections",
        "algo: {policy_loss: decoupled_ppo, rollout_correction: tis}",
        "{file}: algo: rollout_correction=tis with policy_loss=decoupled_ppo weights twice by π_old / μ; "
        "use one of the two",
    ),
    (
        "REINFORCE++ without whitening",
        "algo: {advantage_estimator: reinforce_plus_plus, whiten_advantages: false}",
        "{file}: algo: whiten_advantages=false, but advantage_estimator=reinforce_plus_plus is REINFORCE with "
        "whitening; use reinforce",
    ),
    (
        "dual clip without clip",
        "algo: {policy_loss: cispo, dual_clip: 3}",
        "{file}: algo: dual_clip bounds PPO's loss; policy_loss=cispo does not know it",
    ),
    (
        "GSPO over tokens",
        "algo: {policy_loss: gspo}",
        "{file}: algo: policy_loss=gspo weighs sequences, loss_aggregation=token_mean weighs long ones more; "
        "use loss_aggregation=sequence_mean",
    ),
    (
        "A2C with a second update",
        "{algo: {policy_loss: a2c}, train: {epochs: 2}}",
        "{file}: algo.policy_loss=a2c has no ratio, so only one update of each batch is right, but train.epochs=2 and "
        "train.batch_size=64 make 2; use train.batch_size=64 and train.epochs=1, or policy_loss=ppo",
    ),
    (
        "bounds of nothing",
        "algo: {correction_bounds: [0, 2]}",
        "{file}: algo: correction_bounds=[0.0, 2.0] needs rollout_correction tis, icepop or sequence_mask, got auto",
    ),
    (
        "bounds the wrong way round",
        "algo: {rollout_correction: icepop, correction_bounds: [2, 1]}",
        "{file}: algo: correction_bounds=[2.0, 1.0]: the first must be below the second",
    ),
    (
        "a lower bound for TIS",
        "algo: {rollout_correction: tis, correction_bounds: [0.5, 2]}",
        "{file}: algo: correction_bounds=[0.5, 2.0]: tis cuts large ratios only, the first must be 0",
    ),
    (
        "smoothing of IPO",
        "dpo: {loss: ipo, label_smoothing: 0.1}",
        "{file}: dpo: label_smoothing=0.1 belongs to loss=dpo (it makes cDPO), not to ipo",
    ),
    (
        "a stage twice",
        "pipeline: {stages: [sft, sft]}",
        "{file}: pipeline.stages: two stages are called sft; give one another `name`",
    ),
    (
        "PPO before its reward model",
        "pipeline: {stages: [sft, ppo, reward_model]}",
        "{file}: pipeline.stages=['sft', 'policy', 'reward_model']: policy needs the reward model that "
        "reward.components asks for (`model: trained`); put reward_model before it, or give its folder",
    ),
    (
        "DPO without comparisons",
        "{pipeline: {stages: [sft, dpo]}, data: {format: gsm8k, train: a.jsonl}}",
        "{file}: dpo learns from comparisons, and data.format=gsm8k has none; formats that do: world, hh, preferences, "
        "rankings, qa_feedback, voted",
    ),
    (
        "a teacher that knows nothing more",
        "pipeline: {stages: [sft, distill]}",
        "{file}: distill: teacher and student are the same model and read the same text, so there is nothing to "
        "learn; give distill.context or context_file, distill.teacher or distill.from_scratch=true",
    ),
    (
        "two contexts",
        "distill: {context: be kind, context_file: a.txt}",
        "{file}: distill: context and context_file=a.txt are both given: which one does the teacher read?",
    ),
    (
        "patience without evaluations",
        "sft: {patience: 3}",
        "{file}: sft: patience=3 counts evaluations, and eval_every=0 makes none while training goes on; "
        "give eval_every",
    ),
    (
        "packing without flash attention",
        "sft: {packing: true}",
        "{file}: sft.packing=true needs model.attention=flash_attention_2, got sdpa; without it packed samples cost "
        "the square of their sum",
    ),
    (
        "nothing but extra text",
        "distill: {extra_share: 1}",
        "{file}: distill.extra_share = 1: input should be less than 1",
    ),
    (
        "K-wise without rankings",
        "{reward_model: {loss: kwise}, data: {format: hh, train: a.jsonl}}",
        "{file}: reward_model.loss=kwise needs rankings, and data.format=hh has none; formats that do: world, "
        "rankings, qa_feedback, voted",
    ),
    (
        "a reward model without comparisons",
        "{recipe: reward_model, data: {format: instructions, train: a.jsonl}}",
        "{file}: reward_model learns from comparisons, and data.format=instructions has none; formats that do: world, "
        "hh, preferences, rankings, qa_feedback, voted",
    ),
    (
        "DPO of ties",
        "{pipeline: {stages: [sft, dpo]}, reward_model: {ties: learn}}",
        "{file}: reward_model.ties=learn, labels=majority, binarize=false: dpo reads the same pairs and needs the "
        "better side of each; use drop, majority and false",
    ),
    (
        "K-wise with tags",
        "reward_model: {loss: kwise, binarize: true}",
        "{file}: reward_model: binarize=true compares a response with itself under another tag: use loss=pairwise",
    ),
    (
        "noise in rankings",
        "reward_model: {loss: kwise, label_noise: 0.1}",
        "{file}: reward_model: label_noise=0.1 flips the labels of comparisons, and loss=kwise learns from rankings: "
        "use loss=pairwise",
    ),
    (
        "more noise than labels",
        "reward_model: {label_noise: 0.6}",
        "{file}: reward_model.label_noise = 0.6: input should be less than or equal to 0.5",
    ),
    (
        "no reward model to judge",
        "recipe: evaluate_reward",
        "{file}: recipe evaluate_reward needs a reward model: give its folder, reward_model.path",
    ),
    (
        "nothing to judge a reward model by",
        "{recipe: evaluate_reward, reward_model: {path: r}, data: {format: gsm8k, test: a.jsonl}}",
        "{file}: evaluate_reward judges by comparisons, and data.format=gsm8k has none; formats that do: world, hh, "
        "preferences, rankings, qa_feedback, voted",
    ),
    (
        "no held-out data",
        "{recipe: evaluate_reward, reward_model: {path: r}, data: {format: hh}}",
        "{file}: data.format is hh, but neither data.test nor data.train is given",
    ),
    (
        "a penalty longer than the response",
        "reward: {soft_overlong_cache: 4096}",
        "{file}: reward.soft_overlong_cache=4096 is more than rollout.max_response_length=512",
    ),
    (
        "best of more than there are",
        "evaluation: {n_samples_per_prompt: 4, best_of_n: [1, 16]}",
        "{file}: evaluation: best_of_n=[1, 16] needs 16 samples of each prompt, but n_samples_per_prompt=4; raise it, "
        "or leave the larger n out",
    ),
    (
        "a metric from nowhere",
        "evaluation: {metrics: [{name: a}]}",
        "{file}: evaluation.metrics.0: give exactly one of model, function; got none",
    ),
    (
        "a metric without a module",
        "evaluation: {metrics: [{function: gold}]}",
        "{file}: evaluation.metrics.0: function must read package.module:function, got 'gold'",
    ),
    (
        "a metric with the reward's name",
        "evaluation: {metrics: [{name: reward, model: a}]}",
        "{file}: evaluation: metrics must have different names, and none of them reward, which is the reward's; "
        "got ['reward']",
    ),
    (
        "a metric with a component's name",
        "{evaluation: {metrics: [{name: a, model: x}]}, "
        "reward: {components: [{name: a, model: y}, {name: b, model: z}]}}",
        "{file}: evaluation.metrics and reward.components both have the name a; give one another",
    ),
    (
        "a trained metric that is not trained before PPO",
        "{evaluation: {metrics: [{name: test_pm, model: trained}]}, pipeline: {stages: [sft, ppo]}, "
        "reward: {components: [{model: x}]}}",
        "{file}: evaluation.metrics: test_pm is `model: trained`, the reward model that a pipeline trains before "
        "policy, and there is none; give its folder",
    ),
    (
        "a reward model that nobody uses",
        "{pipeline: {stages: [sft, reward_model, ppo]}, reward: {components: [{model: x}]}}",
        "{file}: pipeline.stages=['sft', 'reward_model', 'policy'] trains a reward model that nobody uses: no "
        "component of reward.components, and none of evaluation.metrics, is `model: trained`",
    ),
    (
        "early stop on nothing",
        "{train: {early_stop: {metric: gold}}, evaluation: {metrics: [{name: test_pm, model: x}]}}",
        "{file}: train.early_stop.metric=gold is no figure of the evaluation; expected one of reward, test_pm, or add "
        "it to evaluation.metrics",
    ),
    (
        "early stop without evaluations",
        "train: {early_stop: {metric: reward}}",
        "{file}: train.early_stop.metric=reward is read every run.eval_every=0 steps of train.steps=100; set "
        "run.eval_every to 1 or more, and less than the steps",
    ),
    (
        "early stop without checkpoints",
        "{train: {early_stop: {metric: reward}}, run: {eval_every: 5, checkpoint_every: 0}}",
        "{file}: train.early_stop.metric=reward goes back to the checkpoint of the best evaluation, but "
        "run.checkpoint_every=0 saves none; set it to 1 or more",
    ),
    (
        "a base that is not there",
        "base: nowhere.yaml",
        "cannot read config {folder}/nowhere.yaml: No such file or directory",
    ),
    ("a base that is a number", "base: 3", "{file}: base must be `default` or a file beside this one, got 3"),
    ("its own base", "base: c.yaml", "{file}: base: c.yaml is based on this file; a config cannot be its own base"),
    (
        "no data",
        "data: {format: hh}",
        "{file}: data.format is hh, but data.train is not given",
    ),
    (
        "tensor parallelism without GPUs for it",
        "generator: {gpus: 1, tensor_parallel_size: 2}",
        "{file}: generator.gpus=1.0 is less than generator.tensor_parallel_size=2",
    ),
    (
        "transport without GPUs",
        "weight_sync: {transport: nccl}",
        "{file}: weight_sync.transport=nccl needs GPUs in policy.learner and generator; on CPUs use object_store",
    ),
    (
        "a key twice",
        "train: {steps: 1}\ntrain: {steps: 2}",
        "{file}, line 3: key 'train' is given twice",
    ),
    ("a key that is a number", "1: 2", "{file}, line 2: key 1 must be a string, got int; quote it"),
    ("a key that is a list", "[a]: 2", "{file}, line 2: key ['a'] must be a string, got list; quote it"),
]


@pytest.mark.parametrize(("text", "expected"), [c[1:] for c in BROKEN_FILES], ids=[c[0] for c in BROKEN_FILES])
def test_a_broken_file(text: str, expected: str, tmp_path: Path) -> None:
    head = ARCHITECTURE
    if text.startswith("{"):  # a flow mapping holds everything
        head, text = "", "{" + ARCHITECTURE.strip() + ", " + text[1:]
    file = write(tmp_path, head + text + "\n")
    assert message(file) == expected.format(file=file, folder=tmp_path)


BROKEN_OVERRIDES = [
    (
        "adapters that vLLM serves, not named",
        "model.lora={rank: 4, serve: adapters}",
        "override 'model.lora={rank: 4, serve: adapters}': model.lora: serve=adapters needs target_modules as a list, "
        "such as [q_proj, v_proj]: vLLM prepares its layers for adapters before it sees the first",
    ),
    ("no value", "train.steps", "override 'train.steps' must read key.path=value, for example train.steps=20"),
    ("no key", "=3", "override '=3' must read key.path=value, for example train.steps=20"),
    ("a gap", "train..steps=3", "override 'train..steps=3' must read key.path=value, for example train.steps=20"),
    (
        "unknown",
        "train.step=3",
        "override 'train.step=3': unknown key train.step (value 3); did you mean train.steps?",
    ),
    (
        "wrong type",
        "rollout.temperature=hot",
        "override 'rollout.temperature=hot': rollout.temperature = 'hot': input should be a valid number, unable to "
        "parse string as a number",
    ),
    (
        "below a value",
        "train.steps.more=3",
        "override 'train.steps.more=3': train.steps = {'more': 3}: input should be a valid integer",
    ),
    (
        "element of a list",
        "reward.components.0.weight=2",
        "override 'reward.components.0.weight=2': reward.components = {'0': {'weight': 2}}: input should be a valid "
        "list",
    ),
    (
        "a key twice",
        "train={steps: 1, steps: 2}",
        "override 'train={steps: 1, steps: 2}', line 1: key 'steps' is given twice",
    ),
    (
        "contradiction",
        "train.batch_size=48",
        "override 'train.batch_size=48': train.batch_size=48 does not divide the 128 samples of a step "
        "(rollout.batch_size=128 * rollout.n_samples_per_prompt=1)",
    ),
    (
        "nothing to train",
        "model.architecture={}",
        "override 'model.architecture={}': model.path and model.architecture are both empty: give a model, or say what "
        "to build",
    ),
]


@pytest.mark.parametrize(("text", "expected"), [c[1:] for c in BROKEN_OVERRIDES], ids=[c[0] for c in BROKEN_OVERRIDES])
def test_a_broken_override(text: str, expected: str) -> None:
    assert message(None, text) == expected


def test_an_override_that_is_not_yaml() -> None:
    text = message(None, "rollout.stop=[a")
    assert text.startswith("override 'rollout.stop=[a': the value is not valid YAML: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert message(missing) == f"cannot read config {missing}: No such file or directory"
    assert message(str(tmp_path)) == f"cannot read config {tmp_path}: Is a directory"
    (tmp_path / "c.yaml").write_bytes(b"train: \xff\xfe")
    assert message(str(tmp_path / "c.yaml")) == f"cannot read config {tmp_path / 'c.yaml'}: not UTF-8 at byte 7"


@pytest.mark.parametrize(
    ("text", "where"), [("train: {steps: 3\n", "line 2"), ("a: b: c\n", "line 1"), ("train:\n\t- 1\n", "line 2")]
)
def test_a_file_that_is_not_yaml_is_named_with_its_line(text: str, where: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    found = message(file)
    assert found.startswith(f"config {file} is not valid YAML: ")
    assert where in found


def test_control_characters_and_other_shapes(tmp_path: Path) -> None:
    file = write(tmp_path, "train: \x00")
    assert message(file).startswith(f"config {file} is not valid YAML: ")
    file = write(tmp_path, "- train\n")
    assert message(file) == f"config {file}: expected a mapping at the top, got list"
    file = write(tmp_path, "")
    assert message(file) == (
        f"{file}: model.path and model.architecture are both empty: give a model, or say what to build"
    )


def test_every_mistake_has_its_line_and_its_own_source(tmp_path: Path) -> None:
    file = write(tmp_path, ARCHITECTURE + "train: {steps: -1}\nrun: {nmae: x}\n")
    assert message(file, "seed=one").splitlines() == [
        "override 'seed=one': seed = 'one': input should be a valid integer, unable to parse string as an integer",
        f"{file}: unknown key run.nmae (value 'x'); did you mean run.name?",
        f"{file}: train.steps = -1: input should be greater than 0",
    ]


def test_a_contradiction_is_blamed_on_the_source_that_made_it(tmp_path: Path) -> None:
    file = write(tmp_path, ARCHITECTURE + "rollout: {top_p: 0.5, batch_size: 32}\n")
    assert message(file, "rollout.max_prompt_length=8").startswith(f"{file}: rollout: top_p=0.5")
    assert message(None, "seed=1", "rollout.top_p=0.5", "rollout.stop=[x]").startswith("override 'rollout.top_p=0.5': ")


def test_long_values_are_cut(tmp_path: Path) -> None:
    assert len(message(None, f"train.steps={'x' * 1000}")) < 1200  # the override itself is named in full
    assert len(message(write(tmp_path, ARCHITECTURE + f"train: {{steps: {'x' * 1000}}}\n"))) < 300


def test_reading_a_config_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'vllm', 'deepspeed', 'pyarrow', 'numpy'}"
    code = f"import sys, rlhf_dist.config_io as c; c.load(); print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("argument", ["train.stepz=3", "train.steps"])
def test_the_program_prints_one_message_and_exits_with_2(argument: str) -> None:
    result = subprocess.run([sys.executable, "-m", "rlhf_dist.main", argument], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: {message(None, argument)}\n"
