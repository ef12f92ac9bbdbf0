"""Our transport for vLLM's native weight-transfer API: flat, verified shards from Ray's object store.

Registered in vLLM's factory as ``object_store`` by the ``vllm.general_plugins``
entry point of this package, so that vLLM's worker processes (tensor
parallelism) know it too. There is no collective: a generator pulls the shards
of the newest version whenever it is ready.

The worker checks, before and after loading: version and digest of every shard,
that names, types and shapes are exactly those of the first sync, and that the
loader filled every parameter of the model. What is refused before loading
leaves the old weights as they were.

vLLM's own ``nccl`` and ``ipc`` engines take their weights from
:func:`weight_source`; :func:`open_trainer` opens the learner's side of them.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlhf_dist.adapters import merged
from rlhf_dist.engines.shards import FROZEN, Shard, Tensors, WeightSyncError, shared_folder, verify_all

BACKEND = "object_store"


def register() -> None:
    """Entry point ``vllm.general_plugins``; vLLM may call it several times in one process."""
    if BACKEND not in WeightTransferEngineFactory._registry:  # no public way to ask; vLLM 0.32
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreWeightTransferEngine)


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: no collective, no address."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One version of the weights: shards as they are (engine in this process), or staged in shared memory."""

    version: int
    shards: list[Any] = field(default_factory=list)
    """:class:`Shard`, or ``(path, header fields)`` from :class:`StagedShards`."""


class ObjectStoreWeightTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """Loads verified shards through the model's own ``load_weights`` under vLLM's layerwise reload."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        self._tensors: Tensors = {}
        self._shards: list[Shard] = []
        self._received = False

    def start_weight_update(self) -> None:
        """Nothing yet: the reload begins when the shards have been verified, so a refused one changes no weight."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class ends with torch.accelerator.synchronize(), which raises where there is no accelerator.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Verify, then load. Raises WeightSyncError that names version and tensor."""
        version = update_info.version
        shards = [s if isinstance(s, Shard) else self._attach(*s) for s in update_info.shards]
        tensors = verify_all(shards, version, self._tensors)
        # Taken before the reload moves parameters to the meta device. A parameter may have several names: tied
        # heads, and the router's gate of some mixtures of experts.
        names: dict[int, set[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), set()).add(name)
        _forget_packed_experts(self.model)
        # A bare load_weights after the first load is the known cause of silently wrong weights: processed layers have
        # other shapes and no weight_loader.
        initialize_layerwise_reload(self.model)
        try:
            self._load(shards, names.values(), version)
        except BaseException:
            self._undo()
            raise
        self._tensors = tensors
        self._received = True
        # Layerwise reload keeps references until a layer is complete: the buffers must outlive finish_weight_update.
        self._shards = shards

    def finish_weight_update(self) -> None:
        received, self._received = self._received, not self._received
        if not received:  # the next call closes the update
            raise WeightSyncError("a weight update was finished, but no weights had come")
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)
        self._shards = []

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    def _attach(self, path: str, fields: dict[str, Any]) -> Shard:
        # Copy on write: torch knows no read-only tensors, and nobody writes.
        return Shard(**fields, data=np.memmap(path, np.uint8, mode="c"))

    def _load(self, shards: list[Shard], parameters: Iterable[set[str]], version: int) -> None:
        """Hand the tensors to the model's loader.

        Args:
            parameters: the names of each parameter of the model, in vLLM's (fused) names.
        """
        current = ""

        def tensors() -> Iterator[tuple[str, Tensor]]:
            nonlocal current
            for current, tensor in merged(lambda: (pair for shard in shards for pair in shard.tensors())):
                yield current, tensor.to(self.device)

        try:
            model: Any = self.model  # every model of vLLM has load_weights; nn.Module does not say so
            loaded = model.load_weights(tensors())
        except Exception as error:
            raise WeightSyncError(f"version {version}: vLLM does not load tensor {current}: {error}") from error
        if loaded is None:  # a model that does not say what it filled: the canary alone must tell
            return
        unfilled = self._unfilled()
        left_out = [min(names) for names in parameters if names.isdisjoint(loaded) or names <= unfilled]
        if left_out:
            raise WeightSyncError(f"version {version}: the loader did not fill {min(left_out)}")

    def _unfilled(self) -> set[str]:
        """Parameters of which not one element was copied, whatever the loader says.

        A step of a tiny learning rate is below what the canary can see, so a load that was skipped must show here.
        """
        return {
            f"{prefix}.{name}"
            for prefix, module in self.model.named_modules()
            if (info := get_layerwise_info(module)).can_load() and not info.load_numel
            for name, _ in module.named_parameters(recurse=False)
        }

    def _undo(self) -> None:
        """Leave a reload that failed half-way: layers that are not complete get their old tensors back.

        The weights are then of two versions; the engine serves nothing before a complete update. Without this the
        next update would go on where this one broke off (vLLM 0.32 resumes layers that have begun).
        """
        for module in self.model.modules():
            info = get_layerwise_info(module)
            info.load_numel = 0
            info.loaded_weights.clear()
        finalize_layerwise_reload(self.model, self.model_config)


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """Have experts packed anew by the reload; vLLM 0.32 packs them for CPUs at the first load only.

    With a kernel from the first load, ``UnquantizedFusedMoEMethod`` takes the new weights for packed ones, and every
    expert computes nonsense. On GPUs the kernel stays: CUDA graphs have captured it, and nothing is packed.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, FusedMoEMethodBase) and next(module.parameters()).device.type == "cpu":
            method.moe_kernel = None


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Process tied output heads again, which the layerwise reload of vLLM 0.32 leaves out.

    A tied head gets no weights of its own, so it counts as not loaded, and on
    CPUs its packed copy of the embedding stays that of the old version. The
    test of the sync for tied embeddings fails without this.
    """
    seen: set[int] = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.numel() == 0:
            continue
        if weight.data_ptr() in seen and hasattr(module, "quant_method"):
            method: Any = module.quant_method
            method.process_weights_after_loading(module)
        seen.add(weight.data_ptr())


class StagedShards:
    """Shards as files in shared memory, for vLLM workers that are no Ray workers (tensor parallelism).

    Plain mapped files: ``multiprocessing.shared_memory`` would let every worker's tracker unlink what it does not own.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.folder = shared_folder("rlhf_dist_sync_")
        self.info: list[tuple[str, dict[str, Any]]] = []
        for i, shard in enumerate(shards):
            path = os.path.join(self.folder.name, str(i))
            shard.data.tofile(path)
            self.info.append((path, {k: v for k, v in shard.__dict__.items() if k != "data"}))

    def release(self) -> None:
        self.folder.cleanup()


def weight_source(groups: Callable[[], Iterator[list[tuple[str, Tensor]]]], wire_dtype: torch.dtype) -> WeightSource:
    """A ``WeightSource`` over DeepSpeed parameters, for vLLM's own trainer engines (``nccl``, ``ipc``).

    Args:
        groups: ``LearnerEngine.named_weights`` with its group size bound; gathers ZeRO-3 parameters, so all
            ranks iterate together.
    """
    return _DeepSpeedSource(groups, wire_dtype)


class _DeepSpeedSource(WeightSource):
    def __init__(self, groups: Callable[[], Iterator[list[tuple[str, Tensor]]]], wire_dtype: torch.dtype) -> None:
        self._groups = groups
        self._dtype = wire_dtype
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        # Names and full shapes are known after the conversion only, so the first call gathers.
        if self._metadata is None:
            self._metadata = [ParamMeta(n, self._dtype, tuple(t.shape)) for g in self._groups() for n, t in g]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # vLLM packs on streams of its own, which do not wait for the optimizer step that is still running.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for group in self._groups():
            for name, tensor in group:
                # A copy: vLLM collects tensors of several groups, and a gathered group is freed with the next.
                yield name, tensor.to(self._dtype, copy=True)


def open_trainer(
    transport: str,
    source: WeightSource,
    client: VLLMWeightSyncClient,
    *,
    rank: int,
    host: str,
    world_size: int,
    buffer_bytes: int,
) -> TrainerWeightTransferEngine:
    """The learner's side of vLLM's own ``nccl`` or ``ipc`` transport; all ranks of the learner call it.

    Args:
        client: drives the generators; used by rank 0.
        rank: of the learner; rank 0 sends.
        host: address of this rank, on which rank 0 meets the generators.
        world_size: 1 (the sender) and the tensor-parallel workers of all generators.
        buffer_bytes: tensors travel packed in buffers of this size, or of the largest tensor's.
    """
    largest = max(math.prod(m.shape) * m.dtype.itemsize for m in source.metadata())
    info = trainer_init_info(transport, rank, host, world_size, max(buffer_bytes, largest))
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def trainer_init_info(transport: str, rank: int, host: str, world_size: int, buffer_bytes: int) -> TrainerInitInfo:
    """What vLLM's trainer engines want to know, by transport."""
    if transport == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.create_server((host, 0)) as free:  # vLLM listens there itself, so the port must be closed again
            port = free.getsockname()[1]
        return NCCLTrainerInitInfo(
            rank=rank,
            master_address=host,
            master_port=port,
            world_size=world_size,
            packed=True,
            packed_buffer_size_bytes=buffer_bytes,
        )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    # Packed: unpacked, all tensors would have to stay alive at once, which ZeRO-3 does not allow.
    return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer_bytes)


def payload_size(update_info: dict[str, Any]) -> tuple[int, int]:
    """``(bytes, tensors)`` of one payload of any transport, without what was sent once and never changes."""
    if "shards" in update_info:
        headers = [s.__dict__ if isinstance(s, Shard) else s[1] for s in update_info["shards"]]
        headers = [h for h in headers if h["version"] != FROZEN]
    else:
        headers = [{"dtypes": update_info["dtype_names"], "shapes": update_info["shapes"]}]
    sizes = [
        math.prod(shape) * getattr(torch, dtype).itemsize
        for h in headers
        for dtype, shape in zip(h["dtypes"], h["shapes"], strict=True)
    ]
    return sum(sizes), len(sizes)
