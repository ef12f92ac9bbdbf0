"""The part of the probes that needs torch, as a program: what it takes of a GPU goes with it.

    torch_child.py gpus
    torch_child.py all_reduce RANK DEVICE WORLD ADDRESS PORT SECONDS [FILE_DESCRIPTOR]

Prints one line of JSON. Imports nothing of this package, so that it runs by its path alone.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def gpus() -> dict[str, Any]:
    devices = []
    for i in range(torch.cuda.device_count()):
        unused, size = torch.cuda.mem_get_info(i)
        devices.append({"name": torch.cuda.get_device_name(i), "bytes": size, "free": unused})
    return {"devices": devices, "driver": _driver(), "cuda": torch.version.cuda, "nccl": _nccl()}


def all_reduce(
    rank: int, device: int, world: int, address: str, port: int, seconds: int, listening: int | None = None
) -> dict[str, Any]:
    """Sum 4 MB over all ranks, which meet and connect as those of a learner do.

    Args:
        listening: rank 0's file descriptor of a socket that listens on ``port``.
    """
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(
        address, port, world, is_master=rank == 0, wait_for_workers=False, master_listen_fd=listening, timeout=limit
    )
    cuda = torch.cuda.is_available()
    where = torch.device("cuda", device) if cuda else torch.device("cpu")
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    tensor = torch.full((2**20,), rank + 1.0, device=where)
    dist.all_reduce(tensor)
    expected = world * (world + 1) / 2
    if not bool((tensor == expected).all()):
        raise ValueError(f"rank {rank}: the sum of 1 to {world} is {expected:g}, got {tensor.min():g}")
    # Rank 0 serves the store: it ends last.
    store.set(f"done {rank}", "")
    if rank == 0:
        store.wait([f"done {other}" for other in range(world)], limit)
    return {"backend": f"NCCL {_nccl()}" if cuda else "gloo"}


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", file.read_text()) if file.exists() else None
    return found[1] if found else None


def _nccl() -> str | None:
    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def main(what: str, *numbers: str) -> dict[str, Any]:
    """What is to be printed; ``error`` if that failed."""
    try:
        if what == "gpus":
            return gpus()
        rank, device, world, address, port, *rest = numbers
        return all_reduce(int(rank), int(device), int(world), address, int(port), *map(int, rest))
    except (RuntimeError, ValueError, OSError) as error:  # those of torch.distributed are RuntimeErrors
        return {"error": f"{error}".partition("\n")[0]}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
