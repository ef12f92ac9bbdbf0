"""The benchmarks run and write what their readers expect; their figures are not the tests' business."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rlhf_dist.algorithms import ADVANTAGE_ESTIMATORS, POLICY_LOSSES

#: What no other library computes in the same way; the docstring of the benchmark has the reasons.
NOT_COMPARED = {"reinforce", "decoupled_ppo"}


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark where neither verl nor TRL is installed, whether they are or not."""
    for library in ("verl", "trl"):
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import algorithms

    return algorithms


def test_algorithms_writes_every_repetition(
    algorithms: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "algorithms.json"
    threads = torch.get_num_threads()
    algorithms.main(["--rows", "4", "--length", "16", "--repeats", "2", "--out", str(out)])
    assert torch.get_num_threads() == threads
    report = json.loads(out.read_text())
    assert report["machine"]["cpu"]
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"] == torch.__version__
    assert (report["versions"]["verl"], report["versions"]["trl"]) == (None, None)
    assert (report["shape"]["rows"], report["shape"]["length"], report["repeats"]) == (4, 16, 2)
    assert 4 <= report["shape"]["trained_tokens"] <= 64
    assert {row["ours"].split(",")[0] for row in report["results"]} == (
        ADVANTAGE_ESTIMATORS.keys() | POLICY_LOSSES.keys()
    ) - NOT_COMPARED
    for row in report["results"]:
        assert len(row["ours_seconds"]) == 2
        assert min(row["ours_seconds"]) <= row["ours_median"] <= max(row["ours_seconds"])
        assert (row["theirs_seconds"], row["theirs_median"], row["ratio"], row["difference"]) == ([], *[None] * 3)
    assert {row["library"] for row in report["results"]} == {"verl", "trl"}
    assert len(report["missing"]) == 2
    printed = capsys.readouterr().out
    for library, line in zip(("verl", "trl"), report["missing"], strict=True):
        assert line.startswith(f"{library} is not installed: ")
        assert f"pip install --target DIR --no-deps {algorithms.REQUIREMENTS[library]}, " in line
        assert line in printed  # in one piece, to be copied
    assert sys.modules.get("vllm", algorithms) is not None  # hidden from TRL only


def test_nothing_is_timed_that_disagrees(algorithms: Any) -> None:
    """On the trained tokens, that is: what stands elsewhere does not matter."""
    mask = torch.tensor([[True, True], [True, False]])
    ours, theirs = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[1.0, 2.0], [4.0, 9.0]])
    pair = algorithms.Pair("ours", "other", "function", False, lambda: (ours,), lambda: (theirs, mask))
    row = algorithms.measure(pair, 2, mask, comparable=True)
    assert row["difference"] == 0
    assert len(row["ours_seconds"]) == len(row["theirs_seconds"]) == 2
    assert row["ratio"] == pytest.approx(row["theirs_median"] / row["ours_median"])
    theirs[0, 0] = 1.5
    with pytest.raises(ValueError, match=r"ours differs from other function by 0.12 "):
        algorithms.measure(pair, 1, mask, comparable=True)


@pytest.mark.parametrize(("release", "used"), [("1.16.0", True), ("1.15.0", False)])
def test_only_the_release_that_was_tried_is_compared(
    algorithms: Any, monkeypatch: pytest.MonkeyPatch, release: str, used: bool
) -> None:
    """Its method is private: another one may read what the stand-in does not have."""
    trainer = type("GRPOTrainer", (), {})
    for name in ("trl", "trl.trainer", "trl.trainer.grpo_trainer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["trl.trainer.grpo_trainer"].GRPOTrainer = trainer  # type: ignore[attr-defined]
    monkeypatch.setattr(algorithms.metadata, "version", {"trl": release}.__getitem__)
    found, missing = algorithms.import_libraries()
    assert found == ({"trl": trainer} if used else {})
    assert len(missing) == (1 if used else 2)
    assert used or missing[1].startswith("trl 1.15.0 is not the release that is compared; pip install --target DIR ")


def test_sizes_that_cannot_be_compared_are_refused(algorithms: Any) -> None:
    with pytest.raises(SystemExit):
        algorithms.main(["--rows", "1"])


def test_over_optimisation_is_plotted_by_proxy_as_means_over_seeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import overoptimization

    def record(method: str, comparisons: int, seed: int, golds: list[float]) -> dict[str, Any]:
        key = "n" if method == "best-of-n" else "step"
        points = [{key: i, "kl": i**2, "reward": i, "gold_score": gold} for i, gold in enumerate(golds, 1)]
        about = {"method": method, "comparisons": comparisons, "seed": seed, "turn": None}
        return about | {"points": points, "fit": {"alpha": 0.5, "beta": 0.1, "rmse": 0.0}}

    runs = [record("ppo", 1000, seed, [0.5, 0.7, 0.2 + 0.2 * seed]) for seed in (0, 1)]
    runs += [record("best-of-n", size, 0, [0.5, 0.6, 0.7]) for size in (24000, 1000)]
    drawing = ET.fromstring(overoptimization.plot(runs))
    text = "".join(drawing.itertext())
    assert text.index("proxy of 24,000 comparisons") < text.index("proxy of 1,000 comparisons")
    assert "PPO, √KL 3: 0.3" in text
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}path"))) == 3
    overoptimization.show(runs)
    assert "ppo, proxy of 1,000 comparisons, 2 seeds" in capsys.readouterr().out
