"""The control flow of the transports without a GPU: who is called, in which order, with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from sync_flow import config, generator_group, sync_versions
from sync_models import CANARY, build, logprobs, named_weights, perturb
from tiny import experience

from rlhf_dist.actors.transport import TRANSPORTS, GeneratorClient, PulledWeights, PushedWeights
from rlhf_dist.actors.waiting import WorkerFailed, wait_for

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def recorders() -> list[Any]:
    """Generators that only write down what they are told."""

    @ray.remote(num_cpus=0)
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[tuple[str, Any]] = []

        def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
            self.calls.append(("init", info))

        def start_weight_update(self) -> None:
            self.calls.append(("start", None))

        def update_weights(self, info: dict[str, Any]) -> None:
            self.calls.append(("update", info))

        def finish_weight_update(self, version: int) -> None:
            self.calls.append(("finish", version))

        def log(self) -> list[tuple[str, Any]]:
            return self.calls

    return [Recorder.remote() for _ in range(3)]


def test_the_client_is_one_for_vllm_and_gives_every_worker_a_rank_of_its_own(recorders: list[Any]) -> None:
    """With the payloads of vLLM's own trainer, read by vLLM's own worker."""
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload

    client = GeneratorClient(recorders, workers=2)
    assert isinstance(client, VLLMWeightSyncClient)
    assert client.world_size == 7
    info = NCCLWeightTransferInitInfo(master_address="h", master_port=5, rank_offset=1, world_size=client.world_size)
    client.init_weight_transfer_engine(worker_init_payload(info))
    client.version = 4
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    logs = ray.get([r.log.remote() for r in recorders])
    parsed = [NCCLWeightTransferInitInfo(**log[0][1]) for log in logs]
    # Worker j of a generator gets rank_offset + j (vLLM's worker_init_process_group).
    assert [p.rank_offset + j for p in parsed for j in range(2)] == [1, 2, 3, 4, 5, 6]
    assert {(p.master_address, p.master_port, p.world_size) for p in parsed} == {("h", 5, 7)}
    for log in logs:
        assert log[1:] == [("start", None), ("update", {"names": ["a"]}), ("finish", 4)]
    ipc = GeneratorClient(recorders[:1], workers=1)
    ipc.init_weight_transfer_engine({"packed": True})
    assert ray.get(recorders[0].log.remote())[-1] == ("init", {"packed": True})


def test_what_vllm_wants_to_know_is_what_we_tell_it() -> None:
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from rlhf_dist.engines.weight_sync import trainer_init_info

    nccl: Any = trainer_init_info("nccl", 1, "127.0.0.1", 5, 1000)
    assert (nccl.backend, nccl.rank, nccl.is_sender, nccl.packed) == ("nccl", 1, False, True)
    assert (nccl.master_address, nccl.world_size) == ("127.0.0.1", 5)
    StatelessProcessGroup.create(nccl.master_address, nccl.master_port, 0, 1, store_timeout=10)  # vLLM can listen there
    ipc: Any = trainer_init_info("ipc", 0, "127.0.0.1", 5, 1000)
    assert (ipc.backend, ipc.rank, ipc.is_sender, ipc.packed) == ("ipc", 0, True, True)
    assert nccl.packed_buffer_size_bytes == ipc.packed_buffer_size_bytes == 1000
    assert {nccl.backend, ipc.backend} <= WeightTransferTrainerFactory._registry.keys()
    assert {
        "object_store": PulledWeights.publish,
        "nccl": PushedWeights.publish,
        "ipc": PushedWeights.publish,
    } == TRANSPORTS


def test_the_source_agrees_with_itself_and_sends_copies(tmp_path: Path) -> None:
    """vLLM's sender checks metadata against iteration, and keeps tensors while the next group is gathered."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from rlhf_dist.engines.weight_sync import weight_source

    model = build("qwen3_moe", tied=False, folder=tmp_path)
    source = weight_source(lambda: named_weights(model), torch.bfloat16)
    meta = source.metadata()
    assert len({m.name for m in meta}) == len(meta)
    for _ in range(2):
        sent = list(NCCLTrainerWeightTransferEngine._checked_iter(source, meta))
        before = {name: tensor.clone() for name, tensor in sent}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        assert all(torch.equal(before[name], tensor) for name, tensor in sent)


@pytest.mark.slow  # the integration test of the main job does this in a whole run
def test_pulled_weights_reach_two_generators(tmp_path: Path) -> None:
    records = sync_versions(tmp_path, "object_store", generators=2)
    assert [[r["version"] for r in of_version] for of_version in records] == [[0, 0], [1, 1], [2, 2]]
    assert all(r["canary_diff"] < 1e-4 for of_version in records for r in of_version)
    assert all(r["tells_apart"] for of_version in records[1:] for r in of_version)


def test_pushed_weights_pass_the_gate_of_a_real_generator(tmp_path: Path) -> None:
    """``PushedWeights`` with a real generator; the sender is vLLM's flow with host memory in place of NCCL."""
    from rlhf_dist.engines.shards import pack
    from rlhf_dist.engines.weight_sync import weight_source

    model = build("llama", tied=True, folder=tmp_path)

    @ray.remote(num_cpus=0)
    class Learner:
        """Rank 0; ``lie`` makes its canary that of other weights."""

        def __init__(self, model: Any) -> None:
            self.model = model
            self.client: GeneratorClient | None = None
            self.source = weight_source(lambda: named_weights(model), torch.float32)

        def push_weights(self, version: int, generators: list[Any]) -> tuple[np.ndarray, np.ndarray]:
            if self.client is None:
                self.client = GeneratorClient(generators, 1)
                self.client.init_weight_transfer_engine({})
            self.client.version = version
            perturb(self.model, version)
            self.client.start_weight_update()
            self.client.update_weights({"version": version, "shards": [pack(version, self.source)]})
            self.client.finish_weight_update()
            return CANARY, logprobs(self.model, CANARY) + (1.0 if version == 2 else 0.0)

    @ray.remote(num_cpus=0)
    class OtherRank:
        def push_weights(self, version: int, generators: list[Any]) -> None:
            if version == 4:
                raise RuntimeError("this rank has failed")

    tests = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    ranks = [Learner.options(runtime_env=tests).remote(model), OtherRank.remote()]
    with generator_group(tmp_path, config(tmp_path, "object_store", "float32", 0), 1) as generators:
        push = lambda version: wait_for(PushedWeights(version, ranks).deliver(generators), "push", 100)[0]
        for version in range(2):
            record = push(version)
            assert record["version"] == version
            assert record["canary_diff"] < 1e-4
            assert record["tells_apart"] == (version > 0)
        with pytest.raises(WorkerFailed, match=r"WeightSyncError: canary of version 2: .* differ by 1"):
            push(2)
        # Nothing is sampled from what failed the gate.
        prompts = ray.put(experience([(3, 1)]).select(["prompt_id", "prompt_ids"]))
        generators[0].submit.remote(0, prompts, [(0, 0)], 1, False, 1)
        info, table = generators[0].next_chunk.options(num_returns=2).remote()
        assert ray.wait([info], timeout=3)[0] == []
        assert push(3)["canary_diff"] < 1e-4
        assert ray.get(info).groups == (0,)
        assert set(ray.get(table)["policy_version"].to_pylist()[0]) == {3}
        with pytest.raises(WorkerFailed, match="this rank has failed"):
            push(4)
