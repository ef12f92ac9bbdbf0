"""Rows that are not finite: their names, their columns, the folder that is written, what ``replay`` makes of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from tiny import comparisons, experience, rankings

from rlhf_dist.actors.failed_batch import About, FailedBatch, Replayed
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.waiting import WorkerFailed
from rlhf_dist.config import AlgoConfig, LearnerConfig, LoRAConfig, ModelConfig, OptimConfig
from rlhf_dist.config_io import load
from rlhf_dist.data.nonfinite import RowFigures, Source, columns_not_finite, listed, row_name
from rlhf_dist.main import main
from rlhf_dist.observability.terminal import Terminal
from rlhf_dist.recipes import replay
from rlhf_dist.run import Run

NAN, INF = float("nan"), float("inf")
TABLE = experience([(2, 3), (1, 2), (2, 1)])
SPEC = LearnerSpec(
    role="policy",
    model_path="elsewhere",
    head="policy",
    objective="policy",
    model=ModelConfig(path="-", attention="flash_attention_2", lora=LoRAConfig(rank=4)),
    learner=LearnerConfig(ranks=4, cpus=8, gpus=1, zero_stage=3, offload_params=True, resources={"big": 1}),
    optim=OptimConfig(lr=1e-3),
    micro_batch_tokens=100,
    packing=True,
    algo=AlgoConfig(ptx_coef=0.5),
)


def changed(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    i = table.column_names.index(column)
    return table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))


# Names and columns


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_columns_of_a_row_that_are_not_finite(value: float) -> None:
    table = changed(changed(TABLE, "advantages", 1, [0.5, value]), "score", 1, value)
    assert columns_not_finite(table, 1) == ["score", "advantages"]
    assert columns_not_finite(table, 0) == columns_not_finite(table, 2) == []


def test_columns_may_be_empty_or_nested_or_no_numbers() -> None:
    table = pa.table(
        {
            "empty": pa.array([[], []], pa.list_(pa.float32())),
            "nested": pa.array([[[1.0], []], [[2.0], [3.0, NAN]]], pa.list_(pa.list_(pa.float64()))),
            "text": ["a", "b"],
            "missing": pa.array([None, None], pa.float32()),
            "ids": pa.array([[1], [2]], pa.list_(pa.int32())),
        }
    )
    assert columns_not_finite(table, 0) == []
    assert columns_not_finite(table, 1) == ["nested"]
    assert columns_not_finite(rankings([(1, [1, 2])], [[NAN]]), 0) == [], "NaN is a pair that nobody compared"


def test_rows_are_called_by_their_ids_where_there_are_some() -> None:
    assert row_name(TABLE, 1) == "prompt_id 1, group_id 1, sample_index 0"
    assert row_name(TABLE.drop_columns(["group_id", "sample_index"]), 2) == "prompt_id 2"
    table = comparisons([(1, 2, 3), (1, 1, 1)])
    assert row_name(table, 1) == "row 1"
    assert row_name(table.append_column("row", pa.array([40, 41])), 1) == "row 41"


@pytest.mark.parametrize(("count", "text"), [(1, "0"), (5, "0; 1; 2; 3; 4"), (8, "0; 1; 2; 3; 4; and 3 more")])
def test_at_most_five_rows_are_listed(count: int, text: str) -> None:
    assert listed([str(i) for i in range(count)]) == text


def test_what_a_source_keeps() -> None:
    """Rows that the update reads, once each, and the minibatches in the new numbering."""
    table = rankings([(1, [1, 2])] * 6, [[i / 5] for i in range(6)])
    source = Source("batch", table, [np.array([5, 1]), np.array([1, 3])])
    kept = source.kept()
    assert kept.table["row"].to_pylist() == [1, 3, 5]
    assert [m.tolist() for m in kept.minibatches] == [[2, 0], [0, 1]]
    for ours, theirs in zip(kept.minibatches, source.minibatches, strict=True):
        assert kept.table["preferences"].take(pa.array(ours)) == table["preferences"].take(pa.array(theirs))
        assert [kept.name_of(row) for row in ours] == [source.name_of(row) for row in theirs]


# The message and the folder


def found(figures: list[tuple[float, float]], table: pa.Table = TABLE) -> list[tuple[Source, list[RowFigures]]]:
    rows = np.arange(len(figures))
    return [(Source("batch", table, [rows[:1], rows]), [RowFigures(i, *f) for i, f in enumerate(figures)])]


def test_the_message_names_the_rows_that_fail_alone() -> None:
    table = changed(TABLE, "advantages", 0, [NAN] * 3)
    batch = FailedBatch.of("loss is nan", 2, 41, found([(NAN, NAN), (0.1, 2.0), (0.2, INF)], table))
    assert batch.faulty == [
        "prompt_id 0, group_id 0, sample_index 0 (loss nan; not finite: advantages)",
        "prompt_id 2, group_id 2, sample_index 0 (gradient norm inf)",
    ]
    assert batch.message == f"loss is nan: {batch.faulty[0]}; {batch.faulty[1]}"


def test_the_message_names_all_rows_where_none_fails_alone() -> None:
    batch = FailedBatch.of("gradient norm is inf", 1, 0, found([(0.1, 1e19)] * 3))
    assert batch.faulty == []
    assert batch.message == (
        "gradient norm is inf, but each of its 3 rows alone is finite: "
        + "; ".join(row_name(TABLE, i) for i in range(3))
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run writes; the model is a stub."""
    batch = FailedBatch.of("loss is nan", 2, 41, found([(NAN, NAN), (0.1, 2.0), (0.2, INF)]))
    batch.write(tmp_path / "failed", "ppo", 12, TypeAdapter(LearnerSpec).dump_python(SPEC, mode="json"))
    (tmp_path / "failed" / "model").mkdir()
    (tmp_path / "failed" / "model" / "config.json").write_text("{}")
    return tmp_path / "failed"


def test_about_says_what_replay_needs(folder: Path) -> None:
    about = About.read(folder)
    assert (about.stage, about.step, about.role, about.objective) == ("ppo", 12, "policy", "policy")
    assert about.place == "optimizer step 2 of 2 of the update, 42 in all"
    assert about.minibatches == {"batch": [[0], [0, 1, 2]]}
    assert len(about.faulty) == 2
    assert TypeAdapter(LearnerSpec).validate_python(about.spec) == SPEC
    [source] = about.sources(folder)
    assert source.table.drop_columns("row").equals(TABLE)
    json.loads((folder / "about.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_learner_of_a_replay(folder: Path) -> None:
    """One rank that shards no parameters; on a machine without GPUs also without what needs them."""
    gpu = replay.here(SPEC, folder, {"CPU": 2, "GPU": 1})
    assert (gpu.learner.ranks, gpu.learner.zero_stage, gpu.learner.cpus, gpu.learner.gpus) == (1, 2, 2, 1)
    assert (gpu.model_path, gpu.packing, gpu.learner.resources) == (str(folder / "model"), True, {})
    assert not gpu.learner.offload_params
    cpu = replay.here(SPEC, folder, {"CPU": 16})
    assert (cpu.learner.gpus, cpu.learner.cpus, cpu.packing, cpu.model.attention) == (0, 8, False, "sdpa")
    assert replace(cpu, learner=gpu.learner, model=gpu.model, packing=True) == gpu


# What the driver does


class Learner:
    """Stands for a group whose update failed at ``at``, or did not."""

    def __init__(self, at: tuple[int, int] | None, full_disk: bool = False) -> None:
        self.at, self.full_disk = at, full_disk
        self.saved: list[tuple[Any, ...]] = []

    def failed_step(self) -> tuple[int, int] | None:
        return self.at

    def save_failed(self, *arguments: Any) -> None:
        if self.full_disk:
            raise WorkerFailed("critic: no space left on device")
        self.saved.append(arguments)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(load(None, [f"run.root={tmp_path}", "run.name=job"]), Terminal(io.StringIO()))
    run.tokenizer_dir = "tokenizer"
    return run


@pytest.mark.parametrize(("step", "expected"), [(3, 3), (None, 14)])
def test_the_learner_that_failed_saves(step: int | None, expected: int, run: Run) -> None:
    policy, critic = Learner(None), Learner((4, 13))
    with pytest.raises(FloatingPointError, match="loss is nan"), run.keeping_failed_batch("s", [policy, critic], step):  # type: ignore[list-item]
        raise FloatingPointError("loss is nan")
    folder = run.path("failed", f"step_{expected:06d}")
    assert (policy.saved, critic.saved) == ([], [(folder, "tokenizer", "s", expected)])
    assert run.failed_batch == run.summary.get("failed_batch") == folder


def test_a_batch_that_cannot_be_saved_does_not_hide_the_fault(run: Run) -> None:
    critic = Learner((1, 0), full_disk=True)
    with pytest.raises(FloatingPointError, match="loss is nan"), run.keeping_failed_batch("ppo", [None, critic], 3):  # type: ignore[list-item]
        raise FloatingPointError("loss is nan")
    assert run.failed_batch is None
    assert "could not be saved: critic: no space left" in run.terminal.console.file.getvalue()  # type: ignore[attr-defined]


def test_nothing_is_saved_for_other_failures(run: Run) -> None:
    policy = Learner((1, 0))
    with pytest.raises(WorkerFailed), run.keeping_failed_batch("ppo", [policy]):  # type: ignore[list-item]
        raise WorkerFailed("policy: the process died")
    assert policy.saved == []


# Replay, as far as it goes without a learner


@pytest.mark.parametrize("name", ["nowhere", "rollouts/step_000001.parquet", "policy"])
def test_replay_of_anything_else_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "rollouts").mkdir()
    pq.write_table(TABLE, tmp_path / "rollouts" / "step_000001.parquet")
    assert main(["replay", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / name} holds no failed batch: expected a folder with about.json, batch.parquet" in error
    assert "Files of rollouts/ have no model" in error


@pytest.mark.parametrize("missing", ["batch.parquet", "model/config.json"])
def test_replay_of_a_folder_that_is_not_complete(
    missing: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / missing).unlink()
    assert main(["replay", str(folder)]) == 2
    assert f"{folder} is not complete: {missing} is missing" in capsys.readouterr().err


def test_replay_of_a_damaged_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "about.json").write_text('{"stage": "ppo"}')
    assert main(["replay", str(folder)]) == 2
    assert f"{folder / 'about.json'} is damaged: " in capsys.readouterr().err


def test_a_mended_batch_keeps_its_rows(folder: Path) -> None:
    pq.write_table(TABLE.slice(1), folder / "batch.parquet")
    with pytest.raises(ValueError, match=r"batch\.parquet has 2 rows, the update read 3; change values"):
        About.read(folder).sources(folder)


@pytest.mark.parametrize(
    ("figures", "whole", "code", "last"),
    [
        ([(0.1, 1.0), (0.2, 2.0)], (0.3, 3.0), 0, "finite here: every row alone, and all together"),
        ([(0.1, 1.0), (NAN, NAN)], (NAN, NAN), 1, "error: not finite here either: 1 rows, each alone"),
        ([(0.1, 1.0), (0.2, INF)], (0.3, INF), 1, "error: not finite here either: 1 rows, each alone"),
        ([(0.1, 1.0), (0.2, 2.0)], (INF, 3.0), 1, "error: not finite here either: all together"),
    ],
)
def test_the_exit_code_of_a_replay(
    figures: list[tuple[float, float]], whole: tuple[float, float], code: int, last: str
) -> None:
    text = io.StringIO()
    [(source, rows)] = found(figures)
    assert replay.show([Replayed.of(source, rows, *whole)], Terminal(text)) == code
    lines = text.getvalue().rstrip().splitlines()
    assert lines[-1] == last
    assert lines[-2].startswith(f"all 2 together: loss {whole[0]:.6g}")
    table = [line for line in lines if "sample_index" in line]
    finite = ["yes" in line for line in table]
    assert finite == sorted(finite), "those that are not finite come first"


def test_replay_shows_a_part_of_many_rows() -> None:
    table = experience([(1, 1)] * 80)
    text = io.StringIO()
    figures = [RowFigures(i, NAN if i == 79 else 0.1, 1.0) for i in range(80)]
    assert replay.show([Replayed.of(Source("batch", table, []), figures, NAN, 1.0)], Terminal(text)) == 1
    assert text.getvalue().count("sample_index") == replay.SHOWN
    assert "prompt_id 79," in text.getvalue()
    assert "and 30 rows more, all of them finite" in text.getvalue()
