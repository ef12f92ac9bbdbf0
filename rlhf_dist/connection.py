"""The one way to a Ray cluster: join the one that is there, else start one on this machine."""

from __future__ import annotations

import os
import re
import socket
from typing import Any

import ray

from rlhf_dist.config import Config

#: Seconds in which the head of a cluster takes a connection.
REACH = 10.0


def address_of(cfg: Config) -> str | None:
    """The cluster to join: ``cluster.address``, else that of the Ray job or of RAY_ADDRESS; None: a local one."""
    return cfg.cluster.address or os.environ.get("RAY_ADDRESS")


def connect(cfg: Config) -> None:
    """Join the cluster at :func:`address_of`, else start a local one, which ends with ``ray.shutdown``.

    ``ray.init`` puts its own handler of SIGTERM in the place of the one that is there.

    Raises:
        ConnectionError: nobody takes a connection at the address within ``REACH`` seconds.
    """
    address = address_of(cfg)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # ray.init asks for minutes on end where nobody answers. Other forms of address (auto, ray://...) are left to it.
    if address and (found := re.fullmatch(r"(?P<host>[^/]+):(?P<port>\d+)", address)):
        try:
            socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=REACH).close()
        except OSError as error:
            raise ConnectionError(f"nobody answers at {address}, the address of the Ray cluster: {error}") from None
    options: dict[str, Any] = {"address": address, "logging_level": "error", "log_to_driver": False}
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        memory = cfg.cluster.object_store_mb
        options |= {
            "address": "local",
            "num_cpus": cfg.cluster.local_cpus,
            "object_store_memory": memory * 2**20 if memory else None,
            "include_dashboard": False,
        }
    ray.init(**options)
