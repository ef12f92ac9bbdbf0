"""Our transport for vLLM's native weight-transfer API: flat, verified shards from Ray's object store.

Registered in vLLM's factory as ``object_store`` by the ``vllm.general_plugins``
entry point of this package, so that vLLM's worker processes (tensor
parallelism) know it too. There is no collective: a generator pulls the shards
of the newest version whenever it is ready.

The worker checks, before and after loading: version and digest of every shard,
that the checkpoint names are exactly those of the first sync, and that the
loader filled every parameter of the model.

vLLM's own ``nccl`` and ``ipc`` engines take their weights from
:func:`weight_source`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_dist.engines.shards import Shard, WeightSyncError

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
        self._names: frozenset[str] | None = None

    def start_weight_update(self) -> None:
        # Before the reload moves parameters to the meta device. A bare load_weights after the first load is the known
        # cause of silently wrong weights: processed layers have other shapes and no weight_loader.
        self._parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class ends with torch.accelerator.synchronize(), which raises where there is no accelerator.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Verify, then load. Raises WeightSyncError that names version and tensor."""
        shards = [s if isinstance(s, Shard) else self._attach(*s) for s in update_info.shards]
        for shard in shards:
            shard.verify(update_info.version)
        names = [name for shard in shards for name in shard.names]
        self._check_names(names, update_info.version)
        loaded = self.model.load_weights((name, t.to(self.device)) for s in shards for name, t in s.tensors())
        self._check_loaded(loaded, update_info.version)
        # Layerwise reload keeps references until a layer is complete: the buffers must outlive finish_weight_update.
        self._shards = shards

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)
        self._shards = []

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    def _attach(self, path: str, fields: dict[str, Any]) -> Shard:
        return Shard(**fields, data=np.memmap(path, np.uint8, mode="r"))

    def _check_names(self, names: list[str], version: int) -> None:
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise WeightSyncError(f"version {version}: tensor {twice} was sent twice")
        if self._names is None:
            self._names = frozenset(names)
        elif self._names != set(names):
            odd = sorted(self._names ^ set(names))[0]
            state = "is missing" if odd in self._names else "was never sent before"
            raise WeightSyncError(f"version {version}: tensor {odd} {state}")

    def _check_loaded(self, loaded: set[str] | None, version: int) -> None:
        """Models return the parameters that they filled, in vLLM's (fused) names. Tied heads are not filled."""
        if loaded is None:
            return
        left_out = {n for n in self._parameters - set(loaded) if not n.endswith("lm_head.weight")}
        if left_out:
            raise WeightSyncError(f"version {version}: the loader did not fill {sorted(left_out)[0]}")


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
            module.quant_method.process_weights_after_loading(module)
        seen.add(weight.data_ptr())


class StagedShards:
    """Shards as files in shared memory, for vLLM workers that are no Ray workers (tensor parallelism).

    Plain mapped files: ``multiprocessing.shared_memory`` would let every worker's tracker unlink what it does not own.
    """

    def __init__(self, shards: list[Shard]) -> None:
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.folder = tempfile.TemporaryDirectory(prefix="rlhf_dist_sync_", dir=memory)
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
        if (
            self._metadata is None
        ):  # names and full shapes are known after the conversion only, so the first call gathers
            self._metadata = [ParamMeta(n, self._dtype, tuple(t.shape)) for g in self._groups() for n, t in g]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in self._groups():
            for name, tensor in group:
                yield name, tensor.to(self._dtype)
