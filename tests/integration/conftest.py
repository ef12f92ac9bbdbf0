"""A local Ray cluster for the tests of one session, and an environment that leaves the user's home alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray writes a token to ``~/.ray``: for these tests ``~`` is a folder of ours."""
    home = tmp_path_factory.mktemp("home")
    # What DeepSpeed and vLLM compile on first use is kept: it takes the better part of a minute.
    cache = Path.home() / ".cache"
    cache.mkdir(exist_ok=True)
    (home / ".cache").symlink_to(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        # The tests bring their own thread counts; what the shell says must not win over them.
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield home


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray in this process. Four CPUs, whatever the machine has: Ray starts a process for each of them."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
    )
    yield
    ray.shutdown()
