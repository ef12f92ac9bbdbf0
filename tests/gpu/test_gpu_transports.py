"""vLLM's own transports on real GPUs: a learner trains a tiny Llama, and every version passes the gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sync_flow import sync_versions

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()


@pytest.fixture(scope="module", autouse=True)
def gpu_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if GPUS == 0:
        pytest.skip("no GPU")
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", num_cpus=8, num_gpus=GPUS, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def check(records: list[list[dict[str, Any]]]) -> None:
    assert [{r["version"] for r in of_version} for of_version in records] == [{0}, {1}, {2}]
    # The gate has compared them already, with the tolerance of bfloat16.
    assert all(r["tells_apart"] for of_version in records[1:] for r in of_version)
    assert len({(r["nbytes"], r["tensors"]) for of_version in records for r in of_version}) == 1


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_ipc_between_two_processes_on_one_gpu(tmp_path: Path, zero_stage: int) -> None:
    check(sync_versions(tmp_path, "ipc", dtype="bfloat16", gpus=0.4, zero_stage=zero_stage))


def test_object_store_into_a_gpu(tmp_path: Path) -> None:
    check(sync_versions(tmp_path, "object_store", dtype="bfloat16", gpus=0.4))


@pytest.mark.skipif(GPUS < 2, reason="NCCL takes one process per GPU")
def test_nccl_to_another_gpu(tmp_path: Path) -> None:
    check(sync_versions(tmp_path, "nccl", dtype="bfloat16", gpus=1))


@pytest.mark.skipif(GPUS < 4, reason="two ranks and two generators")
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_nccl_from_two_ranks_to_two_generators(tmp_path: Path, zero_stage: int) -> None:
    check(sync_versions(tmp_path, "nccl", dtype="bfloat16", gpus=1, ranks=2, zero_stage=zero_stage, generators=2))


@pytest.mark.skipif(GPUS < 3, reason="one rank and two tensor-parallel workers")
def test_nccl_to_tensor_parallel_workers(tmp_path: Path) -> None:
    check(sync_versions(tmp_path, "nccl", dtype="bfloat16", gpus=1, workers=2))
