"""The one way to a Ray cluster: join the one that is there, else start one on this machine."""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import Any

import ray

from rlhf_dist.config import ClusterConfig

#: Seconds in which the head of a cluster takes a connection.
REACH = 10.0


def connect(cluster: ClusterConfig) -> None:
    """Join the cluster that ``cluster`` names, else start a local one, which ends with ``ray.shutdown``.

    ``ray.init`` puts its own handler of SIGTERM in the place of the one that is there.

    Raises:
        ConnectionError: nobody takes a connection at the address within ``REACH`` seconds.
    """
    if not cluster.joined:
        start_local(cluster.local_cpus, cluster.object_store_mb)
        return
    address = cluster.joined
    # ray.init asks for minutes on end where nobody answers. Other forms of address (auto, ray://...) are left to it.
    if found := re.fullmatch(r"(?P<host>[^/]+):(?P<port>\d+)", address):
        try:
            socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=REACH).close()
        except OSError as error:
            raise ConnectionError(f"nobody answers at {address}, the address of the Ray cluster: {error}") from None
    _init(address=address)


def start_local(cpus: int | None, object_store_mb: int | None) -> None:
    """A cluster of this machine alone; None: Ray's default."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    memory = object_store_mb * 2**20 if object_store_mb else None
    _init(address="local", num_cpus=cpus, object_store_memory=memory, include_dashboard=False)


def _init(**options: Any) -> None:
    # What Ray announces for later versions, with a warning: processes that ask for no GPU keep the variables they have.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
