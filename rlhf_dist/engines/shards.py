"""Weights as flat, versioned, self-checking shards.

A shard is one contiguous byte buffer with the tensors of a group, and a header
that names them. Ray passes the buffer out of band, so a generator on the same
node reads the learner's bytes in place. The digest covers header and bytes: a
flipped byte, a swapped name or a shard of another version is found before
anything is loaded.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128

#: Version of what never changes, which is sent once: frozen weights beside adapters.
FROZEN = -1
_ALIGN = 64  # bytes; torch reads any dtype from an aligned offset


class WeightSyncError(RuntimeError):
    """A sync that cannot be trusted; the message names version and tensor."""


@dataclass(frozen=True)
class Shard:
    """Tensors of one group of parameters at one policy version."""

    version: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    data: np.ndarray
    """uint8, contiguous."""
    digest: bytes

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def header(self) -> bytes:
        return json.dumps([self.version, self.names, self.dtypes, self.shapes, self.offsets]).encode()

    def verify(self, version: int) -> None:
        """Raises:
        WeightSyncError: another version, or a digest that does not match.
        """
        names = f"with {len(self.names)} tensors from {self.names[0]} to {self.names[-1]}" if self.names else "(empty)"
        if self.version not in (version, FROZEN):
            raise WeightSyncError(f"shard {names} is of version {self.version}, expected version {version}")
        if _digest(self.header(), self.data) != self.digest:
            raise WeightSyncError(f"shard of version {version} {names}: the bytes do not match their digest")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``(checkpoint name, tensor)``; views of the buffer, read-only by convention."""
        buffer = torch.from_numpy(self.data)
        for name, dtype, shape, offset in zip(self.names, self.dtypes, self.shapes, self.offsets, strict=True):
            yield name, _view(buffer, offset, getattr(torch, dtype), shape)


def pack(
    version: int,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    into: np.ndarray | None = None,
) -> Shard:
    """Copy ``tensors`` into one buffer (the only copy between learner and generator) and seal it.

    Args:
        dtype: of the floating-point tensors in the buffer; None: as they are.
        into: the data of an earlier shard that nobody reads any more, which is overwritten if it has the right size.
            Fresh memory costs more than the copy.
    """
    items = [(name, t.detach()) for name, t in tensors]
    dtypes = [dtype if dtype is not None and t.is_floating_point() else t.dtype for _, t in items]
    offsets, size = [], 0
    for (_, t), kind in zip(items, dtypes, strict=True):
        offsets.append(size)
        size += -(-t.numel() * kind.itemsize // _ALIGN) * _ALIGN
    data = into if into is not None and into.size == size else np.zeros(size, np.uint8)
    buffer = torch.from_numpy(data)
    for (_, t), kind, offset in zip(items, dtypes, offsets, strict=True):
        _view(buffer, offset, kind, t.shape).copy_(t)
    shard = Shard(
        version,
        tuple(name for name, _ in items),
        tuple(str(kind).removeprefix("torch.") for kind in dtypes),
        tuple(tuple(t.shape) for _, t in items),
        tuple(offsets),
        data,
        b"",
    )
    return Shard(**{**shard.__dict__, "digest": _digest(shard.header(), data)})


#: ``name -> (dtype, shape)``
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def verify_all(shards: Sequence[Shard], version: int, first: Tensors) -> Tensors:
    """What the shards hold, once each of them is right, and all together are what the first sync brought.

    Args:
        first: of the first sync; empty: this is the first.

    Raises:
        WeightSyncError: names version and tensor.
    """
    for shard in shards:
        shard.verify(version)
    tensors: Tensors = {}
    for shard in shards:
        for name, dtype, shape in zip(shard.names, shard.dtypes, shard.shapes, strict=True):
            if name in tensors:
                raise WeightSyncError(f"version {version}: tensor {name} was sent twice")
            tensors[name] = (dtype, tuple(shape))
    first = first or tensors
    if odd := sorted(first.keys() ^ tensors.keys()):
        state = "is missing" if odd[0] in first else "was never sent before"
        raise WeightSyncError(f"version {version}: tensor {odd[0]} {state}")
    for name, found in tensors.items():
        if found != first[name]:
            raise WeightSyncError(f"version {version}: tensor {name} is {found}, in the first sync {first[name]}")
    return tensors


def shared_folder(prefix: str) -> tempfile.TemporaryDirectory:
    """A folder in shared memory, where there is one: for vLLM's worker processes, which are no Ray workers."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    return tempfile.TemporaryDirectory(prefix=prefix, dir=memory)


def _digest(header: bytes, data: np.ndarray) -> bytes:
    # Against accidents, not attackers: at the speed of memory, where a cryptographic hash takes twice as long.
    digest = xxh3_128(header)
    digest.update(data.data)
    return digest.digest()


def _view(buffer: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if size == 0:  # an empty slice has no stride to reinterpret
        return torch.empty(shape, dtype=dtype)
    return buffer[offset : offset + size].view(dtype).view(shape)
