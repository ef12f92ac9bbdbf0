"""What every node tells about itself. Plain functions, called by a process on the node; none imports torch."""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import psutil
import ray

from rlhf_dist.artifacts import made_with
from rlhf_dist.observability import summary

#: Seconds to reach a port of another node.
CONNECT = 5.0
#: Seconds until all ranks must have met, and for the all-reduce after that.
MEETING = 60
_TORCH_CHILD = Path(__file__).with_name("torch_child.py")
#: Where ranks are about to meet: open from the moment its port is known, as that of a learner.
_meeting: list[socket.socket] = []


@dataclass(frozen=True)
class Machine:
    """Memory, disk and limits of a node, in bytes."""

    memory: int
    memory_available: int
    shm: int
    store: int
    """Object store."""
    store_folder: str
    temp: str
    """Ray's folder for logs, sockets and spilled objects."""
    temp_free: int
    temp_size: int
    open_files: int
    """Files that a process may have open."""
    ports: tuple[int, int]
    """From where to where the system chooses a port for whoever asks for any."""


def versions() -> dict[str, str]:
    """Of Python, the libraries and this package, whose source has a digest."""
    return summary.versions() | {"source of rlhf_dist": made_with()["rlhf_dist"][:12]}


def machine() -> Machine:
    """Of this node. Called by a Ray worker.

    Raises:
        KeyError: the process that started this one is no raylet as Ray 2.60 starts them.
    """
    # Ray starts its workers from the raylet, whose arguments are what was decided for the node.
    raylet = psutil.Process().parent()
    assert raylet is not None
    arguments = dict(argument.split("=", 1) for argument in raylet.cmdline() if "=" in argument)
    temp = shutil.disk_usage(arguments["--temp_dir"])
    total, available = _memory()
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return Machine(
        memory=total,
        memory_available=available,
        shm=shutil.disk_usage("/dev/shm").total,
        store=int(arguments["--object_store_memory"]),
        store_folder=arguments["--plasma_directory"],
        temp=arguments["--temp_dir"],
        temp_free=temp.free,
        temp_size=temp.total,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        ports=(int(low), int(high)),
    )


def _memory() -> tuple[int, int]:
    """Bytes in all and available, within the limit of the container if there is one."""
    system = psutil.virtual_memory()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return system.total, system.available
    return min(limit, system.total), min(limit - used, system.available)


def now() -> float:
    """Seconds since the epoch, by the clock of the node."""
    return time.time()


def free(folder: str) -> int:
    """Bytes that are free where ``folder`` is, or would be made."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def visit(folder: str, name: str, words: dict[str, str]) -> str:
    """Read in ``folder`` what the driver wrote to the file ``driver``, and write ``words[name]`` to the file ``name``.

    Returns:
        What is wrong, or nothing.
    """
    path = Path(folder)
    try:
        if (path / "driver").read_text() != words["driver"]:
            return "reads another content of a file than was written"
    except FileNotFoundError:
        return "does not see a file that was written there"
    except OSError as error:
        return f"cannot read there: {error}"
    try:
        (path / name).write_text(words[name])
    except OSError as error:
        return f"cannot write there: {error}"
    return ""


def file_system(url: str) -> str:
    """What is missing to read and write at ``url``, or nothing."""
    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
    except (ImportError, ValueError) as error:
        return str(error)
    return ""


def listen() -> tuple[str, int, str]:
    """Listen on a port as learners do, until this process ends; returns address, port and what it says to a caller."""
    address = ray.util.get_node_ip_address()
    server, word = socket.create_server((address, 0), backlog=128), secrets.token_hex(8)

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(word.encode())

    threading.Thread(target=serve, daemon=True).start()
    return address, server.getsockname()[1], word


def reach(targets: dict[str, tuple[str, int, str]]) -> dict[str, str]:
    """Connect to what other nodes have from :func:`listen`; returns why that failed, for those where it did."""

    def problem(target: tuple[str, int, str]) -> str:
        address, port, word = target
        try:
            with socket.create_connection((address, port), timeout=CONNECT) as connection:
                answer = connection.makefile("rb").read()
        except OSError as error:
            return f"{address}:{port}: {error}"
        return "" if answer.decode(errors="replace") == word else f"{address}:{port}: somebody else answers there"

    with ThreadPoolExecutor(16) as pool:
        problems = dict(zip(targets, pool.map(problem, targets.values()), strict=True))
    return {name: text for name, text in problems.items() if text}


def gpus() -> dict[str, Any]:
    """``devices`` with name, bytes and free bytes; ``driver``, ``cuda``, ``nccl``: versions, or None.

    Raises:
        RuntimeError: torch cannot look at them; the message is its own.
    """
    (found,) = _children([["gpus"]], MEETING)
    return found


def meet() -> tuple[str, int]:
    """Address and port where the ranks of :func:`all_reduce` meet, rank 0 being on this node."""
    address = ray.util.get_node_ip_address()
    _meeting.append(socket.create_server((address, 0)))
    return address, _meeting[0].getsockname()[1]


def all_reduce(ranks: Sequence[int], world: int, address: str, port: int) -> str:
    """Run so many ranks on this node, the first on the first GPU; returns the backend, with its version.

    Raises:
        RuntimeError: a rank failed; the message is its own.
    """
    listening = [str(s.fileno()) for s in _meeting]
    common = [str(world), address, str(port), str(MEETING)]
    calls = [
        ["all_reduce", str(rank), str(device), *common, *(listening if rank == 0 else [])]
        for device, rank in enumerate(ranks)
    ]
    return _children(calls, 2 * MEETING)[0]["backend"]


def _children(calls: list[list[str]], seconds: float) -> list[dict[str, Any]]:
    """Run ``torch_child.py`` side by side with each of these arguments; returns what each of them has printed."""
    # -P: its folder must not be searched for modules.
    children = [
        subprocess.Popen(
            [sys.executable, "-P", str(_TORCH_CHILD), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            pass_fds=[s.fileno() for s in _meeting],
        )
        for arguments in calls
    ]
    deadline = time.monotonic() + seconds
    results = []
    try:
        for child in children:
            try:
                out, err = child.communicate(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"no result within {seconds:g} s") from None
            if child.returncode:
                raise RuntimeError((err.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
            results.append(json.loads(out.splitlines()[-1]))
            if "error" in results[-1]:
                raise RuntimeError(results[-1]["error"])
    finally:
        for child in children:
            child.kill()
    return results
