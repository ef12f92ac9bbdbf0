"""``--dry-run --emit k8s``: what it prints fits the base of ``k8s/``, its rules, and what the config asks for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import OVERLAYS, ROOT, amount, broken, config, render, renderer, workers

from rlhf_dist import manifest
from rlhf_dist.config_io import load
from rlhf_dist.main import main
from rlhf_dist.needs import check_memory, gpu_bytes, needs

CPU_DEMO = ROOT / "k8s" / "overlays" / "cpu-demo" / "run.yaml"


def emitted(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["--config", str(CPU_DEMO), "--dry-run", "--emit", "k8s", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(renderer() is None, reason="neither kubectl nor kustomize is installed")
@pytest.mark.parametrize(
    ("arguments", "pods"),
    [
        ([], {"learner": 1, "generator": 1, "scorer": 1}),
        (["policy.learner={gpus: 1, ranks: 12}", "train.batch_size=96", "rollout.batch_size=96"], {"learner": 2}),
    ],
    ids=["cpus", "gpus"],
)
def test_the_base_with_the_patch_keeps_every_rule(
    arguments: list[str], pods: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nodes.yaml").write_text(emitted(capsys, *arguments))
    overlay = yaml.safe_load((CPU_DEMO.parent / "kustomization.yaml").read_text())
    overlay["resources"] = ["base"]
    overlay["patches"] = [{"target": {"kind": "RayJob"}, "path": "nodes.yaml"}]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    run = yaml.safe_load(CPU_DEMO.read_text())
    cfg = load(str(CPU_DEMO), arguments)
    # The rules compare with the config in the ConfigMap.
    run |= {key: cfg.model_dump(mode="json")[key] for key in ("policy", "train", "rollout")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    subprocess.run(["cp", "-r", str(ROOT / "k8s" / "base"), str(tmp_path / "base")], check=True)
    command = renderer()
    assert command is not None
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    objects = list(yaml.safe_load_all(done.stdout))
    assert broken(objects) == {}
    found = {pod.name: pod for pod in workers(objects)}
    assert set(found) == {"learner", "generator", "scorer"}
    assert {name: found[name].count for name in pods} == pods
    planned = {group.name: group for group in manifest.groups(cfg)}
    for name, pod in found.items():
        assert amount(pod.limits["memory"]) == planned[name].memory * 2**30
        assert amount(pod.limits.get("nvidia.com/gpu", 0)) == planned[name].gpus


def test_a_pod_holds_what_is_planned_for_its_processes() -> None:
    cfg = load(str(CPU_DEMO), [])
    members = needs(cfg)
    (learner,) = (group for group in manifest.groups(cfg) if group.name == "learner")
    by_stage = {
        stage: sum(n.host_bytes for n in members if n.role.stage == stage and "learner" in n.role.resources)
        for stage in ("sft", "reward_model", "ppo")
    }
    actors = (learner.memory - learner.shared) * 2**30 - manifest.RAY_BYTES
    largest = max(by_stage.values())  # stages run one after the other
    assert largest <= actors < largest + 2**30
    assert learner.resources == {"learner": 2}
    assert learner.store < learner.shared * 2**30


def test_gpus_are_dealt_out_to_nodes_of_eight() -> None:
    cfg = load(str(CPU_DEMO), ["generator={gpus: 2, tensor_parallel_size: 2, replicas: 6}"])
    (generator,) = (group for group in manifest.groups(cfg) if group.name == "generator")
    assert (generator.pods, generator.gpus, generator.resources) == (2, 6, {"generator": 3})


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["--dry-run", "--emit", "k8s", *arguments]) == 2
    return capsys.readouterr().err


def test_a_process_belongs_to_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "generator.resources={a: 1, b: 1}")
    assert "generator asks for ['a', 'b']: a process can lie in one worker group only" in message


def test_without_the_models_config_there_are_no_sizes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reward = json.dumps({"components": [{"name": "r", "function": "rlhf_dist.data.world:gold_score"}]})
    options = ["recipe=ppo", "model.path=nobody/nothing", "model.architecture={}", f"reward={reward}"]
    assert "the model's config is not here" in refusal(capsys, *options)


def test_emit_alone_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--emit", "k8s"])
    assert error.value.code == 2
    assert "--emit belongs to --dry-run" in capsys.readouterr().err


# The overlays that are there


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B-Base": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-72B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.skipif(renderer() is None, reason="neither kubectl nor kustomize is installed")
@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "dev"])  # which has no job
def test_the_pods_of_an_overlay_hold_what_its_config_needs(overlay: str, tmp_path: Path) -> None:
    objects = render(overlay)
    cfg = config(objects)
    if cfg.model.path is not None:
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[cfg.model.path]))
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": str(tmp_path)})})
    members = needs(cfg)
    for pod in workers(objects):
        assert pod.group is not None
        shared = amount(pod.volume("/dev/shm")["emptyDir"]["sizeLimit"])
        has = pod.count * (amount(pod.limits["memory"]) - shared - manifest.RAY_BYTES)
        for stage in dict.fromkeys(n.role.stage for n in members):
            here = [n for n in members if n.role.stage == stage and set(n.role.resources) & set(pod.group["resources"])]
            needed = {n.role.role: n.host_bytes for n in here}
            assert sum(needed.values()) <= has, f"{pod.name} in stage {stage}: {needed}"
    assert check_memory(members, None, gpu_bytes(cfg), together=False) == []
