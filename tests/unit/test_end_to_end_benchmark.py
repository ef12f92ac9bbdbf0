"""What the benchmark against TRL gives to both sides, and what it makes of their steps."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.config_io import load
from rlhf_dist.models import load_policy


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import end_to_end

    return end_to_end


@pytest.fixture
def place(benchmark: Any, tmp_path: Path) -> Any:
    return benchmark.Place(tmp_path, "python", cores=4)


def test_both_sides_are_asked_for_the_same(benchmark: Any, place: Any) -> None:
    for case in benchmark.CASES:
        trl = benchmark.trl_config(case, place, {})
        for staleness in (0, 1):
            ours = load(None, benchmark.our_options(case, Path("policy"), staleness, place))
            assert (ours.samples_per_step, ours.rollout.n_samples_per_prompt) == (
                trl["generation_batch_size"],
                trl["num_generations"],
            )
            assert ours.train.batch_size == trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]
            assert ours.train.steps * ours.updates_per_step == trl["max_steps"]
            assert trl["logging_steps"] == ours.updates_per_step
            assert ours.rollout.max_response_length == trl["max_completion_length"]
            assert (ours.rollout.temperature, ours.rollout.top_p, ours.rollout.top_k) == (
                trl["temperature"],
                trl["top_p"],
                trl["top_k"],
            )
            algo, optim = ours.algo, ours.policy.optim
            assert (algo.kl_coef, algo.eps_clip, algo.eps_clip_high) == (trl["beta"], trl["epsilon"], None)
            assert (algo.use_kl_loss, algo.kl_estimator, algo.loss_aggregation) == (True, "k3", "sequence_mean")
            assert (optim.lr, optim.schedule) == (trl["learning_rate"], trl["lr_scheduler_type"])
            assert (*optim.betas, optim.eps) == (trl["adam_beta1"], trl["adam_beta2"], trl["adam_epsilon"])
            assert (optim.warmup_ratio, optim.weight_decay, optim.max_grad_norm) == (0, 0, trl["max_grad_norm"])
            assert (ours.seed, ours.model.dtype, trl["bf16"]) == (trl["seed"], "float32", False)
            assert (ours.reward.normalize, ours.reward.missing_eos_penalty) == (False, 0)
            assert [c.function for c in ours.reward.components] == [benchmark.REWARD]


def test_smaller_micro_batches_make_the_same_updates(benchmark: Any, place: Any) -> None:
    config = benchmark.trl_config(benchmark.CASES[0], place, {"per_device_train_batch_size": 16})
    assert (config["per_device_train_batch_size"], config["gradient_accumulation_steps"]) == (16, 4)
    tiny = benchmark.trl_config(benchmark.tiny(benchmark.CASES[0]), place, {"per_device_train_batch_size": 16})
    assert (tiny["per_device_train_batch_size"], tiny["gradient_accumulation_steps"]) == (8, 1)


def steps(times: list[float]) -> list[dict[str, float]]:
    return [{"time": t, "reward": i / 10, "length": 5.0} for i, t in enumerate(times)]


def test_figures_leave_out_the_warm_up_and_what_nothing_is_generated_beside(benchmark: Any) -> None:
    case = benchmark.Case("short", steps=5, max_response_length=8, lr=1.0, prompts=2, samples=5, warm_up=2)
    found = benchmark.figures(steps([10, 20, 22, 25, 26]), started=3.0, case=case)
    assert (found["samples_per_second"], found["tokens_per_second"]) == (30 / 6, 150 / 6)
    assert (found["step_seconds"], found["first_step_seconds"]) == (2, 7)
    assert (found["reward"], found["length"]) == (0.4, 5)
    assert found["curve"]["samples"] == [10, 20, 30, 40, 50]
    assert found["curve"]["seconds"] == [0, 10, 12, 15, 16]
    ahead = benchmark.figures(steps([10, 20, 22, 25, 26]), started=3.0, case=case, uncounted=1)
    assert ahead["samples_per_second"] == 20 / 5
    with pytest.raises(ValueError, match="4 steps were recorded, 5"):
        benchmark.figures(steps([1, 2, 3, 4]), started=0.0, case=case)


def test_the_fastest_mode_that_runs_is_taken(benchmark: Any) -> None:
    tried = {"a": {"samples_per_second": 2.0}, "b": {"error": "no"}, "c": {"samples_per_second": 3.0}}
    assert benchmark.fastest(tried) == "c"
    assert benchmark.fastest({"only": {}}) == "only"
    with pytest.raises(ValueError, match="no mode of TRL"):
        benchmark.fastest({"a": {"error": "no"}, "b": {"error": "no"}})


def test_ratios_and_curves_are_over_the_repetitions(benchmark: Any) -> None:
    runs = []
    for side, rates in {"ours, S=0": (4.0, 6.0), "TRL": (2.0, 2.0)}.items():
        for repetition, rate in enumerate(rates):
            curve = {"samples": [8, 16], "seconds": [0.0, 16 / rate], "reward": [0.1, 0.3 + repetition / 5]}
            run = {"lengths": "short", "side": side, "repetition": repetition, "curve": curve}
            runs.append(run | {"samples_per_second": rate, "reward": 0.5})
    assert benchmark.ratios(runs) == [("short", "ours, S=0", 2.5, 0.5, 0.5)]
    assert benchmark.curves(runs, "samples")["TRL"] == [(8, 0.1), (16, pytest.approx(0.4))]
    root = ET.fromstring(benchmark.plot(runs))
    assert "Gold score" in "".join(root.itertext())


def test_without_trl_it_says_how_to_install_it(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"version": None, "ppo": False, "error": "No module named 'trl'"})
    done = benchmark.subprocess.CompletedProcess([], 0, stdout=f"a warning\n{answer}\n")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SystemExit, match=r"No module named 'trl'(.|\n)*pip install .*trl==1"):
        benchmark.check_trl("python")


def test_the_lognormal_policy_has_the_lengths_that_it_is_asked_for(benchmark: Any, tmp_path: Path) -> None:
    from benchmarks.lognormal import PACES, PHASES, lognormal_policy, mean_lengths

    means = mean_lengths(64, 1.0)
    assert len(means) == PACES
    assert means[PACES // 2] == pytest.approx(64)
    folder = lognormal_policy(tmp_path, benchmark.MODEL, 64, 1.0)
    policy = load_policy(str(folder), "float32", "sdpa")
    with torch.no_grad():
        chain = policy(torch.arange(policy.config.vocab_size)[:, None]).logits[:, 0].softmax(-1).double()
    eos = policy.config.eos_token_id
    assistant, first_words = 5, 6
    # Distribution of the length: what has not ended after n words, step by step.
    alive, lengths = chain[assistant].clone(), []
    for _ in range(4000):
        alive[:first_words] = 0
        after = alive @ chain
        lengths.append(float(after[eos]))
        alive = after
    total = torch.tensor(lengths)
    logs = torch.arange(1, 4001, dtype=torch.float64).log()
    mean = float((total * logs).sum() / total.sum())
    assert float(total.sum()) == pytest.approx(1, abs=1e-3)
    assert math.sqrt(float((total * (logs - mean) ** 2).sum())) == pytest.approx(1.0, abs=0.1)
    assert int((total.cumsum(0) < 0.5).sum()) == pytest.approx(64, rel=0.15)
    assert float(total[: PHASES - 1].sum()) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="take more"):
        mean_lengths(64, 0.2)
