"""A learner that goes on from a snapshot does what it would have done without a break."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from learners import running, save_models, spec_of, table_of
from safetensors.torch import load_file

from rlhf_dist import checkpoint
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.restoring import learner_state
from rlhf_dist.config import LearnerConfig, LoRAConfig, ModelConfig

pytestmark = pytest.mark.usefixtures("cluster")

LORA = ModelConfig(path="-", lora=LoRAConfig(rank=4, dropout=0.2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def learn(group: LearnerGroup, steps: int) -> list[dict[str, float]]:
    table = table_of(str(group.spec.objective))
    rows = np.arange(table.num_rows)
    return group.update(table, [rows, rows[::-2]] * (steps // 2)).steps()


def save(group: LearnerGroup, root: Path, folders: Path) -> tuple[str, dict[str, Any]]:
    """A sealed checkpoint; the learner goes on at once."""
    folder = str(root / "step_000002")
    _, written = group.save(folder, str(folders / "tokenizer"))
    learn(group, 2)  # the snapshot must not see this
    files = checkpoint.merged(ray.get(written))
    c = group.spec.learner
    checkpoint.seal(folder, {"learners": {group.role: {"ranks": c.ranks, "zero_stage": c.zero_stage}}}, files)
    return folder, checkpoint.verify(folder)


def weights(group: LearnerGroup, out: Path, folders: Path) -> dict[str, torch.Tensor]:
    group.export(str(out), str(folders / "tokenizer"))
    return load_file(out / "model.safetensors")


def go_on(spec: LearnerSpec, folder: str, manifest: dict[str, Any], learner: LearnerConfig) -> LearnerSpec:
    return replace(spec, learner=learner, restore=learner_state(folder, manifest, spec.role, learner))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("objective", "ranks", "stage", "model"),
    [
        ("policy", 2, 2, None),
        ("critic", 2, 3, None),
        ("policy", 1, 2, LORA),
        pytest.param("policy", 1, 1, None, marks=SLOW),
        pytest.param("policy", 2, 3, LORA, marks=SLOW),
        pytest.param("policy", 2, 1, ModelConfig(path="-", dtype="bfloat16"), marks=SLOW),
        pytest.param("policy", 2, 3, ModelConfig(path="-", dtype="bfloat16"), marks=SLOW),
    ],
)
def test_it_goes_on_bit_for_bit(
    objective: str, ranks: int, stage: int, model: ModelConfig | None, folders: Path, tmp_path: Path
) -> None:
    spec = spec_of(folders, objective, ranks, stage)
    spec = replace(spec, role=objective, total_steps=8, model=model or spec.model)
    with running(spec) as group:
        learn(group, 2)
        folder, manifest = save(group, tmp_path, folders)
        expected = learn(group, 2), weights(group, tmp_path / "one", folders)
    with running(go_on(spec, folder, manifest, spec.learner)) as group:
        learn(group, 2)
        found = learn(group, 2), weights(group, tmp_path / "two", folders)
    assert found[0] == expected[0], "figures, the learning rate among them"
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name], tensor), name
    if objective == "policy":
        from transformers import AutoModelForCausalLM

        assert AutoModelForCausalLM.from_pretrained(Path(folder) / "policy").num_parameters() > 0


@pytest.mark.parametrize(("before", "after", "stage"), [(2, 1, 2), (1, 2, 3), pytest.param(1, 2, 1, marks=SLOW)])
def test_another_number_of_ranks_goes_on(before: int, after: int, stage: int, folders: Path, tmp_path: Path) -> None:
    spec = replace(spec_of(folders, "policy", before, stage), role="policy", total_steps=8)
    with running(spec) as group:
        learn(group, 2)
        folder, manifest = save(group, tmp_path, folders)
        expected = learn(group, 2), weights(group, tmp_path / "one", folders)
    with running(go_on(spec, folder, manifest, LearnerConfig(ranks=after, zero_stage=stage))) as group:
        learn(group, 2)
        found = learn(group, 2), weights(group, tmp_path / "two", folders)
    for step, (ours, theirs) in enumerate(zip(found[0], expected[0], strict=True)):
        assert ours == pytest.approx(theirs, abs=1e-4), step
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-5, rtol=0)


def test_another_stage_is_refused_with_both_values() -> None:
    manifest = {"learners": {"policy": {"ranks": 2, "zero_stage": 2}}}
    with pytest.raises(ValueError, match="policy was saved with zero_stage=2, this run has zero_stage=3"):
        learner_state("x/step_000002", manifest, "policy", LearnerConfig(zero_stage=3))
    with pytest.raises(ValueError, match="has no critic, only policy"):
        learner_state("x/step_000002", manifest, "critic", LearnerConfig())
