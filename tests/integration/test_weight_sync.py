"""Weight sync into real vLLM engines: many architectures, tensor parallelism, and every fault that it must refuse.

The learner is a transformers model in float32; what it sends are the names and tensors of ``LearnerEngine``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sync_models import CANARY, build, finish, generator_engine, logprobs, perturb, shards_of
from transformers import PreTrainedModel

from rlhf_dist.engines.shards import Shard, WeightSyncError, pack

TOLERANCE = 1e-4
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("engines_in_this_process", "one_engine_at_a_time")


def check_sync(engine: Any, model: PreTrainedModel, version: int) -> None:
    record = engine.load(version, shards_of(model, version), lambda: (CANARY, logprobs(model, CANARY)))
    assert record.canary_diff < TOLERANCE
    assert record.version == engine.version == version
    assert record.tensors == len({name for shard in shards_of(model, version) for name in shard.names})
    assert record.nbytes == sum(p.numel() * 4 for p in model.parameters())
    if version > 0:
        assert record.canary_tells_apart


def sampled_difference(engine: Any, model: PreTrainedModel) -> float:
    """Largest difference of one response's log-probabilities, generator against learner."""
    prompt = CANARY[:7]
    engine.add(0, 0, 0, 0, prompt, 3)
    samples = finish(engine)
    response = np.array(samples[0].response_ids, np.int32)
    assert len(response) == 16
    assert set(samples[0].policy_versions) == {engine.version}
    expected = logprobs(model, np.concatenate([prompt, response]))[len(prompt) - 1 :]
    return float(np.abs(np.array(samples[0].logprobs) - expected).max())


@pytest.mark.parametrize(
    ("name", "tied", "workers"),
    [
        ("llama", True, 1),
        ("qwen3", False, 1),
        ("qwen3_moe", False, 1),
        ("llama", True, 2),
        pytest.param("llama", False, 1, marks=slow),
        pytest.param("qwen3", True, 1, marks=slow),
        pytest.param("gemma2", True, 1, marks=slow),
        pytest.param("gemma3", True, 1, marks=slow),
        pytest.param("gpt2", True, 1, marks=slow),
        pytest.param("gpt2", False, 1, marks=slow),
        pytest.param("mixtral", False, 1, marks=slow),
        pytest.param("mixtral", True, 1, marks=slow),
        pytest.param("qwen3_moe", True, 1, marks=slow),
        pytest.param("qwen3", False, 2, marks=slow),
        pytest.param("gemma3", True, 2, marks=slow),
        pytest.param("gpt2", True, 2, marks=slow),
        pytest.param("qwen3_moe", False, 2, marks=slow),
        pytest.param("mixtral", True, 2, marks=slow),
    ],
)
def test_every_version_arrives(name: str, tied: bool, workers: int, tmp_path: Path) -> None:
    model = build(name, tied=tied, folder=tmp_path)
    engine = generator_engine(tmp_path, tensor_parallel_size=workers)
    for version in range(3):
        if version:
            perturb(model, version)
        check_sync(engine, model, version)
    assert sampled_difference(engine, model) < TOLERANCE
    if workers > 1:
        check_that_failed_workers_are_not_used_again(engine, model)
        engine.llm.llm_engine.engine_core.shutdown()


def check_that_failed_workers_are_not_used_again(engine: Any, model: PreTrainedModel) -> None:
    """vLLM's answers are out of step after a failure; the message still names version and tensors."""
    shards, expected = flipped_byte(shards_of(model, 3)), logprobs(model, CANARY)
    with pytest.raises(WeightSyncError, match=r"version 3 with .* do not match their digest"):
        engine.load(3, shards, lambda: (CANARY, expected))
    with pytest.raises(WeightSyncError, match=r"start them anew: .*version 3 with"):
        engine.load(3, shards_of(model, 3), lambda: (CANARY, expected))


def flipped_byte(shards: list[Shard]) -> list[Shard]:
    data = shards[1].data.copy()
    data[len(data) // 2] ^= 1
    return [shards[0], replace(shards[1], data=data), *shards[2:]]


def wrong_version(shards: list[Shard]) -> list[Shard]:
    return [*shards[:-1], pack(shards[-1].version - 1, shards[-1].tensors())]


def swapped_names(shards: list[Shard]) -> list[Shard]:
    """In the header only: the digest tells."""
    return [shards[0], replace(shards[1], names=shards[1].names[::-1]), *shards[2:]]


def renamed(shards: list[Shard], version: int, change: Callable[[str, torch.Tensor], Any]) -> list[Shard]:
    """Sealed again after ``change(name, tensor)``, which gives the list of pairs to send instead."""
    return [pack(version, [pair for name, t in shard.tensors() for pair in change(name, t)]) for shard in shards]


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[list[Shard]], list[Shard]], str]] = {
    "flipped byte": (flipped_byte, r"version {v} with .* from model\.layers.* do not match their digest"),
    "wrong version": (wrong_version, r"model.* is of version {old}, expected version {v}"),
    "swapped names": (
        swapped_names,
        r"version {v} with .* from model\.layers.* to model\.layers.* do not match their digest",
    ),
    "missing": (
        lambda s: renamed(s, s[0].version, lambda n, t: [] if n == K_PROJ else [(n, t)]),
        rf"version {{v}}: tensor {K_PROJ} is missing",
    ),
    "duplicate": (
        lambda s: renamed(s, s[0].version, lambda n, t: [(n, t)] * (1 + (n == K_PROJ))),
        rf"version {{v}}: tensor {K_PROJ} was sent twice",
    ),
    "new name": (
        lambda s: renamed(s, s[0].version, lambda n, t: [(n.replace(K_PROJ, "odd"), t)]),
        rf"version {{v}}: tensor {K_PROJ} is missing",
    ),
    "wrong shape": (
        lambda s: renamed(s, s[0].version, lambda n, t: [(n, t[:-1] if n == UP_PROJ else t)]),
        rf"version {{v}}: tensor {UP_PROJ} is \('float32', \(127, 64\)\), in the first sync \('float32', \(128, 64\)\)",
    ),
    "wrong type": (
        lambda s: renamed(s, s[0].version, lambda n, t: [(n, t.bfloat16() if n == UP_PROJ else t)]),
        rf"version {{v}}: tensor {UP_PROJ} is \('bfloat16',",
    ),
    "weights of equal shape exchanged": (
        lambda s: renamed(s, s[0].version, lambda n, t: [(_exchange(n), t)]),
        r"canary of version {v}: log-probabilities of learner and generator differ by",
    ),
    "not a number": (
        lambda s: renamed(s, s[0].version, lambda n, t: [(n, t * float("nan") if n == K_PROJ else t)]),
        r"canary of version {v}: .* differ by nan",
    ),
}


def _exchange(name: str) -> str:
    other = {"k_proj": "v_proj", "v_proj": "k_proj"}
    return ".".join(other.get(part, part) for part in name.split("."))


def test_a_first_sync_with_a_wrong_shape_names_the_tensor_and_can_be_repeated(tmp_path: Path) -> None:
    """Nothing to compare with yet: vLLM's loader refuses in the middle, with layers loaded in part."""
    model = build("llama", tied=True, folder=tmp_path)
    engine = generator_engine(tmp_path)
    perturb(model, 7)
    broken = FAULTS["wrong shape"][0](shards_of(model, 0))
    with pytest.raises(WeightSyncError, match=rf"version 0: vLLM does not load tensor {UP_PROJ}"):
        engine.load(0, broken, lambda: (CANARY, logprobs(model, CANARY)))
    without = renamed(shards_of(model, 0), 0, lambda n, t: [] if "norm" in n else [(n, t)])
    with pytest.raises(WeightSyncError, match=r"version 0: the loader did not fill model\.layers\.0\.input_layernorm"):
        engine.load(0, without, lambda: (CANARY, logprobs(model, CANARY)))
    # Other weights than those of the failed attempts: what was left over from them would show.
    perturb(model, 8)
    check_sync(engine, model, 0)
    assert sampled_difference(engine, model) < TOLERANCE


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PreTrainedModel]:
    """An engine and its learner; every test leaves the engine usable.

    Only one engine can live in a process: the tests above, which make their own, must have run before.
    """
    folder = tmp_path_factory.mktemp("llama")
    model = build("llama", tied=True, folder=folder)
    return generator_engine(folder), model


def check_that_nothing_is_sampled(engine: Any) -> None:
    """One request is queued, and waits."""
    engine.add(0, 0, 7, 0, CANARY[:3], 0)
    with pytest.raises(WeightSyncError, match="before a weight update has passed the gate"):
        engine.add_text(0, CANARY[:3], 1)
    assert not engine.active


def advance(engine: Any, model: PreTrainedModel) -> None:
    """The next version, with other weights."""
    perturb(model, engine.version + 1)
    check_sync(engine, model, engine.version + 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_and_named_and_the_next_load_is_right(
    tied_llama: tuple[Any, PreTrainedModel], fault: str
) -> None:
    engine, model = tied_llama
    advance(engine, model)
    version = engine.version + 1
    perturb(model, version)
    break_, message = FAULTS[fault]
    with pytest.raises(WeightSyncError, match=message.format(v=version, old=version - 1)):
        engine.load(version, break_(shards_of(model, version)), lambda: (CANARY, logprobs(model, CANARY)))
    check_that_nothing_is_sampled(engine)
    check_sync(engine, model, version)
    assert [set(s.policy_versions) for s in finish(engine)] == [{version}]
    assert sampled_difference(engine, model) < TOLERANCE


def skipping_loader(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's model takes every tensor, says that it has loaded it, and keeps the old weights."""
    model = engine.llm.apply_model(lambda m: m)[0]
    names = {name for name, _ in model.named_parameters()}

    def load_weights(tensors: Any) -> set[str]:
        for _ in tensors:
            pass
        return names

    monkeypatch.setattr(model, "load_weights", load_weights)


def skipping_update(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that hands over the weights gets lost."""
    monkeypatch.setattr(engine.llm, "update_weights", lambda request: None)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (skipping_loader, r"version {v}: the loader did not fill "),
        (skipping_update, "a weight update was finished, but no weights had come"),
    ],
)
@pytest.mark.parametrize("size", [1e-7, 0.1])
def test_a_load_that_is_skipped_is_noticed_however_small_the_step(
    tied_llama: tuple[Any, PreTrainedModel], skip: Any, message: str, size: float
) -> None:
    """The canary could not tell: at 1e-7 the old weights pass it."""
    engine, model = tied_llama
    advance(engine, model)
    version = engine.version + 1
    before = logprobs(model, CANARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)
    assert (np.abs(logprobs(model, CANARY) - before).max() < TOLERANCE) == (size < 1e-6)
    with pytest.MonkeyPatch.context() as patch:
        skip(engine, patch)
        with pytest.raises(WeightSyncError, match=message.format(v=version)):
            engine.load(version, shards_of(model, version), lambda: (CANARY, logprobs(model, CANARY)))
    check_that_nothing_is_sampled(engine)
    check_sync_of_any_size(engine, model, version)


def check_sync_of_any_size(engine: Any, model: PreTrainedModel, version: int) -> None:
    record = engine.load(version, shards_of(model, version), lambda: (CANARY, logprobs(model, CANARY)))
    assert record.canary_diff < TOLERANCE
    assert engine.version == version
    assert [set(s.policy_versions) for s in finish(engine)] == [{version}]


def test_a_learner_with_other_logprobs_is_refused(tied_llama: tuple[Any, PreTrainedModel]) -> None:
    engine, model = tied_llama
    version = engine.version + 1
    expected = logprobs(model, CANARY)
    # Of an unlikely token less than twice the tolerance would pass: see canary_difference.
    expected[5] += 8 * TOLERANCE
    with pytest.raises(
        WeightSyncError, match=rf"canary of version {version}: .* differ by 0\.000\d+, allowed are 0\.0001"
    ):
        engine.load(version, shards_of(model, version), lambda: (CANARY, expected))
    assert engine.version == version - 1
    advance(engine, model)


def test_a_pushed_update_passes_the_same_gate(tied_llama: tuple[Any, PreTrainedModel]) -> None:
    """The four calls that vLLM's own transports make, in their order, and what happens out of it."""
    engine, model = tied_llama
    version = engine.version + 1
    perturb(model, version)
    expected = logprobs(model, CANARY)
    engine.start_weight_update()
    engine.update_weights({"version": version, "shards": shards_of(model, version)})
    engine.finish_weight_update(version)
    check_that_nothing_is_sampled(engine)
    with pytest.raises(WeightSyncError, match=f"version {version + 1} is expected, {version} was loaded"):
        engine.gate(version + 1, CANARY, expected)
    record = engine.gate(version, CANARY, expected)
    assert record.canary_diff < TOLERANCE
    assert record.nbytes == sum(p.numel() * 4 for p in model.parameters())
    assert 0 < record.load_seconds < 60
    assert [set(s.policy_versions) for s in finish(engine)] == [{version}]
    assert sampled_difference(engine, model) < TOLERANCE


def test_what_we_use_of_vllm_beyond_its_interface_is_still_there(tied_llama: tuple[Any, PreTrainedModel]) -> None:
    """weight_sync.py leans on these private names of vLLM 0.32; a new version must be read before it is let in."""
    import vllm
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

    assert vllm.__version__.startswith("0.32.")
    assert {"object_store", "nccl", "ipc"} <= WeightTransferEngineFactory._registry.keys()
    assert list(inspect.signature(reload.initialize_layerwise_reload).parameters) == ["model"]
    finalize = inspect.signature(reload.finalize_layerwise_processing)
    assert list(finalize.parameters) == ["model", "model_config"]
    assert callable(reload.finalize_layerwise_reload)
    assert {"load_numel", "loaded_weights"} <= LayerReloadingInfo.__dataclass_fields__.keys()
    assert "self.moe_kernel" in inspect.getsource(FusedMoEMethodBase.__init__)

    engine, _ = tied_llama
    model = engine.llm.apply_model(lambda m: m)[0]
    assert isinstance(get_layerwise_info(model.lm_head), LayerReloadingInfo)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    parameters = inspect.signature(model.lm_head.quant_method.process_weights_after_loading).parameters
    assert list(parameters) == ["layer"]
