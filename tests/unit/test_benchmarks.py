"""The benchmarks run and write what their readers expect; their figures are not the tests' business."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf_dist.algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES
from rlhf_dist.config import Config
from rlhf_dist.config_io import dump
from rlhf_dist.data.load import make_tokenizer
from rlhf_dist.observability.trace import Span, Trace

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


@pytest.fixture
def preference_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import preference_model

    return preference_model


def finished_run(folder: Path) -> Path:
    """A run folder as ``recipe=reward_model`` leaves it, of 60 training and 20 test pairs with random outcomes."""
    for name, rows in (("train", range(60)), ("test", range(60, 80))):
        lines = [
            {
                "chosen": f"\n\nHuman: Say {i}.\n\nAssistant: It is {i}, I think.",
                "rejected": f"\n\nHuman: Say {i}.\n\nAssistant: No, I will not say {i}.",
                "source": ("harmless", "helpful")[i % 2],
            }
            for i in rows
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = {"format": "hh", "dir": str(folder), "train": "train.jsonl", "test": "test.jsonl"}
    cfg = Config.model_validate({"model": {"path": "-", "tokenizer_vocab_size": 300}, "data": files, "recipe": "sft"})
    built = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": None})})
    make_tokenizer(built, str(folder / "tokenizer"))
    (folder / "config.yaml").write_text(dump(cfg))
    rng = np.random.default_rng(0)
    columns = {
        "row": range(20),
        "source": ["harmless", "helpful"] * 10,
        "difference": rng.normal(size=20),
        "longer": rng.integers(-5, 5, 20),
        "preference": pa.array([1.0] * 20, pa.float32()),
    }
    (folder / "reward_model").mkdir()
    pq.write_table(pa.table(columns), folder / "reward_model" / "held_out_pairs.parquet")
    summary = {"reward_model": {"flipped": 7}, "versions": {}, "commit": None, "status": "finished"}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_both_classifiers_read_the_pairs_of_the_run(preference_model: Any, tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    train, test = preference_model.texts(folder, 0.0)
    assert test[0] == [f" It is {i}, I think." for i in range(60, 80)]
    assert test[1] == [f" No, I will not say {i}." for i in range(60, 80)]
    noisy, same = preference_model.texts(folder, 0.3)
    assert same == test, "test pairs stay as they are"
    flipped = [a != b for a, b in zip(noisy[0], train[0], strict=True)]
    assert 5 < sum(flipped) < 35
    assert [c if f else r for c, r, f in zip(*train, flipped, strict=True)] == noisy[1]
    assert preference_model.execute(folder, ["--no-such-option"]) == folder, "a finished run is not run again"


def test_figures_of_each_half(preference_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished_run(tmp_path)
    outcomes = pq.read_table(folder / "reward_model" / "held_out_pairs.parquet")
    right = outcomes["difference"].to_numpy() > 0
    bag = np.where(np.arange(20) < 15, 1.0, -1.0)
    monkeypatch.setattr(preference_model, "HAS_SKLEARN", False)
    bare = preference_model.compare(folder, 0, 0.3)
    assert (bare["seed"], bare["noise"], bare["flipped"], bare["scikit-learn"]) == (0, 0.3, 7, None)
    for name, rows in (("all", slice(None)), ("harmless", slice(0, None, 2)), ("helpful", slice(1, None, 2))):
        part = bare["parts"][name]
        assert part["accuracy"] == right[rows].mean()
        assert "bigrams" not in part
        beside = preference_model.beside_bag(outcomes, bag, np.isin(np.arange(20), np.arange(20)[rows]), seed=0)
        assert beside["bigrams"] == (bag[rows] > 0).mean()
        assert beside["to_bigrams"] == pytest.approx(right[rows].mean() - (bag[rows] > 0).mean())
        low, high = beside["to_bigrams_interval"]
        assert low < beside["to_bigrams"] < high
    clean, both = bare | {"noise": 0.0, "seed": 1}, bare["parts"]["all"]["accuracy"]
    header, *rows = preference_model.rows([bare, clean, clean | {"seed": 0}])
    assert [row[:2] for row in rows[:3]] == [("all", "0"), ("all", "1"), ("all", "mean")], "without wrong labels"
    assert rows[2][2] == f"{both:.3f}"
    assert {len(row) for row in rows} == {len(header)}
    assert preference_model.rows_noise([bare, clean])[2] == ("30%", "0", *[f"{both:.3f}"] * 3, "")


def test_the_bag_of_bigrams_reads_order(preference_model: Any) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is in the extra bench")
    rng = np.random.default_rng(0)
    noise = lambda: " ".join(rng.choice(["red", "green", "blue", "black"], 5))
    chosen = [f"{noise()} not bad {noise()} good" for _ in range(200)]
    rejected = [f"{noise()} bad not {noise()} good" for _ in range(200)]
    found = preference_model.bag_of_bigrams((chosen[:150], rejected[:150]), (chosen[150:], rejected[150:]))
    assert (found > 0).mean() > 0.95
    turned = preference_model.bag_of_bigrams((chosen[:150], rejected[:150]), (rejected[150:], chosen[150:]))
    np.testing.assert_allclose(turned, -found)


def test_over_optimisation_is_plotted_by_proxy_as_means_over_seeds(
    monkeypatch: pytest.MonkeyPatch,
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
    _, rich, poor, ppo = overoptimization.rows(runs)
    assert rich[:2] == ("24,000", "best-of-n")
    assert (poor[5], ppo[5]) == ("n = 3", "step 2")
    assert ppo[:5] == ("1,000", "ppo", "2", "0.500", "0.700")
    assert ppo[8:] == ("0.300", "9.00", "3.00"), "the end: the mean of 0.2 and 0.4"


def test_startup_names_what_came_before_the_first_responses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.startup import parts

    trace = Trace()
    span = lambda process, name, start, end: trace.add(
        [Span(name=name, process=process, start=start, end=end, args={})]
    )
    span("driver", "python", 100.0, 101.0)
    span("generator 0", "start", 104.0, 109.0)
    span("generator 0", "generate", 110.0, 114.0)
    span("policy 0", "python", 103.0, 105.0)
    span("reward", "start", 105.0, 106.0)
    span("policy 0", "push_weights", 111.0, 111.5)
    span("reward", "reward_model", 112.0, 113.0)
    span("reward", "reward_model", 113.0, 114.0)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert list(parts(events)) == [
        ("all", "command", 0.0, 12.0),
        ("driver", "python", 0.0, 1.0),
        ("policy 0", "python", 3.0, 5.0),
        ("generator 0", "start", 4.0, 9.0),
        ("reward", "start", 5.0, 6.0),
        ("policy 0", "push_weights", 11.0, 11.5),
    ]


def test_every_form_of_an_exchange_has_the_same_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import exchange

    samples = exchange.make_samples(200_000)
    forms = (exchange.rollout_table(samples), exchange.as_lists(samples), exchange.padded(samples))
    payloads = [exchange.payload_bytes(form) for form in forms]
    assert len(set(payloads)) == 1
    assert 200_000 <= payloads[0] < 200_000 + exchange.TOKEN_BYTES * exchange.LONGEST + 4 * exchange.PROMPT
    arrow, _, padded = (list(exchange.arrays_of(form)) for form in forms)
    tokens = {int(sum(s.response_ids.sum() for s in samples)) for _ in range(1)}
    assert tokens <= {int(x.sum()) for x in arrow} & {int(x.sum()) for x in padded}
    assert sum(x.nbytes for x in padded) > 2 * payloads[0], "log-normal lengths are mostly padding"


def test_what_lies_in_no_mapping_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import exchange

    array = np.arange(10)
    address = array.ctypes.data
    assert exchange.lies_in([range(0, 1), range(address, address + 80)], array)
    assert not exchange.lies_in([range(0, 1), range(address + 8, address + 80)], array)
    assert exchange.lies_in([], array[:0]), "nothing is nowhere"


def test_scaling_counts_the_steps_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import scaling

    shared = {"perf/samples_per_second": 32.0, "perf/throughput": 640.0, "timing/generate": 0.9, "timing/update": 1.1}
    slow = {"timing/step": 50.0}
    steps = [{"time": 100.0 + i} | slow for i in range(3)]
    steps += [{"time": 102.0 + 2 * (i + 1), "timing/step": 2.0} | shared for i in range(5)]
    # From 102 to 112 s the driver computes a tenth of the time, and grows from 200 to 220 MB half-way.
    watched = [
        (90.0, 0.0, 50.0),
        *((102.0 + t, 5 + 0.1 * t, 200.0 + 20 * (t >= 5)) for t in range(11)),
        (120.0, 9, 900),
    ]
    found = scaling.figures_of(steps, watched)
    assert found == pytest.approx(
        {
            "step": 2.0,
            "generate": 0.9,
            "update": 1.1,
            "samples_per_second": 32.0,
            "tokens": 6400.0,
            "driver_cpu": 1000 * 1.0 / 320,
            "driver_mb": 220.0,
            "driver_mb_growth": 0.1,
        }
    )


def test_scaling_fits_the_exponent_of_each_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import scaling

    grown = [
        {"sweep": "length", **scaling.BASE, "length": n, "step": n**1.5, "driver_cpu": 2.0, "driver_mb": 100.0}
        for n in (1, 4, 16)
    ]
    alone = [{"sweep": "long", **scaling.BASE, "step": 1.0, "driver_cpu": 1.0, "driver_mb": 1.0}]
    assert list(scaling.exponents([*grown, *alone])) == [
        "step grows with length to the power of 1.50",
        "driver_cpu grows with length to the power of 0.00",
        "driver_mb grows with length to the power of 0.00",
    ]


def test_plots_of_a_run_are_drawn_with_note_and_legend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import figures

    curve = {"predicted": [0.25, 0.75], "observed": [0.3, 0.7], "sides": [4, 4]}
    judged = {"calibration": curve, "calibration_error": 0.05, "pairs": 4}
    summary = {"pm_test": judged, "pm_train": judged, "overoptimization": {"test_pm": {"turn": {"sqrt_kl": 1.0}}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"stage": "eval", "step": i, "eval/sqrt_kl": i, "eval/reward": i, "eval/reward_std": 1.0}
        | {"eval/test_pm": i % 2, "eval/test_pm_std": 0.5}
        for i in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures.main([str(tmp_path), "--out", str(tmp_path / "figures"), "--name", "hh"])
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == ["hh_calibration.svg", "hh_overoptimization.svg"]
    calibration, scores = (ET.parse(tmp_path / "figures" / name).getroot() for name in written)
    assert len(calibration.findall("{http://www.w3.org/2000/svg}svg")) == 2
    text = "".join(scores.itertext())
    assert "change, in standard deviations at the start" in text
    assert "test_pm turns" in text
    assert "test_pm, √KL 1: 2" in text  # one point up, in standard deviations of 0.5
    assert "var(" not in (tmp_path / "figures" / written[1]).read_text()


def test_rounds_are_shown_as_means_over_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import iterated

    def record(rounds: int, seed: int, gold: list[float]) -> dict[str, Any]:
        figures = {"gold_score": gold, "kl": gold, "accuracy": gold}
        return {"pairs": 6000, "kl_coef": 0.01, "rounds": rounds, "seed": seed, "before": 0.4, **figures}

    runs = [record(2, 1, [0.6, 0.9]), record(2, 0, [0.5, 0.8]), record(1, 0, [0.7])]
    _, one, two = iterated.rows(runs)
    assert one[:6] == ("6,000", "0.01", "1", "0.400", "0: 0.700", "0.700")
    assert two[:6] == ("6,000", "0.01", "2", "0.400", "0: 0.800, 1: 0.900", "0.550 0.850")
