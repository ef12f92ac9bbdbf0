"""A number that is not finite stops every rank before the optimizer step; its batch is kept and can be replayed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from faulty import CLIFF, EDGE
from learners import ALGO, running, save_models, spec_of, table_of
from safetensors.torch import load_file

from rlhf_dist.actors.failed_batch import About, Replayed
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.config import LoRAConfig, ModelConfig
from rlhf_dist.engines.objectives import PolicyObjective
from rlhf_dist.models import PolicyModule, load_policy
from rlhf_dist.recipes.replay import here

pytestmark = pytest.mark.usefixtures("cluster")

SLOW = pytest.mark.slow
SHARP = ALGO.model_copy(update={"policy_loss": "faulty:sharp_loss"})
BAD_ROW = 2
NAME = "prompt_id 2, group_id 2, sample_index 0"
#: What stands in the advantages of the bad row, and what the message says of it.
FAULTS = {
    "nan": (float("nan"), "loss nan; not finite: advantages"),
    "infinite": (CLIFF, "loss inf"),
    "gradient": (EDGE, "gradient norm nan"),
}
#: Fault, ranks and ZeRO stage: every one of them, but not every combination.
FAST = [("nan", 1, 2), ("infinite", 2, 2), ("gradient", 2, 3)]


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Ray's workers, which start later, find ``faulty``."""
    here = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(here))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def with_advantages(table: pa.Table, value: float) -> pa.Table:
    """``value`` in the advantages of the bad row."""
    i = table.column_names.index("advantages")
    advantages = table["advantages"].to_pylist()
    advantages[BAD_ROW] = [value] * len(advantages[BAD_ROW])
    return table.set_column(i, "advantages", pa.array(advantages, pa.list_(pa.float32())))


def exported(group: LearnerGroup, out: Path, folders: Path) -> dict[str, torch.Tensor]:
    group.export(str(out), str(folders / "tokenizer"))
    return load_file(out / "model.safetensors")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def errors_of(group: LearnerGroup, *arguments: Any) -> list[str]:
    """What each rank says of an update; none may be left waiting for another."""
    [(_, calls)] = group.update(*arguments).parts
    messages = []
    for call in calls:
        with pytest.raises(FloatingPointError) as caught:
            ray.get(call, timeout=60)
        messages.append(str(caught.value.cause))  # type: ignore[attr-defined]
    return messages


def replayed(spec: LearnerSpec, folder: Path) -> list[Replayed]:
    with running(here(spec, folder, {"CPU": 4})) as group:
        return group.replay(str(folder))


@pytest.mark.parametrize(
    ("fault", "ranks", "stage"),
    [pytest.param(*case, marks=() if case in FAST else SLOW) for case in product(FAULTS, (1, 2), (1, 2, 3))],
)
def test_every_rank_stops_before_the_step(fault: str, ranks: int, stage: int, folders: Path, tmp_path: Path) -> None:
    table = table_of("policy")
    value, words = FAULTS[fault]
    rows = np.arange(table.num_rows)
    spec = replace(spec_of(folders, "policy", ranks, stage), algo=SHARP)
    with running(spec) as group:
        group.update(table, [rows]).steps()
        before = exported(group, tmp_path / "before", folders)
        assert group.failed_step() is None
        messages = errors_of(group, with_advantages(table, value), [rows])
        assert errors_of(group, table, [rows]) == messages, "what was queued behind it is refused"
        assert_same_bits(exported(group, tmp_path / "after", folders), before)
        assert group.failed_step() == (1, 1)
        failed = tmp_path / "failed"
        group.save_failed(str(failed), str(folders / "tokenizer"), "ppo", 2)
    assert len(messages) == ranks
    assert len(set(messages)) == 1
    problem = "gradient norm is inf" if fault == "gradient" else f"loss is {words.split()[1].rstrip(';')}"
    assert messages[0] == f"{problem} in optimizer step 2: {NAME} ({words})"
    assert_same_bits(load_file(failed / "model" / "model.safetensors"), before)
    about = About.read(failed)
    assert (about.stage, about.step, about.optimizer_step, about.steps_taken) == ("ppo", 2, 1, 1)
    assert about.message == messages[0]
    [found] = replayed(spec, failed)
    assert [name for name, figures, _ in found.rows if not figures.finite] == [NAME]


def test_the_model_is_that_before_the_failing_step_of_its_update(folders: Path, tmp_path: Path) -> None:
    """The second of three optimizer steps fails; PPO-ptx beside it. The replay agrees with plain torch."""
    table, text = table_of("policy"), table_of("sft")
    rows = np.arange(table.num_rows)
    minibatches = [np.delete(rows, BAD_ROW), rows[::-1], rows]
    pretrain = [rows[4:6], rows[3:6], rows[:2]]
    algo = ALGO.model_copy(update={"ptx_coef": 0.1})
    spec = replace(spec_of(folders, "policy", 1, 2), algo=algo)
    failed = tmp_path / "failed"
    with running(spec) as group:
        bad = with_advantages(table, float("nan"))
        [message] = errors_of(group, bad, minibatches, (ray.put(text), pretrain))
        group.save_failed(str(failed), str(folders / "tokenizer"), "ppo", 7)
    with running(spec) as group:
        group.update(table, minibatches[:1], (ray.put(text), pretrain[:1])).steps()
        expected = exported(group, tmp_path / "expected", folders)
        [step] = group.update(table, minibatches[1:2], (ray.put(text), pretrain[1:2])).steps()
    assert message == f"loss is nan in optimizer step 2: {NAME} (loss nan; not finite: advantages)"
    assert_same_bits(load_file(failed / "model" / "model.safetensors"), expected)
    assert About.read(failed).place == "optimizer step 2 of 3 of the update, 2 in all"
    assert pq.read_table(failed / "pretrain.parquet")["row"].to_pylist() == [0, 1, 3, 4, 5]

    pq.write_table(table, failed / "batch.parquet")
    batch, ptx = replayed(spec, failed)
    assert batch.finite
    assert ptx.finite
    assert [name for name, _, _ in ptx.rows] == [f"pretraining text, row {row}" for row in pretrain[1]]
    assert batch.loss == pytest.approx(step["loss"], abs=1e-5)
    assert ptx.loss == pytest.approx(0.1 * step["ptx_loss"], abs=1e-5)
    assert batch.norm_bound + ptx.norm_bound > step["grad_norm"]
    module = PolicyModule(load_policy(str(failed / "model"), "float32", "sdpa"), temperature=0.8)
    objective = PolicyObjective(algo, 9)
    totals = objective.totals(table, rows)
    for row, (_, figures, columns) in zip(rows[::-1], batch.rows, strict=True):
        module.zero_grad()
        loss, _ = objective.loss(module, objective.collate(table, [row], 0, False), totals)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9)
        assert figures.loss == pytest.approx(loss.item(), abs=1e-5)
        assert figures.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert columns == []


def test_rows_without_ids_are_named_by_their_number(folders: Path, tmp_path: Path) -> None:
    """Comparisons, on two ranks; the update reads three of five."""
    table = table_of("pairwise")
    margin = pa.array([0, 0, 0, float("nan"), 0], pa.float32())
    table = table.set_column(table.column_names.index("margin"), "margin", margin)
    spec = spec_of(folders, "pairwise", 2, 2)
    failed = tmp_path / "failed"
    with running(spec) as group:
        messages = errors_of(group, table, [np.array([4, 3, 1])])
        group.save_failed(str(failed), str(folders / "tokenizer"), "reward_model", 1)
    assert messages == ["loss is nan in optimizer step 1: row 3 (loss nan; not finite: margin)"] * 2
    assert pq.read_table(failed / "batch.parquet")["row"].to_pylist() == [1, 3, 4]
    [found] = replayed(spec, failed)
    assert [(name, figures.finite, columns) for name, figures, columns in found.rows] == [
        ("row 4", True, []),
        ("row 3", False, ["margin"]),
        ("row 1", True, []),
    ]


@SLOW
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("model", "stage"),
    [
        (ModelConfig(path="-", dtype="bfloat16"), 1),
        (ModelConfig(path="-", dtype="bfloat16"), 2),
        (ModelConfig(path="-", dtype="bfloat16"), 3),
        (ModelConfig(path="-", lora=LoRAConfig(rank=4), gradient_checkpointing=True), 3),
    ],
    ids=["bfloat16-1", "bfloat16-2", "bfloat16-3", "adapters-3"],
)
def test_other_models_stop_too(model: ModelConfig, stage: int, fault: str, folders: Path, tmp_path: Path) -> None:
    table = table_of("policy")
    value, words = FAULTS[fault]
    rows = np.arange(table.num_rows)
    spec = replace(spec_of(folders, "policy", 2, stage), algo=SHARP, model=model)
    with running(spec) as group:
        group.update(table, [rows]).steps()
        before = exported(group, tmp_path / "before", folders)
        messages = errors_of(group, with_advantages(table, value), [rows])
        assert_same_bits(exported(group, tmp_path / "after", folders), before)
    assert len(set(messages)) == 1
    assert messages[0].endswith(f"{NAME} ({words})")
