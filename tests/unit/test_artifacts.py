"""When a result of a stage may stand for one that would be made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist import artifacts, checkpoint
from rlhf_dist.config_io import load


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w")
    return folder


def inputs_of(model: Path, name: str, *overrides: str, results: dict[str, Path] | None = None) -> dict[str, Any]:
    cfg = load(None, list(overrides))
    stage = next(s for s in cfg.stages if s.name == name)
    return artifacts.inputs(cfg, stage, results or {}, str(model), str(model))


def test_what_a_stage_does_not_read_is_no_input(model: Path) -> None:
    before = inputs_of(model, "sft")
    for other in (
        "train.steps=7",
        "sft.learner.ranks=1",
        "sft.micro_batch_tokens=99",
        "run.keep_last=5",
        "compare.pairs=9",
    ):
        assert inputs_of(model, "sft", other) == before, other
    for own in ("sft.epochs=3", "seed=5", "data.world.demonstrations=64", "model.dtype=bfloat16"):
        assert inputs_of(model, "sft", own) != before, own


def test_inputs_follow_what_files_say_not_where_they_are(tmp_path: Path, model: Path) -> None:
    def rows(folder: str, text: str) -> dict[str, Any]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(text)
        data = f"data={{format: hh, dir: {tmp_path / folder}, train: train.jsonl}}"
        return inputs_of(model, "sft", data, "evaluation.group_by=source")

    here = rows("a", "1")
    assert rows("b", "1") == here
    assert rows("c", "2") != here
    (model / "weights").write_bytes(b"x")
    assert rows("d", "1") != here, "the model that it starts from counts too"


def test_a_stage_depends_on_the_results_that_it_reads(tmp_path: Path, model: Path) -> None:
    def result(text: str) -> Path:
        folder = tmp_path / text
        folder.mkdir()
        (folder / "weights").write_text(text)
        checkpoint.seal(folder, {"figures": {"time": text}})
        return folder

    one, two = result("one"), result("two")
    stages = "pipeline.stages=[sft,{recipe: dpo}]"
    assert inputs_of(model, "dpo", stages, results={"sft": one}) != inputs_of(
        model, "dpo", stages, results={"sft": two}
    )


def test_results_of_other_runs_are_found_by_inputs_and_code(tmp_path: Path, model: Path) -> None:
    wanted = inputs_of(model, "sft")
    for run, about in {
        "same": {"inputs": wanted, "made_with": artifacts.made_with()},
        "other_code": {"inputs": wanted, "made_with": {"rlhf_dist": "0"}},
        "other_inputs": {"inputs": wanted | {"round": 3}, "made_with": artifacts.made_with()},
        "something_else": {"stage": "sft"},
    }.items():
        folder = tmp_path / run / "sft"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(run)
        checkpoint.seal(folder, about)
    (tmp_path / "torn" / "sft").mkdir(parents=True)
    (tmp_path / "torn" / "sft" / checkpoint.MANIFEST).write_text("{")
    assert artifacts.find(tmp_path, "sft", wanted) == tmp_path / "same" / "sft"
    assert artifacts.find(tmp_path, "distill", wanted) is None
    assert artifacts.changed(tmp_path / "other_inputs" / "sft", wanted) == {"round": (3, 0)}
    assert artifacts.changed(tmp_path / "same" / "sft", wanted) == {}


def test_a_result_is_taken_over_whole_and_verified(tmp_path: Path) -> None:
    source = tmp_path / "a" / "sft"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "weights").write_text("weights")
    checkpoint.seal(source, {"inputs": {}})
    artifacts.take_over(source, tmp_path / "b" / "sft")
    assert checkpoint.verify(tmp_path / "b" / "sft")["inputs"] == {}
    assert os.path.samefile(source / "inner" / "weights", tmp_path / "b" / "sft" / "inner" / "weights"), "no room taken"
    (source / "inner" / "weights").write_text("WEIGHTS")
    with pytest.raises(ValueError, match="does not match its digest"):
        artifacts.take_over(source, tmp_path / "c" / "sft")
    assert not (tmp_path / "c" / "sft").exists()
    assert json.loads((source / checkpoint.MANIFEST).read_text())["inputs"] == {}
