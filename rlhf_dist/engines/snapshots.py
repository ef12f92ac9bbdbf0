"""DeepSpeed's own checkpoint format, written while the next step runs: the step waits for a copy to memory only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from torch import Tensor


class SnapshotEngine(CheckpointEngine):
    """What DeepSpeed hands its files to: :meth:`save` copies one to memory, :meth:`write` writes them all.

    The memory of a snapshot is used again for the next one: touching fresh pages takes longer than the copy. So
    :meth:`write` must have returned before the next snapshot begins.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.name = "snapshot"
        self._files: dict[str, Any] = {}
        self._memory: list[Tensor] = []

    def begin(self) -> None:
        """The files of a new snapshot follow."""
        self._files = {}
        self._old, self._memory = iter(self._memory), []

    @property
    def files(self) -> list[str]:
        """Paths of the files of the newest snapshot."""
        return list(self._files)

    def save(self, state_dict: Any, path: str) -> None:
        self._files[path] = self._copy(state_dict)

    def write(self) -> None:
        """Write what was copied.

        Raises:
            OSError: it cannot be written; the disk is full, for example.
        """
        for path, state in self._files.items():
            # Into an open file: torch's own writer says "unexpected pos" of a full disk, Python says what it is.
            with open(path, "wb") as file:
                torch.save(state, file)

    def load(self, path: str, map_location: Any = None) -> Any:
        # DeepSpeed's files hold its own objects beside tensors. They are this program's, found under the run folder,
        # with the digests of the manifest.
        return torch.load(path, map_location=map_location, weights_only=False)

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing: folders are made by ``makedirs``."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing: a checkpoint is complete when its manifest is written."""
        return True

    def _copy(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._copy_tensor(tree)
        if isinstance(tree, dict):
            return {key: self._copy(value) for key, value in tree.items()}
        if type(tree) in (list, tuple):
            return type(tree)(self._copy(value) for value in tree)
        return tree

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        old: Tensor | None = next(self._old, None)
        fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
        copy = old if fits and old is not None else torch.empty(tensor.shape, dtype=tensor.dtype)
        self._memory.append(copy.copy_(tensor.detach()))
        return copy

    _old: Iterator[Tensor] = iter(())
