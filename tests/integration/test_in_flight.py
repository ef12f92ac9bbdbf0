"""New weights while responses are under way: which token is of which version, and what the cache holds.

A real vLLM engine against a transformers model in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from sync_models import CANARY, VOCAB, build, finish, generator_engine, logprobs, perturb, shards_of
from transformers import PreTrainedModel

from rlhf_dist.engines.shards import WeightSyncError

TOLERANCE = 1e-4
LENGTH = 16
pytestmark = pytest.mark.usefixtures("engines_in_this_process", "one_engine_at_a_time")
PROMPT = np.random.default_rng(1).integers(0, VOCAB, 7, dtype=np.int32)


def load(engine: Any, model: PreTrainedModel) -> Any:
    version = engine.version + 1
    return engine.load(version, shards_of(model, version), lambda: (CANARY, logprobs(model, CANARY)))


def steps(engine: Any, n: int) -> list[Any]:
    return [sample for _ in range(n) for sample in engine.step()[0]]


def differences(model: PreTrainedModel, sample: Any) -> np.ndarray:
    """For each token of the response, how far its log-probability is from that of ``model``."""
    ids = np.concatenate([sample.prompt_ids, np.array(sample.response_ids, np.int32)])
    return np.abs(logprobs(model, ids)[len(sample.prompt_ids) - 1 :] - np.array(sample.logprobs))


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_every_token_is_of_the_version_it_says(mode: Literal["keep", "recompute"], tmp_path: Path) -> None:
    model = build("llama", tied=True, folder=tmp_path)
    old = build("llama", tied=True, folder=tmp_path)
    engine = generator_engine(tmp_path, in_flight_updates=mode)
    load(engine, model)
    for i in range(3):
        engine.add(0, 0, i, 0, PROMPT[: 5 + i], i)
    assert steps(engine, 6) == []
    perturb(model, 1)
    record = load(engine, model)
    assert record.in_flight == 3
    assert record.canary_diff < TOLERANCE
    samples = finish(engine)
    assert len(samples) == 3
    for sample in samples:
        versions = sample.policy_versions
        assert len(versions) == LENGTH == len(sample.response_ids)
        assert (np.diff(versions) >= 0).all()
        assert list(np.flatnonzero(versions == 0)) == list(range(6)), "six tokens were sampled before the update"
        assert differences(old, sample)[:6].max() < TOLERANCE
        after = differences(model, sample)[6:]
        if mode == "recompute":
            assert after.max() < TOLERANCE, "the whole prefix is that of the new weights"
        else:
            assert after.max() > 10 * TOLERANCE, "the cache of the first tokens is that of the old weights"


@pytest.mark.parametrize("rollout", [{"in_flight_updates": "drain"}, {"max_staleness": 0}], ids=str)
def test_nothing_is_loaded_while_requests_run_that_must_be_finished(rollout: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama", tied=True, folder=tmp_path)
    engine = generator_engine(tmp_path, **rollout)
    load(engine, model)
    engine.add(0, 0, 0, 0, PROMPT, 0)
    steps(engine, 2)
    with pytest.raises(WeightSyncError, match="while 1 requests are running"):
        load(engine, model)
    engine.add(0, 0, 1, 0, PROMPT, 0)
    while engine.running:
        engine.step(begin=False)
    perturb(model, 1)
    load(engine, model)
    (sample,) = finish(engine)
    assert set(sample.policy_versions) == {1}, "what had not begun begins with the new weights"


def test_a_request_waits_for_its_version(tmp_path: Path) -> None:
    model = build("llama", tied=True, folder=tmp_path)
    engine = generator_engine(tmp_path)
    load(engine, model)
    engine.add(0, 0, 0, 0, PROMPT, 0, version=1)
    assert not engine.active
    perturb(model, 1)
    load(engine, model)
    (sample,) = finish(engine)
    assert set(sample.policy_versions) == {1}


def test_what_was_sampled_under_weights_that_failed_the_gate_never_leaves(tmp_path: Path) -> None:
    model = build("llama", tied=True, folder=tmp_path)
    engine = generator_engine(tmp_path)
    load(engine, model)
    for i in range(2):
        engine.add(0, 0, i, 0, PROMPT, i)
    steps(engine, LENGTH - 1)  # the last token falls into the canary's step
    perturb(model, 1)
    wrong = logprobs(model, CANARY) + 1
    with pytest.raises(WeightSyncError, match="canary of version 1"):
        engine.load(1, shards_of(model, 1), lambda: (CANARY, wrong))
    assert not engine.active
    load(engine, model)
    samples = finish(engine)
    assert [s.group_id for s in samples] == [0, 1]
    for sample in samples:
        assert set(sample.policy_versions) == {1}, "taken again from the start"
        assert differences(model, sample).max() < TOLERANCE


def test_a_gate_that_fails_once_is_passed_by_loading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", tied=True, folder=tmp_path)
    engine = generator_engine(tmp_path)
    canary, calls = engine.canary, []

    def once_wrong(ids: np.ndarray) -> np.ndarray:
        calls.append(0)
        return canary(ids) + (1 if len(calls) == 1 else 0)

    monkeypatch.setattr(engine, "canary", once_wrong)
    record = load(engine, model)
    assert record.reloaded_after.startswith("canary of version 0")
    assert record.canary_diff < TOLERANCE
    assert load(engine, model).reloaded_after == ""


@pytest.mark.parametrize("salted", [True, False])
def test_without_a_salt_a_new_request_would_mix_versions(
    salted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache cannot be emptied while requests run; the salt keeps new requests off the old version's blocks."""
    from rlhf_dist.engines import vllm

    model = build("llama", tied=True, folder=tmp_path)
    engine = generator_engine(tmp_path, max_prompt_length=160)
    if not salted:
        prompt_of = vllm.tokens_input
        monkeypatch.setattr(vllm, "tokens_input", lambda ids, cache_salt: prompt_of(ids, cache_salt="one for all"))
    load(engine, model)
    block = engine.engine.vllm_config.cache_config.block_size
    long = np.random.default_rng(2).integers(0, VOCAB, 160, dtype=np.int32)
    assert len(long) > block, "whole blocks are shared"
    engine.add(0, 0, 0, 0, long, 0)
    steps(engine, 3)
    perturb(model, 1)
    load(engine, model)
    engine.add(0, 0, 1, 0, long, 1, version=1)
    new = next(s for s in finish(engine) if s.group_id == 1)
    assert set(new.policy_versions) == {1}
    worst = differences(model, new).max()
    assert (worst < TOLERANCE) == salted, worst
