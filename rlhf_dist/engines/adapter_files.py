"""Adapters as vLLM reads them: peft's folder, in shared memory, made from verified shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rlhf_dist.adapters import LEFT, RIGHT
from rlhf_dist.config import LoRAConfig
from rlhf_dist.engines.shards import Shard, Tensors, WeightSyncError, shared_folder, verify_all


class AdapterFiles:
    """One folder, written anew for each version.

    In shared memory, since the workers of tensor parallelism read it too.
    """

    def __init__(self, cfg: LoRAConfig) -> None:
        self._folder = shared_folder("rlhf_dist_lora_")
        self._tensors: Tensors = {}
        self.path = self._folder.name
        # The scale is in the factors already, so alpha / r must be 1.
        config = {"peft_type": "LORA", "r": cfg.rank, "lora_alpha": cfg.rank, "target_modules": cfg.target_modules}
        (Path(self.path) / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))

    def write(self, version: int, shards: list[Shard]) -> int:
        """Verify and write; returns the number of bytes.

        Raises:
            WeightSyncError: names version and tensor.
        """
        tensors = verify_all(shards, version, self._tensors)
        factors: dict[str, Any] = {}
        for shard in shards:
            for name, tensor in shard.tensors():
                for end, factor in ((LEFT, "lora_B"), (RIGHT, "lora_A")):
                    if name.endswith(end):
                        layer = name.removesuffix(end).removesuffix(".weight")
                        factors[f"base_model.model.{layer}.{factor}.weight"] = tensor
        if len(factors) != len(tensors):
            raise WeightSyncError(f"version {version}: {len(tensors) - len(factors)} tensors are not of an adapter")
        save_file(factors, Path(self.path) / "adapter_model.safetensors")
        self._tensors = tensors
        return sum(t.nbytes for t in factors.values())
