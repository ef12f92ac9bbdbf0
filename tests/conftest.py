"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test asks the hub, whose retries take many seconds where there is no network. Before anybody imports it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

#: What a command that starts a cluster of this machine alone sets for its process.
LOOPBACK_ONLY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def networks() -> Iterator[None]:
    """A command that a test called in this process leaves the networks to the tests that come after."""
    before = {name: os.environ[name] for name in LOOPBACK_ONLY if name in os.environ}
    yield
    for name in LOOPBACK_ONLY:
        os.environ.pop(name, None)
    os.environ |= before


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with ``data/`` (hh_small, gsm8k, ...) and ``models/`` (stories260k); skips where it is missing.

    The variable RLHF_DATA names its ``data`` folder; ``make test`` sets it where ``../shared/data`` exists.
    """
    if "RLHF_DATA" not in os.environ:
        pytest.skip("RLHF_DATA (a folder with hh_small, gsm8k and tinystories) is not set")
    data = Path(os.environ["RLHF_DATA"]).resolve()
    if not data.is_dir():
        pytest.skip(f"RLHF_DATA={data} is not a folder")
    return data.parent
