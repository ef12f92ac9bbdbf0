"""Memory of processes as planned, against published sizes and sums by hand. Runs: ``python -m benchmarks.memory``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import LLAMA

from rlhf_dist import sizes
from rlhf_dist.config import Config, GeneratorConfig, LearnerConfig, ModelConfig
from rlhf_dist.main import main
from rlhf_dist.needs import Models, Need, check_memory, checkpoint_bytes, needs, object_store, rollout_bytes
from rlhf_dist.planner import Role
from rlhf_dist.sizes import Memory, Shape

FUNCTION = {"components": [{"name": "r", "function": "rlhf_dist.data.world:gold_score"}]}
# Of the models' config.json, and the number of parameters that their cards give.
QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
#: 10 parameters, all trained; a token keeps 7 bytes.
TEN = Shape(parameters=10, adapters=0, layers=2, vocabulary=3, kv_bytes=8, saved=7.0, layer=5.0)


def hf_config(keys: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    keys = dict(keys)
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def config(folder: Path, **sections: Any) -> Config:
    """PPO from a folder that holds a model's config and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 200}))
    sections = {"reward": FUNCTION, **sections}
    return Config.model_validate({"recipe": "ppo", "model": {"path": str(folder)}, **sections})


# Shapes


@pytest.mark.parametrize(("keys", "billions"), [(QWEN_7B, 7.62), (QWEN_30B_A3B, 30.5)])
def test_parameters_are_those_that_the_models_cards_give(keys: dict[str, Any], billions: float) -> None:
    found = sizes.shape(hf_config(keys), ModelConfig(path="x", dtype="bfloat16"), 16)
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.002)
    # 2 (keys and values) x layers x heads x size of a head x 2 bytes
    heads, head = keys["num_key_value_heads"], keys.get("head_dim", 128)
    assert found.kv_bytes == 2 * keys["num_hidden_layers"] * heads * head * 2


def test_adapters_are_counted_apart() -> None:
    plain = ModelConfig(path="x")
    lora = ModelConfig.model_validate({"path": "x", "lora": {"rank": 8}})
    whole, adapted = (sizes.shape(hf_config(LLAMA | {"vocab_size": 200}), m, 16) for m in (plain, lora))
    assert whole.parameters == adapted.parameters
    assert whole.adapters == 0
    assert whole.trained == whole.parameters
    assert 0 < adapted.adapters == adapted.trained < whole.parameters


def test_what_the_backward_pass_needs_is_what_autograd_keeps() -> None:
    """Against a forward pass with real tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    length, kept = 32, {}
    net = AutoModelForCausalLM.from_config(hf_config(LLAMA | {"vocab_size": 200}), attn_implementation="sdpa").train()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    mask = torch.zeros(1, 1, length, length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(input_ids=torch.zeros(1, length, dtype=torch.long), attention_mask=mask, use_cache=False, logits_to_keep=1)
    found = sizes.shape(net.config, ModelConfig(path="x"), length).saved
    assert found == pytest.approx(sum(s.nbytes() for s in kept.values()) / length, rel=0.05)


def test_checkpointing_keeps_less() -> None:
    config = hf_config(QWEN_7B)
    plain, less = (
        sizes.shape(config, ModelConfig(path="x", gradient_checkpointing=on), 64).saved for on in (False, True)
    )
    assert plain is not None
    assert less is not None
    assert less < plain / 10


# Processes


def test_a_learner_by_hand() -> None:
    """bfloat16, ZeRO-1, two ranks: 2 bytes of weights, 12 of optimizer on half of them; the step is the peak."""
    found = sizes.learner(
        TEN, "bfloat16", LearnerConfig(ranks=2, zero_stage=1), tokens=1, saves=True, exports=True, sends="float32"
    ).host
    held, stepping = 9.4 * 10, (9.8 + 7.6 / 2) * 10
    activations = 7 + 2 * 5 + 3 * (12 + 3 * 2)
    assert found == {
        "program": sizes.PROGRAM["learner"],
        "weights": 20,
        "optimizer": 60,
        "gradients, activations and buffers": max(held + activations, stepping),
        "checkpoint's copy": 20 + 60,
        "exported model": 20,
        "weights to send": 20,
    }


def test_on_a_gpu_the_optimizer_may_lie_in_host_memory() -> None:
    on_gpu = sizes.learner(TEN, "bfloat16", LearnerConfig(gpus=1, ranks=2), tokens=1, saves=False, exports=False)
    moved = LearnerConfig(gpus=1, ranks=2, offload_optimizer=True)
    off_gpu = sizes.learner(TEN, "bfloat16", moved, tokens=1, saves=False, exports=False)
    assert on_gpu.gpu["optimizer"] == off_gpu.host["optimizer"] == 60
    assert "optimizer" not in off_gpu.gpu
    assert "optimizer" not in on_gpu.host


def test_vllm_takes_its_share_of_a_gpu() -> None:
    g = GeneratorConfig(gpus=2, tensor_parallel_size=2, gpu_memory_utilization=0.5)
    found = sizes.generator(TEN, "float32", g, 1000.0)
    assert found.gpu == {"weights": 20, "KV cache": 480}


def test_longer_micro_batches_and_more_ranks(tmp_path: Path) -> None:
    def policy(**train: Any) -> float:
        lengths = {"max_prompt_length": 48, "max_response_length": 24}
        cfg = config(
            tmp_path, rollout=lengths, train={"batch_size": 64, **train}, policy={"learner": {"zero_stage": 1}}
        )
        return next(n.memory.host_bytes for n in needs(cfg) if n.role.role == "policy")

    assert policy(micro_batch_tokens=1000) < policy(micro_batch_tokens=4000)
    # No micro-batch is larger than the batch: 64 samples of 48 + 24 tokens.
    assert policy(micro_batch_tokens=64 * 72) == policy(micro_batch_tokens=10**6)


def test_every_process_has_its_memory(tmp_path: Path) -> None:
    cfg = config(tmp_path, model={"path": str(tmp_path), "lora": {"rank": 4}})
    found = {n.role.role: n.memory for n in needs(cfg)}
    assert set(found) == {"policy", "critic", "generator", "reward", "reference"}
    assert found["reward"].host == {"program": sizes.PROGRAM["frozen"]}  # a function
    assert found["policy"].host["optimizer"] < found["critic"].host["optimizer"]  # adapters only


def test_the_object_store_by_hand(tmp_path: Path) -> None:
    cfg = config(
        tmp_path,
        rollout={"batch_size": 4, "max_prompt_length": 10, "max_response_length": 20, "max_staleness": 1},
        train={"batch_size": 4},
        weight_sync={"wire_dtype": "bfloat16"},
    )
    assert rollout_bytes(cfg) == 4 * (10 * 4 + 20 * 42)
    assert object_store(cfg, 1000) == {"weights": 2 * 1000 * 2, "rollouts": 2 * rollout_bytes(cfg)}
    parameters = Models(cfg).shape(None, cfg.model, 8).parameters
    assert object_store(cfg, parameters)["weights"] == 4 * parameters


def test_the_size_of_checkpoints_by_hand(tmp_path: Path) -> None:
    cfg = config(tmp_path, algo={"advantage_estimator": "reinforce"}, run={"keep_last": 2})
    parameters = Models(cfg).shape(None, cfg.model, 8).parameters
    # Two that are kept and one being written; 16 bytes of the learner's state and 4 of the policy for each parameter.
    assert checkpoint_bytes(cfg) == 3 * parameters * (16 + 4)
    with_critic = config(tmp_path, run={"keep_last": 2})
    assert checkpoint_bytes(with_critic) == 3 * parameters * (16 + 4 + 16)
    assert checkpoint_bytes(config(tmp_path, run={"checkpoint_every": 0})) is None


# What cannot fit


def need(role: str, processes: int, gpus: float, host: dict[str, float], gpu: dict[str, float] | None = None) -> Need:
    return Need(Role("ppo", role, processes, 1, gpus, ""), Memory(host, gpu or {}))


def test_the_largest_part_says_which_knob_helps() -> None:
    found = [need("policy", 1, 0, {"optimizer": 8e9, "weights": 3e9})]
    (problem,) = check_memory(found, 10e9, None, together=True)
    assert "each policy process needs 11.0 GB, and a node has 10.0 GB; 8.0 GB of it is optimizer" in problem
    assert "offload_optimizer" in problem


def test_processes_of_one_machine_must_fit_together() -> None:
    found = [need("policy", 2, 0, {"weights": 3e9}), need("generator", 1, 0, {"weights": 5e9})]
    assert check_memory(found, 11e9, None, together=True) == []
    (problem,) = check_memory(found, 10e9, None, together=True)
    assert "stage ppo needs 11.0 GB (policy 6.0 GB, generator 5.0 GB), and this machine has 10.0 GB" in problem
    assert check_memory(found, 10e9, None, together=False) == []


def test_processes_that_share_a_gpu_must_fit_together() -> None:
    found = [need("reward", 1, 0.5, {}, {"weights": 50e9}), need("reference", 1, 0.5, {}, {"weights": 40e9})]
    assert check_memory(found, None, 100e9, together=False) == []
    (problem,) = check_memory(found, None, 80e9, together=False)
    assert "needs 90.0 GB (reward 50.0 GB, reference 40.0 GB), and the 1 GPUs that they share have 80.0 GB" in problem


def test_a_dry_run_refuses_what_cannot_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    config(folder)
    command = [
        "--dry-run",
        "recipe=ppo",
        f"model.path={folder}",
        "model.architecture={}",
        f"reward={json.dumps(FUNCTION)}",
    ]
    assert main([*command, "cluster.node_memory_gb=100"]) == 0
    assert "Memory of each process at its peak" in capsys.readouterr().out
    assert main([*command, "cluster.node_memory_gb=0.1"]) == 2
    output = " ".join(capsys.readouterr().out.split())
    assert "each policy process needs" in output
    assert "a node has 0.1 GB" in output


def test_a_model_that_is_not_here_is_said_to_be_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["recipe=ppo", "model.path=nobody/nothing", "model.architecture={}", f"reward={json.dumps(FUNCTION)}"]
    assert main(["--dry-run", *options]) == 0
    assert "memory: not known" in capsys.readouterr().out
