"""One rank of a DeepSpeed group: forward, backward, step, snapshot, export.

The same engine trains every objective (SFT, reward model, policy, critic) and,
without an optimizer, serves frozen models that are too large for one device.

Gradients: the loss of a micro-batch is already divided by the *global* number
of tokens, so micro-batches and ranks add up. DeepSpeed averages over ranks;
:meth:`LearnerEngine.backward` multiplies that back.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_dist.adapters import LEFT, RIGHT, Content, grouped
from rlhf_dist.config import LearnerConfig, OptimConfig
from rlhf_dist.engines.snapshots import SnapshotEngine

T = TypeVar("T")

#: DeepSpeed's name of an operation that is not wanted; see :func:`init_distributed`.
SHM_OP = "deepspeed_shm_comm"
#: DeepSpeed's name ("tag") of the only state in a folder.
STATE = "state"


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite; raised on every rank, before the optimizer step changes anything."""


def init_distributed(rank: int, world: int, address: str, port: int, listening: int | None) -> dist.TCPStore | None:
    """Join the group; gloo on CPUs, nccl on GPUs.

    Args:
        listening: rank 0's file descriptor of a socket that listens on ``port`` already; None on the other ranks.

    Returns:
        Rank 0's store, where the ranks meet; it serves them for as long as it is kept.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=str(port))
    store = None
    if listening is not None:
        store = dist.TCPStore(address, port, world, is_master=True, wait_for_workers=False, master_listen_fd=listening)
    # As under torchrun: the store is there, and every rank, the first too, is its client.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    # On CPUs DeepSpeed 0.19.8 compiles a shared-memory all-reduce for inference at first use, which takes a minute and
    # which training never calls. This table is its own list of operations that can be built here.
    deepspeed.ops.__compatible_ops__[SHM_OP] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return store


def learning_rate(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up, then constant, linear or cosine decay."""
    warmup = math.ceil(cfg.warmup_ratio * total_steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape)


def ds_config(learner: LearnerConfig, optim: OptimConfig | None, dtype: str, universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed config of a group.

    Args:
        optim: None for frozen models (ZeRO-3 without an optimizer).
        universal: a checkpoint of another number of ranks is going to be loaded.
    """
    offload = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": learner.zero_stage, "overlap_comm": False}
    if learner.zero_stage == 3:
        # Models of a few hundred kB would otherwise never be partitioned.
        zero["stage3_param_persistence_threshold"] = 10_000
        if learner.offload_params:
            zero["offload_param"] = offload
    if learner.offload_optimizer:
        zero["offload_optimizer"] = offload
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # backward() accumulates, step() reduces and updates: micro-batches may differ in number from step to step.
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }
    if optim is not None:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["gradient_clipping"] = optim.max_grad_norm
        config["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                # DeepSpeed's own Adam kernels are compiled on first use; they pay off on GPUs only. Without "fused"
                # torch makes several copies of the flat parameters in each step.
                **({} if learner.gpus else {"torch_adam": True, "fused": True}),
            },
        }
    return config


class LearnerEngine:
    """A module under DeepSpeed. All methods are collective: every rank calls them in the same order."""

    def __init__(
        self,
        module: nn.Module,
        learner: LearnerConfig,
        optim: OptimConfig | None,
        dtype: str,
        total_steps: int = 1,
        universal: bool = False,
    ) -> None:
        self.optim = optim
        self.total_steps = total_steps
        self.steps = 0
        self.world = dist.get_world_size()
        self.rank = dist.get_rank()
        self.zero3 = learner.zero_stage == 3
        self.universal = universal
        config = ds_config(learner, optim, dtype, universal)
        parameters = [p for p in module.parameters() if p.requires_grad] if optim else None
        # Whatever the optimizer, DeepSpeed 0.19 declares Muon's kernels to torch.compile, which for its default backend
        # imports the whole of Inductor: two CPU seconds. A learner compiles nothing.
        torch.compiler.set_default_backend("eager")
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, config=config)
        self.device = self.engine.device
        self._frozen = any(not p.requires_grad for p in module.parameters())
        # DeepSpeed 0.19.8 has no public way to bring an engine of one's own; test_learners breaks when this changes.
        self._snapshots = self.engine.checkpoint_engine = SnapshotEngine()
        self._loss = torch.zeros((), device=self.device)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def train(self, on: bool = True) -> None:
        self.engine.train(on)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss``, a sum divided by the global count (see the module's docstring).

        A loss that is not finite is refused by :meth:`step`, not here: the other ranks wait in the collectives of this
        pass, and would wait for ever.
        """
        self._loss += loss.detach()
        self.engine.backward(loss * self.world)

    def step(self) -> dict[str, float]:
        """Reduce, clip, update. Returns ``lr`` and ``grad_norm`` (global, before clipping).

        Raises:
            NonFiniteError: on every rank: the sum of the losses, or the gradient, is not finite. Nothing was changed.
        """
        assert self.optim is not None
        loss = self._global_loss()
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss is {loss} in optimizer step {self.steps + 1}")
        lr = learning_rate(self.steps, self.total_steps, self.optim)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        norm = float(norm) if norm is not None else float("nan")
        if not math.isfinite(norm) or norm < 0:  # DeepSpeed skips such a step and goes on
            raise NonFiniteError(f"gradient norm is {norm} in optimizer step {self.steps + 1}")
        self.steps += 1
        return {"lr": lr, "grad_norm": norm}

    def _global_loss(self) -> float:
        """Sum of the losses since the last step, over all ranks: one number, so all ranks come to one conclusion."""
        dist.all_reduce(self._loss)
        loss = self._loss.item()
        self._loss.zero_()
        return loss

    @contextmanager
    def gradient_norms(self) -> Iterator[Callable[[], float]]:
        """Inside, the function that is yielded says how large the gradient of the last :meth:`backward` was.

        That of this rank alone, before DeepSpeed reduces it; :meth:`step` would count all of them.
        """
        norms: list[Tensor] = []
        hooks = [
            p.register_hook(lambda g: norms.append(torch.linalg.vector_norm(g, dtype=torch.float32)))
            for p in self.module.parameters()
            if p.requires_grad
        ]

        def last() -> float:
            norm = torch.linalg.vector_norm(torch.stack(norms)).item() / self.world
            norms.clear()
            return norm

        try:
            yield last
        finally:
            for hook in hooks:
                hook.remove()

    def gather(self, item: T) -> list[T]:
        """``item`` of every rank."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def named_weights(self, group_bytes: int, content: Content = "merged") -> Iterator[list[tuple[str, Tensor]]]:
        """Full weights under *checkpoint* names, in groups of about ``group_bytes``.

        Under ZeRO-3 a group is gathered on all ranks at once and freed before
        the next, so memory is bounded and the number of collectives small. The
        tensors are valid until the next group is asked for. transformers 5
        fuses some modules (experts, for instance); the reverse conversion turns
        them back into what checkpoints and vLLM's loaders call them.

        Args:
            content: with adapters merged in; or only what never changes; or only what changes, adapters as their
                factors.
        """
        model: PreTrainedModel = self.module.model  # type: ignore[assignment]
        for group in grouped(model, group_bytes, content):
            parameters = [p for weight in group for p in weight.parts(content)]
            with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters, enabled=self.zero3):
                named = {name: t for weight in group for name, t in weight.tensors(content).items()}
                factors = {name: t for name, t in named.items() if name.endswith((LEFT, RIGHT))}
                whole = {name: t for name, t in named.items() if name not in factors}
                yield [*revert_weight_conversion(model, whole).items(), *factors.items()]

    def snapshot(self, folder: Path) -> tuple[Callable[[], None], list[str]]:
        """Copy all that the following steps depend on; returns what writes the copy, in any thread, and its files.

        DeepSpeed's sharded format; each rank has files of its own, and its random state beside them. Frozen weights
        are left out: they are those of the model that training began with.
        """
        self._snapshots.begin()
        about = {"optimizer_steps": self.steps}
        self.engine.save_checkpoint(
            str(folder), STATE, client_state=about, save_latest=False, exclude_frozen_parameters=self._frozen
        )
        self._snapshots.save(self._random_state(), str(folder / f"random_{self.rank}.pt"))
        return self._snapshots.write, self._snapshots.files

    def load(self, folder: Path) -> None:
        """Go on from a snapshot, of the same number of ranks or, with ``universal``, from one that was converted.

        Raises:
            RuntimeError: there is none.
        """
        found, about = self.engine.load_checkpoint(str(folder), STATE, load_module_strict=not self._frozen)
        if found is None:
            raise RuntimeError(f"{folder} holds no checkpoint of DeepSpeed for rank {self.rank} of {self.world}")
        self.steps = about["optimizer_steps"]
        random = folder / f"random_{self.rank}.pt"
        if random.exists() and not self.universal:
            state = torch.load(random, weights_only=True)
            torch.set_rng_state(state["cpu"])
            if "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"])

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state

    def export(self, folder: Path, shard_bytes: int) -> Callable[[], None]:
        """Copy the model; returns what writes it in Hugging Face's format (safetensors, checkpoint names).

        Rank 0 has and writes the copy; with the other ranks this gathers.
        """
        state: dict[str, Tensor] = {}
        for group in self.named_weights(shard_bytes):
            if self.rank == 0:
                state.update({name: t.to("cpu", copy=True).contiguous() for name, t in group})
        return lambda: _save_pretrained(self.module.model, state, folder) if self.rank == 0 else None  # type: ignore[arg-type]


def convert(folder: Path, into: Path) -> None:
    """Make of a snapshot one that any number of ranks can load (DeepSpeed's "universal checkpoint"); one process calls.

    In a process of its own: DeepSpeed's converter is a program.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / STATE), "--output_folder", str(into / STATE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"DeepSpeed cannot convert {folder}: {done.stderr.strip().splitlines()[-1:]}")


def _save_pretrained(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    limit, size = 4 << 30, 0
    part: dict[str, Tensor] = {}
    parts: list[dict[str, Tensor]] = []
    for name, tensor in state.items():
        if part and size + tensor.nbytes > limit:
            parts.append(part)
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    parts.append(part)
    if len(parts) == 1:
        save_file(parts[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for i, tensors in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    total = sum(t.nbytes for t in state.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)
