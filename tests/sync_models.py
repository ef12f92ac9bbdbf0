"""Small random models of many architectures, and what a learner would send of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from rlhf_dist.config import GeneratorConfig, ModelConfig, RolloutConfig, WeightSyncConfig
from rlhf_dist.engines.shards import Shard, pack

VOCAB = 200
CANARY = np.random.default_rng(0).integers(0, VOCAB, 24, dtype=np.int32)
#: Small enough that every model travels in several shards.
SHARD_BYTES = 50_000

#: Head size 32: vLLM's attention on CPUs takes no smaller one.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
#: Config class and what it takes beside the sizes.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "qwen3": ("Qwen3Config", _SIZES),
    "gemma2": ("Gemma2Config", _SIZES | {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", _SIZES | {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "mixtral": ("MixtralConfig", _SIZES | _EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _SIZES | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
}


def build(name: str, *, tied: bool, folder: Path) -> PreTrainedModel:
    """A random model whose log-probabilities differ clearly from uniform; its config is saved in ``folder``."""
    config_class, arguments = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(
        **arguments, tie_word_embeddings=tied, initializer_range=0.1, attn_implementation="eager"
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return model


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int, scale: float = 0.02) -> None:
    """What an optimizer step does: every parameter changes a little."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def shards_of(model: PreTrainedModel, version: int) -> list[Shard]:
    """As ``LearnerWorker.weights`` packs them."""
    return [pack(version, group) for group in named_weights(model)]


def named_weights(model: PreTrainedModel, group_bytes: int = SHARD_BYTES) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Groups under checkpoint names, by the learner's own function (which needs no process group but in ZeRO-3)."""
    from rlhf_dist.engines.deepspeed import LearnerEngine

    learner: Any = SimpleNamespace(module=SimpleNamespace(model=model), zero3=False)
    return LearnerEngine.named_weights(learner, group_bytes)


@torch.no_grad()
def logprobs(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """``[T - 1]``: log-probabilities of ``ids[1:]`` at temperature 1."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0].float()
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].numpy()


def generator_engine(folder: Path, *, tensor_parallel_size: int = 1, **rollout: Any) -> Any:
    """A ``GeneratorEngine`` with random weights, which waits for the learner's; updates may come while requests run."""
    from rlhf_dist.engines.vllm import GeneratorEngine

    return GeneratorEngine(
        str(folder),
        ModelConfig(),
        RolloutConfig(**{"max_prompt_length": 32, "max_response_length": 16, "max_staleness": 1, **rollout}),
        GeneratorConfig(tensor_parallel_size=tensor_parallel_size, kv_cache_gb=0.03, max_num_seqs=16),
        WeightSyncConfig(),
        stop_token_ids=[],
        from_learner=True,
        seed=0,
        context=rollout.get("max_prompt_length", 32) + 16,
    )


def finish(engine: Any) -> list[Any]:
    """Everything that is running or waiting and may begin."""
    samples: list[Any] = []
    while engine.active:
        samples += engine.step()[0]
    return samples
