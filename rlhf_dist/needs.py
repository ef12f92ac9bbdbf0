"""What the processes of a config need of a machine's memory, and whether it is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_dist import sizes
from rlhf_dist.config import Config, LearnerConfig, ModelConfig, SupervisedConfig
from rlhf_dist.planner import Role, stage_roles
from rlhf_dist.sizes import Memory, Shape

GB = 1e9
#: Bytes of a response token in rollouts and the columns that stages add: ids, masks, versions, log-probabilities (of
#: sampler, learner, reference), values, rewards, advantages, returns. A prompt's token has its id.
RESPONSE_TOKEN, PROMPT_TOKEN = 42, 4
#: What helps, by the part that is largest.
KNOBS = {
    "optimizer": "zero_stage 2 or 3 with more ranks, offload_optimizer, or model.lora",
    "gradients": "zero_stage 2 or 3 with more ranks, or model.lora",
    "gradients, activations and buffers": "smaller micro_batch_tokens, model.gradient_checkpointing, or more ranks",
    "activations and buffers": "smaller micro_batch_tokens, or model.gradient_checkpointing",
    "activations": "smaller micro_batch_tokens of the group",
    "weights": "model.dtype bfloat16, zero_stage 3 with more ranks (generators: tensor_parallel_size; frozen models: "
    "sharded)",
    "weights that are loaded": "model.dtype bfloat16",
    "KV cache": "a smaller generator.kv_cache_gb, on GPUs generator.gpu_memory_utilization",
    "checkpoint's copy": "more ranks, which share the copy",
    sizes.EXPORTED: "model.dtype bfloat16",
    "weights to send": "weight_sync.wire_dtype bfloat16, or more ranks",
    "program": "fewer processes on a node",
}


@dataclass(frozen=True)
class Need:
    """A role of a stage and the memory of each of its processes."""

    role: Role
    memory: Memory

    @property
    def once(self) -> float:
        """What only the first rank of a group has: the model that is exported."""
        return self.memory.host.get(sizes.EXPORTED, 0.0)

    @property
    def host_bytes(self) -> float:
        """Of all processes together."""
        return self.role.processes * (self.memory.host_bytes - self.once) + self.once

    @property
    def gpu_bytes(self) -> float:
        return self.role.processes * self.memory.gpu_bytes


class Models:
    """Shapes of the models that a config names."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._shapes: dict[tuple[str | None, int, int], Shape] = {}

    def shape(self, path: str | None, model: ModelConfig, sequence: int) -> Shape:
        """Of ``path``, or of the model that the run begins with.

        Raises:
            OSError: the model is not here.
            ValueError: it cannot be built.
        """
        path = path or self.cfg.initial_model
        key = (path, model.lora.rank, sequence)
        if key not in self._shapes:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code) if path else self._new
            self._shapes[key] = sizes.shape(config, model, sequence)
        return self._shapes[key]

    @cached_property
    def _new(self) -> Any:
        """Config of the model that the run builds."""
        from rlhf_dist.models import model_config

        m = self.cfg.model
        vocabulary = m.tokenizer_vocab_size
        if m.tokenizer:
            from rlhf_dist.data.tokenization import load_tokenizer

            vocabulary = len(load_tokenizer(m.tokenizer))
        elif self.cfg.data.format == "world":
            from rlhf_dist.data.world import vocabulary as words

            vocabulary = len(words())
        return model_config(m.architecture, vocabulary, {})


def needs(cfg: Config) -> list[Need]:
    """Of every process of every stage; rounds are alike, and the first stands for all.

    Raises:
        OSError: a model that the config names is not here.
    """
    models = Models(cfg)
    return [
        Need(role, _memory(cfg.of(stage), role, models))
        for stage in cfg.stages
        if stage.round < 2
        for role in stage_roles(cfg.of(stage), stage)
    ]


def _memory(cfg: Config, role: Role, models: Models) -> Memory:
    m, r = cfg.model, cfg.rollout
    longest = r.max_prompt_length + r.max_response_length
    predicted = r.max_response_length / longest

    def shape(path: str | None = None, sequence: int = longest, adapters: bool = False) -> Shape:
        plain = m if adapters else m.model_copy(update={"lora": m.lora.model_copy(update={"rank": 0})})
        return models.shape(path, plain, sequence)

    saves = cfg.run.checkpoint_every > 0
    learning = any(stage.recipe == "ppo" and stage.label == role.stage for stage in cfg.stages)
    t, step = cfg.train, cfg.samples_per_step * longest
    match role.role:
        case "policy":
            sends = (cfg.weight_sync.wire_dtype or m.dtype) if cfg.weight_sync.transport == "object_store" else None
            return sizes.learner(
                shape(adapters=True),
                m.dtype,
                cfg.policy.learner,
                tokens=min(t.micro_batch_tokens, _share(t.batch_size, cfg.policy.learner) * longest),
                forward_tokens=min(t.micro_batch_tokens, _share(cfg.samples_per_step, cfg.policy.learner) * longest),
                predicted=predicted,
                saves=saves,
                exports=True,
                sends=sends,
            )
        case "critic":
            path, c = cfg.critic.path, cfg.critic.learner
            return sizes.learner(
                shape(path),
                m.dtype,
                c,
                tokens=min(t.micro_batch_tokens, _share(t.batch_size, c) * longest),
                forward_tokens=min(t.micro_batch_tokens, _share(cfg.samples_per_step, c) * longest),
                predicted=0,
                saves=saves,
                exports=False,
            )
        case "generator":
            return sizes.generator(shape(), m.dtype, cfg.generator, gpu_bytes(cfg), loads=learning)
        case "reference":
            f = cfg.reference
            processes = f.replicas if f.sharded else 1
            tokens = min(f.micro_batch_tokens, step)
            return sizes.frozen(shape(), m.dtype, f.gpus, tokens=tokens, predicted=predicted, sharded=processes)
        case "reward" | "metrics":
            return _scorer(cfg, role.role, shape, min(cfg.reward.micro_batch_tokens, step))
        case recipe:
            return _supervised(cfg, recipe, shape)


def _supervised(cfg: Config, recipe: str, shape: Any) -> Memory:
    stage: SupervisedConfig = getattr(cfg, recipe)
    policy = recipe != "reward_model"
    path = cfg.reward_model.path if recipe == "reward_model" else None
    # A comparison has two sides; sequences are taken to be as long as they may be.
    sides = 2 if recipe in ("reward_model", "dpo") else 1
    rows, held_out = (sides * _share(count, stage.learner) for count in (stage.batch_size, stage.eval_rows))
    return sizes.learner(
        shape(path, stage.max_length, adapters=policy),
        cfg.model.dtype,
        stage.learner,
        tokens=min(stage.micro_batch_tokens, rows * stage.max_length),
        forward_tokens=min(stage.micro_batch_tokens, held_out * stage.max_length),
        predicted=1.0 if policy else 0.0,
        saves=stage.patience is not None,
        exports=False,
    )


def _share(rows: int, placement: LearnerConfig) -> int:
    """Rows of one rank."""
    return math.ceil(rows / placement.ranks)


def _scorer(cfg: Config, role: str, shape: Any, tokens: int) -> Memory:
    """All models of the reward, or of the evaluation's figures, are in one process; functions are not counted."""
    r, e = cfg.reward, cfg.evaluation
    names = [c.model for c in (r.components if role == "reward" else e.metrics) if c.model]
    folders = [name if Path(name).expanduser().is_dir() else None for name in names]  # else trained by the run
    gpus, shards = (r.gpus, r.replicas if r.sharded else 1) if role == "reward" else (e.gpus, 1)
    program = {"program": sizes.PROGRAM["frozen"]}
    found = [sizes.frozen(shape(f), cfg.model.dtype, gpus, tokens=tokens, predicted=0, sharded=shards) for f in folders]
    # One model computes at a time.
    host = program | {
        "weights": sum(f.host.get("weights", 0) for f in found),
        "activations": max((f.host.get("activations", 0) for f in found), default=0),
    }
    on_gpu = {
        "weights": sum(f.gpu.get("weights", 0) for f in found),
        "activations": max((f.gpu.get("activations", 0) for f in found), default=0),
    }
    return sizes.memory(host, on_gpu)


def gpu_bytes(cfg: Config) -> float | None:
    return cfg.cluster.gpu_memory_gb * GB if cfg.cluster.gpu_memory_gb else None


def ppo_of(cfg: Config) -> Config | None:
    """The config of the PPO stage, the first where there are several."""
    return next((cfg.of(stage) for stage in cfg.stages if stage.recipe == "ppo"), None)


def sent_parameters(ppo: Config) -> int:
    """Parameters that every version of the policy brings."""
    return Models(ppo).shape(None, ppo.model, 8).trained


def object_store(cfg: Config, parameters: int) -> dict[str, float]:
    """Bytes that a PPO step keeps in the object store: two versions of the weights, since the new one arrives while
    the old one may still be read, and the rollouts of all steps that are under way."""
    wire = cfg.weight_sync.wire_dtype or cfg.model.dtype
    sent = cfg.weight_sync.transport == "object_store"
    return {
        "weights": 2.0 * parameters * sizes.width(wire) if sent else 0.0,
        "rollouts": float((cfg.rollout.max_staleness + 1) * rollout_bytes(cfg)),
    }


def checkpoint_bytes(cfg: Config) -> float | None:
    """What the checkpoints of PPO take that are kept, and the one being written; None where there are none, or the
    model is not here."""
    if not cfg.runs_ppo or not cfg.run.checkpoint_every:
        return None
    try:
        models = Models(cfg)
        policy, critic = (models.shape(path, cfg.model, 8) for path in (None, cfg.critic.path))
    except OSError:
        return None
    # Weights that are trained, their copy in float32 and two moments; the policy once more, to be used.
    width = sizes.width(cfg.model.dtype)
    state = policy.trained * (width + 12) + policy.parameters * width
    state += critic.parameters * (width + 12) if cfg.uses_critic else 0
    return (cfg.run.keep_last + cfg.run.keep_best + 1) * state


def rollout_bytes(cfg: Config) -> int:
    """Of all samples of a step at their longest."""
    r = cfg.rollout
    return cfg.samples_per_step * (r.max_prompt_length * PROMPT_TOKEN + r.max_response_length * RESPONSE_TOKEN)


def check_memory(found: Sequence[Need], node_bytes: float | None, gpu: float | None, together: bool) -> list[str]:
    """What cannot fit, and what would help.

    Args:
        node_bytes: host memory of a node; None: not known, not checked.
        gpu: memory of a GPU; likewise.
        together: all processes of a stage share one node.
    """
    problems = []
    for need in found:
        memory = need.memory
        for what, has, uses, parts in (
            ("a node", node_bytes, memory.host_bytes, memory.host),
            ("a GPU", gpu, memory.gpu_bytes, memory.gpu),
        ):
            if has is not None and uses > has:
                part = max(parts, key=lambda name: parts[name])
                problems.append(
                    f"stage {need.role.stage}: each {need.role.role} process needs {uses / GB:.1f} GB, and {what} has "
                    f"{has / GB:.1f} GB; {parts[part] / GB:.1f} GB of it is {part}: {KNOBS[part]}"
                )
    if problems:
        return problems
    for stage in dict.fromkeys(need.role.stage for need in found):
        members = [need for need in found if need.role.stage == stage]
        sharing = [need for need in members if 0 < need.role.gpus < 1]
        gpus = math.ceil(sum(n.role.processes * n.role.gpus for n in sharing) - 1e-6)
        for group, has, kind, where in (
            (members, node_bytes if together else None, "host", "this machine has"),
            (sharing, gpu * gpus if gpu else None, "gpu", f"the {gpus} GPUs that they share have"),
        ):
            if has is not None and (sums := _sums(group, kind)) and sum(sums.values()) > has:
                each = ", ".join(f"{name} {size / GB:.1f} GB" for name, size in sums.items())
                problems.append(
                    f"stage {stage} needs {sum(sums.values()) / GB:.1f} GB ({each}), and {where} {has / GB:.1f} GB; "
                    "use fewer processes, a smaller model, or more machines or GPUs"
                )
    return problems


def _sums(found: Sequence[Need], kind: str) -> dict[str, float]:
    """Role -> bytes of all its processes, the largest first."""
    sums = {n.role.role: getattr(n, f"{kind}_bytes") for n in found}
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
