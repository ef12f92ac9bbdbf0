"""How much memory a process needs at its peak: arithmetic on the shape of its model.

What DeepSpeed, vLLM and the backward pass hold beside the tensors that everybody counts was measured, in bytes for
each parameter, on CPUs; ``python -m benchmarks.memory`` compares the sums with runs. On GPUs nothing was measured: the
figures there are those of the ZeRO paper (1910.02054, section 3) and DeepSpeed's bucket sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from rlhf_dist.config import GeneratorConfig, LearnerConfig, ModelConfig

GIB = 2**30
#: What a process holds once its libraries are imported, in bytes.
PROGRAM = {"learner": 0.5e9, "frozen": 0.4e9, "generator": 0.55e9}
#: ZeRO stage and dtype -> bytes for each trained parameter, beside weights and optimizer: held between micro-batches,
#: and in the optimizer step; each as (on every rank, divided over the ranks). Gradients, their flat copies, DeepSpeed's
#: buffers, and what torch's AdamW computes with. Measured with DeepSpeed 0.19.8 on CPUs.
HELD = {
    (1, "float32"): ((5.7, 0.0), (9.8, 7.6)),
    (1, "bfloat16"): ((9.4, 0.0), (9.8, 7.6)),
    (2, "float32"): ((4.7, 1.2), (6.8, 7.0)),
    (2, "bfloat16"): ((4.3, 3.1), (5.2, 9.8)),
    (3, "float32"): ((6.0, 0.0), (12.5, 9.0)),
    (3, "bfloat16"): ((5.7, 3.6), (5.0, 16.0)),
}
#: DeepSpeed's defaults, in parameters: reduce_bucket_size, and stage3_max_live_parameters.
BUCKET, LIVE = 5e8, 1e9
#: Part of rank 0 alone.
EXPORTED = "exported model"


@dataclass(frozen=True)
class Shape:
    """What of a model decides about memory."""

    parameters: int
    adapters: int
    """Parameters of LoRA's adapters; 0 where all weights are trained."""
    layers: int
    vocabulary: int
    kv_bytes: int
    """Of one token in vLLM's cache."""
    saved: float | None
    """Bytes that the forward pass keeps of one token for the backward pass, the head's output left out; None where the
    model cannot be run without data."""
    layer: float | None
    """The same of one layer, without checkpointing: what is there while it is computed, again in the backward pass."""

    @property
    def trained(self) -> int:
        return self.adapters or self.parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by what they are for."""

    host: dict[str, float] = field(default_factory=dict)
    gpu: dict[str, float] = field(default_factory=dict)

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def gpu_bytes(self) -> float:
        return sum(self.gpu.values())


def width(dtype: str) -> int:
    """Bytes of a number."""
    return {"float32": 4, "bfloat16": 2}[dtype]


def shape(config: Any, model: ModelConfig, sequence: int = 512) -> Shape:
    """Of the causal language model of a Hugging Face ``config``; builds it without memory ("meta" tensors).

    Args:
        sequence: tokens of a sequence, for what grows with its square.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_dist import adapters

    dtype = getattr(torch, model.dtype)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_attention(), trust_remote_code=model.trust_remote_code
        )
        parameters = sum(p.numel() for p in net.parameters())
        if model.lora.rank:
            net = adapters.add_adapters(net, model.lora)
    added = sum(p.numel() for p in net.parameters()) - parameters
    plain = saved = _saved(net, sequence, dtype)
    if model.gradient_checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        saved = _saved(net, sequence, dtype)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads  # GPT-2 has only the latter
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        parameters=parameters,
        adapters=added,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        kv_bytes=2 * text.num_hidden_layers * heads * head * dtype.itemsize,
        saved=saved,
        layer=plain / text.num_hidden_layers if plain is not None else None,
    )


def _saved(net: Any, sequence: int, dtype: Any) -> float | None:
    """Bytes for each token that autograd keeps in a forward pass, weights left out."""
    import torch

    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, sequence, dtype=torch.long, device="meta")
    # Ready-made masks: to make them transformers looks at data.
    mask: Any = torch.zeros(1, 1, sequence, sequence, device="meta", dtype=dtype)
    if kinds := getattr(net.config, "layer_types", None):
        mask = dict.fromkeys(kinds, mask)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net.train()(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    except RuntimeError:  # code that looks at data, such as some routers of experts
        return None
    return sum(storage.nbytes() for storage in kept.values()) / sequence


@cache
def _attention() -> str:
    """Name of an attention that keeps for the backward pass what fused kernels keep, and computes nothing: on "meta"
    tensors torch takes the one that keeps all weights, which no device does."""
    import torch
    from transformers import AttentionInterface

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            out = torch.empty_like(query)
            ctx.save_for_backward(query, key, value, out)
            return out

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        groups = query.shape[1] // key.shape[1]  # without FlashAttention keys and values are repeated for their groups
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
        return Fused.apply(query, key, value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("rlhf_dist_sizes", attention)
    return "rlhf_dist_sizes"


def learner(
    shape: Shape,
    dtype: str,
    placement: LearnerConfig,
    *,
    tokens: int,
    forward_tokens: int = 0,
    predicted: float = 1.0,
    saves: bool,
    exports: bool,
    sends: str | None = None,
) -> Memory:
    """Rank 0 of a DeepSpeed group; the others need no more.

    Args:
        tokens: of a micro-batch.
        forward_tokens: of one that is not learnt from: log-probabilities, held-out data.
        predicted: share of them whose logits are computed.
        saves: whether its state is copied for checkpoints while it trains.
        exports: whether the model is copied beside it.
        sends: type of the weights on their way to generators.
    """
    w, share, stage = width(dtype), 1 / placement.ranks, placement.zero_stage
    n, trained = shape.parameters + shape.adapters, shape.trained
    whole = n * w * (share if stage == 3 else 1.0)
    optimizer = 12 * trained * share
    gathered = min(n, LIVE) * w if stage == 3 else 0.0
    state = (0.0 if stage == 3 else trained * w) + optimizer
    activations = max(_activations(shape, w, tokens, predicted), _forward(shape, forward_tokens, predicted))
    copies = {
        "checkpoint's copy": state if saves else 0.0,
        EXPORTED: n * w if exports and saves else 0.0,
        "weights to send": n * width(sends) * share if sends else 0.0,
    }
    if placement.gpus:
        gradients = 4 * trained * (1.0 if stage == 1 else share)
        working = gathered + 2 * min(trained, BUCKET) * w + activations
        on_gpu = {"weights": whole, "optimizer": optimizer, "gradients": gradients, "activations and buffers": working}
        on_host = {"program": PROGRAM["learner"], **copies}
        for part, moves in (("optimizer", placement.offload_optimizer), ("weights", placement.offload_params)):
            if moves:
                on_host[part] = on_gpu.pop(part)
        return memory(on_host, on_gpu)
    held, stepping = (trained * (every + divided * share) for every, divided in HELD[stage, dtype])
    backward = (2 * w * trained if stage > 1 else 0.0) + activations
    return memory(
        {
            "program": PROGRAM["learner"],
            "weights": whole + gathered,
            "optimizer": optimizer,
            "gradients, activations and buffers": max(held + backward, stepping),
            **copies,
        }
    )


def _activations(shape: Shape, w: int, tokens: int, predicted: float) -> float:
    """Of a forward and backward pass: what all layers keep, what one is computed with, and the logits."""
    layers = (shape.saved or 0.0) + 2 * (shape.layer or 0.0)
    return tokens * (layers + predicted * shape.vocabulary * (12 + 3 * w))


def _forward(shape: Shape, tokens: int, predicted: float) -> float:
    """Of a forward pass alone: one layer at a time, and the logits."""
    return tokens * ((shape.layer or 0.0) + predicted * shape.vocabulary * 13)


def frozen(shape: Shape, dtype: str, gpus: float, *, tokens: int, predicted: float = 1.0, sharded: int = 1) -> Memory:
    """A reference or reward model, of which ``sharded`` processes hold one copy."""
    w, n = width(dtype), shape.parameters
    weights = n * w / sharded + (min(n, LIVE) * w if sharded > 1 else 0.0)
    parts = {"weights": weights, "activations": _forward(shape, tokens, predicted)}
    program = {"program": PROGRAM["frozen"]}
    return memory(program, parts) if gpus else memory(program | parts)


def generator(shape: Shape, dtype: str, g: GeneratorConfig, gpu_bytes: float | None, loads: bool = False) -> Memory:
    """A vLLM engine; on GPUs figures are those of one GPU, whose memory ``gpu_bytes`` vLLM fills up to its limit.

    Args:
        loads: new weights come from a learner; vLLM's layerwise reload ends with the memory of two copies on CPUs.
    """
    weights = shape.parameters * width(dtype) / (g.tensor_parallel_size if g.gpus else 1)
    if g.gpus:
        cache = max(0.0, g.gpu_memory_utilization * gpu_bytes - weights) if gpu_bytes else 0.0
        return memory({"program": PROGRAM["generator"]}, {"weights": weights, "KV cache": cache})
    return memory(
        {
            "program": PROGRAM["generator"] * g.tensor_parallel_size,
            "weights": weights,
            "weights that are loaded": weights if loads else 0.0,
            "KV cache": g.kv_cache_gb * GIB * g.tensor_parallel_size,
        }
    )


def memory(host: dict[str, float], gpu: dict[str, float] | None = None) -> Memory:
    return Memory(*({k: v for k, v in parts.items() if v} for parts in (host, gpu or {})))
