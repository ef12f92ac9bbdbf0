"""The simulator against what can be worked out by hand, and its bookkeeping under faults."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.observability.metrics import MetricsWriter
from rlhf_dist.observability.trace import Trace

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import simulate as command
from benchmarks.simulation import measured
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.cluster import Plan, Result, simulate
from benchmarks.simulation.costs import ASSUMED, MODELS, Costs, Hardware, gpu_costs, slots
from benchmarks.simulation.generator import Sampling
from benchmarks.simulation.generators import Failures

#: A step of decoding takes 10 ms whatever runs.
PLAIN = Costs(step=0.01, load=0.5, update=3.0)


def equal(tokens: int) -> Any:
    return lambda group: (5, [tokens, tokens])


def seconds_of_steps(result: Result) -> list[float]:
    return [b.ended - a.ended for a, b in itertools.pairwise(result.steps)]


def test_without_staleness_a_step_is_generation_training_and_sync() -> None:
    costs = Costs(step=0.01, sequence=0.001, load=0.5, update=2.0, update_token=0.01, publish=0.2, transfer=0.3)
    result = simulate(Plan(1, 4, 2, 0, 5), costs, equal(100))
    tokens = 4 * 2 * (5 + 100)
    generation = 100 * (0.01 + 8 * 0.001)
    expected = generation + 2.0 + 0.01 * tokens + 0.2 + 0.3 + 0.5
    assert seconds_of_steps(result) == pytest.approx([expected] * 4)
    figures = result.figures(0, 4, 1)
    assert figures["tokens_per_second"] == pytest.approx(tokens / expected)
    assert figures["samples_per_second"] == pytest.approx(8 / expected)
    assert figures["generators_idle"] == pytest.approx(1 - (generation + 0.5) / expected)
    assert (figures["age"], figures["oldest"]) == (0, 0)


@pytest.mark.parametrize(("update", "expected"), [(3.0, 3.0), (0.4, 1.0)], ids=["learner", "generator"])
def test_with_staleness_a_step_is_the_longer_of_the_two(update: float, expected: float) -> None:
    """The generator decodes one batch at a time."""
    result = simulate(Plan(1, 4, 2, 1, 12), Costs(step=0.01, update=update), equal(100), Sampling(max_num_seqs=8))
    assert seconds_of_steps(result)[2:-2] == pytest.approx([expected] * 7)
    assert all(step.oldest <= 1 for step in result.steps)


def test_equal_generators_divide_the_work() -> None:
    """Each decodes two sequences at once: eight groups of two are eight rounds for one, two rounds for four."""
    costs, sampling = Costs(step=0.01, update=3.0), Sampling(max_num_seqs=2)
    for count in (1, 2, 4):
        result = simulate(Plan(count, 8, 2, 0, 4), costs, equal(100), sampling)
        assert seconds_of_steps(result) == pytest.approx([8 / count + 3.0] * 3), count


def test_the_longest_response_is_waited_for() -> None:
    result = simulate(Plan(2, 4, 2, 0, 3), PLAIN, lambda group: (5, [10, 200 if group % 4 == 3 else 20]))
    assert seconds_of_steps(result) == pytest.approx([2.0 + 3.0 + 0.5] * 2)


def test_growing_contexts_and_prompts_cost_what_they_cost() -> None:
    costs = Costs(step=0.01, context=1e-4, prefill=1e-3, update=1.0)
    result = simulate(Plan(1, 1, 2, 0, 3), costs, equal(10))
    context = sum(2 * (5 + k) for k in range(10))
    assert seconds_of_steps(result) == pytest.approx([10 * 0.01 + 1e-4 * context + 5e-3 + 1.0] * 2)


def test_draining_waits_for_what_runs_and_keeping_does_not() -> None:
    """One long response in every other group, and weights that arrive in its midst."""
    lengths = lambda group: (5, [400, 400] if group % 2 else [50, 50])
    rates = {}
    for updates in ("keep", "drain"):
        plan = Plan(1, 2, 2, 4, 30, goes_on=True)
        result = simulate(plan, Costs(step=0.01, update=0.5), lengths, Sampling(4, updates))
        rates[updates] = result.figures(5, 29, 1)["tokens_per_second"]
    assert rates["keep"] > 1.1 * rates["drain"]


def test_a_generator_that_dies_is_replaced_and_its_groups_are_sampled_again() -> None:
    failures = Failures(generator=1 / 20, generator_recovery=5.0)
    result = simulate(Plan(3, 6, 2, 1, 20), PLAIN, equal(300), failures=failures, seed=3)
    assert result.deaths["generator"] > 0
    assert result.retried_groups > 0
    assert result.lost_tokens > 0
    assert result.sampled_tokens == 20 * 6 * 2 * 300 + result.lost_tokens, "what was lost had to be sampled again"
    assert [len(step.rows) for step in result.trained] == [6] * 20


@settings(deadline=None, max_examples=60)
@given(
    plan=st.builds(
        Plan,
        generators=st.integers(1, 4),
        batch_size=st.integers(1, 5),
        n_samples_per_prompt=st.just(2),
        max_staleness=st.integers(0, 3),
        steps=st.integers(1, 8),
        checkpoint_every=st.integers(0, 3),
    ),
    sampling=st.builds(
        Sampling,
        max_num_seqs=st.integers(1, 6),
        in_flight_updates=st.sampled_from(["keep", "drain", "recompute"]),
        chunk_tokens=st.sampled_from([1, 100]),
    ),
    mean_life=st.one_of(st.none(), st.floats(10, 100)),
    seed=st.integers(0, 1000),
)
def test_every_group_is_trained_once_and_in_time(
    plan: Plan, sampling: Sampling, mean_life: float | None, seed: int
) -> None:
    rate = 1 / mean_life if mean_life else 0.0
    failures = Failures(rate, rate / 4, generator_recovery=2.0, learner_recovery=4.0)
    costs = Costs(
        step=0.01, sequence=0.001, context=1e-5, prefill=1e-3, load=0.1, message=0.01, score_token=1e-3,
        experience=0.05, logprob_token=1e-4, update=0.5, update_token=1e-4, publish=0.05, transfer=0.1, driver=0.01,
    )  # fmt: skip
    lengths = lambda group: (3, [1 + 7919 * (group + seed) % 60, 1 + 104729 * (group + seed) % 90])
    result = simulate(plan, costs, lengths, sampling, failures, seed)
    assert [step.step for step in result.trained] == list(range(1, plan.steps + 1))
    trained = [group for step in result.trained for group in step.rows]
    assert len(set(trained)) == len(trained) == plan.steps * plan.batch_size
    versions = [step.version for step in result.trained]
    assert versions == sorted(set(versions))
    assert len(result.steps) == plan.steps
    assert all(0 <= step.age <= step.oldest <= plan.max_staleness for step in result.steps)
    tokens = sum(sum(lengths(group)[1]) for group in trained)
    assert result.sampled_tokens == tokens + result.lost_tokens, "each was trained or died"
    if not rate:
        assert sorted(trained) == list(range(len(trained)))
        assert result.lost_tokens == 0
        assert (result.retried_groups, result.dropped_groups) == (0, 0)
    end = result.steps[-1]
    assert end.generators_busy <= plan.generators * end.ended + 1e-6
    assert end.learners_busy <= end.ended + 1e-6
    assert simulate(plan, costs, lengths, sampling, failures, seed) == result, "equal seeds, equal runs"


@given(
    seconds=st.floats(0, 50),
    sequences=st.integers(1, 300),
    context=st.integers(1, 10**6),
    per_token=st.sampled_from([0.0, 1e-7, 1e-5]),
)
def test_steps_that_have_begun(seconds: float, sequences: int, context: int, per_token: float) -> None:
    costs = Costs(step=0.002, weights=0.01, compute=1e-4, sequence=1e-5, context=per_token)
    steps = costs.steps_in(seconds, sequences, context)
    assert costs.stretch(steps, sequences, context) >= seconds * (1 - 1e-6)
    assert steps == 1 or costs.stretch(steps - 1, sequences, context) < seconds + 1e-6
    one_by_one = sum(costs.decoding(sequences, context + k * sequences) for k in range(20))
    assert costs.stretch(20, sequences, context) == pytest.approx(one_by_one)


def test_a_driver_that_nobody_can_wake_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"at 0 s the simulated driver waits for ever"):
        Clock().until(lambda: False)


def test_arithmetic_of_data_sheets() -> None:
    """7.6e9 parameters in bf16 on one H100: 15.2 GB over 0.6 of 3.35 TB/s; 8 FLOPs a parameter and token."""
    costs = gpu_costs(MODELS["7B"], Hardware(), learner_gpus=8)
    assert costs.weights == pytest.approx(15.2e9 / (0.6 * 3.35e12))
    assert costs.context == pytest.approx(2 * 28 * 4 * 128 * 2 / (0.6 * 3.35e12))
    assert costs.update_token == pytest.approx(8 * 7.6e9 / (8 * 989e12 * 0.4))
    assert costs.transfer == pytest.approx(15.2e9 / (0.11 * 50e9))
    # (72 - 15.2) GB of cache, 57,344 bytes a token.
    assert slots(MODELS["7B"], Hardware(), tokens=2000.0) == 495
    assert MODELS["405B"].kv_bytes(gpus=8) == 2 * 126 * 8 * 128 * 2
    assert MODELS["405B"].kv_bytes(gpus=32) == 4 * MODELS["405B"].kv_bytes(gpus=8), "each of 8 heads on four GPUs"
    assert command.in_cache(sigma=0.0) == 512 + 1024 / 2
    # E[L^2] / 2 E[L] = median * exp(1.5 sigma^2) / 2 without the cut at 16,384, which takes a tenth.
    assert command.in_cache(sigma=1.0) == pytest.approx(512 + 0.9 * 1024 * math.exp(1.5) / 2, rel=0.05)


#: Tokens of the responses of each step: two groups of two; every prompt has five.
LENGTHS = [[10 + i, 20 + 7 * i, 15, 30] for i in range(12)]


def write_run(folder: Path, trace: Trace, seconds: list[float], staleness: int) -> None:
    """What a run leaves that ``--check`` reads, for :data:`LENGTHS` and the seconds of each step."""
    folder.mkdir()
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        for i, (of_step, taken) in enumerate(zip(LENGTHS, seconds, strict=True)):
            throughput = (sum(of_step) + 4 * 5) / taken
            figures = {"perf/throughput": throughput, "timing/step": taken, "rollout/groups_left_out": 0.0}
            metrics.log(i + 1, "ppo", figures)
            file = folder / "rollouts" / f"step_{i:06}.parquet"
            file.parent.mkdir(exist_ok=True)
            columns = {
                "group_id": [2 * i, 2 * i, 2 * i + 1, 2 * i + 1],
                "prompt_ids": [[1] * 5] * 4,
                "response_ids": [[1] * n for n in of_step],
            }
            pq.write_table(pa.table(columns), file)
    # The clock of the metrics is the machine's own; a run of known costs has a clock of its own.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = itertools.accumulate(seconds)
    text = "".join(json.dumps(line | {"time": end}) + "\n" for line, end in zip(lines, ends, strict=True))
    (folder / "metrics.jsonl").write_text(text)
    trace.write(folder / "trace.json")
    rollout = {"batch_size": 2, "n_samples_per_prompt": 2, "max_staleness": staleness, "in_flight_updates": "keep"}
    generator = {"replicas": 1, "max_num_seqs": 8}
    config = {"rollout": rollout | {"chunk_tokens": 2000, "chunk_seconds": 0.1}, "generator": generator}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def span(trace: Trace, process: str, name: str, start: float, seconds: float, **args: Any) -> float:
    """Add it; returns its end."""
    trace.add([{"name": name, "process": process, "start": start, "end": start + seconds, "args": args}])
    return start + seconds


def synchronous_run(folder: Path, costs: Costs) -> None:
    """A run of S = 0 with these costs, whose steps have their phases one after the other."""
    trace, now, seconds = Trace(), 1000.0, []
    for i, of_step in enumerate(LENGTHS):
        began, steps, sequences = now, max(of_step), sum(of_step)
        decoded = costs.step * steps + costs.sequence * sequences
        span(trace, "generator 0", "generate", now, decoded, running=0, steps=steps, sequences=sequences)
        now = span(trace, "driver", "generate", now, decoded)
        now = span(trace, "driver", "score", now, costs.experience)
        now = span(trace, "driver", "update", now, costs.update_token * (sequences + 4 * 5))
        span(trace, "policy 0", "push_weights", now, costs.publish)
        arrives = costs.publish + costs.transfer
        span(trace, "generator 0", "load", now + arrives, costs.load, version=i + 1)
        now = span(trace, "driver", "push_weights", now, arrives + costs.load)
        seconds.append(now - began)
    write_run(folder, trace, seconds, staleness=0)


KNOWN = Costs(
    step=0.01, sequence=0.002, load=0.3, update_token=1e-3, publish=0.1, transfer=0.05, experience=0.05
)  # fmt: skip


def test_a_fit_finds_the_costs_that_made_a_run(tmp_path: Path) -> None:
    """A folder as a run of S = 0 leaves it: the spans are those of known costs."""
    folder = tmp_path / "run"
    synchronous_run(folder, KNOWN)
    costs = measured.fit(measured.read(folder))
    assert (costs.step, costs.sequence) == pytest.approx((KNOWN.step, KNOWN.sequence), rel=1e-3)
    assert (costs.load, costs.update_token) == pytest.approx((KNOWN.load, KNOWN.update_token), rel=1e-3)
    assert (costs.publish, costs.transfer, costs.experience) == pytest.approx((0.1, 0.05, 0.05), abs=1e-3)
    (record,) = command.check([folder], None)
    assert record["step_ratio"] == pytest.approx(1, abs=0.01)
    assert record["tokens_ratio"] == pytest.approx(1, abs=0.01)
    command.show_check([record])


def test_costs_of_one_run_predict_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--check`` a run of S = 1 with the costs of one of S = 0; the seconds of its steps are those that these give."""
    synchronous_run(tmp_path / "s0", KNOWN)
    groups = [(5, lengths[i : i + 2]) for lengths in LENGTHS for i in (0, 2)]
    simulated = simulate(Plan(1, 2, 2, 1, len(LENGTHS)), KNOWN, groups.__getitem__, Sampling(max_num_seqs=8))
    ends = [step.ended for step in simulated.steps]
    trace = Trace()
    for start, end in itertools.pairwise([0.0, *ends]):
        span(trace, "driver", "generate", start, end - start)
    write_run(tmp_path / "s1", trace, [b - a for a, b in itertools.pairwise([0.0, *ends])], staleness=1)

    command.main(["--check", str(tmp_path / "s1"), "--fit", str(tmp_path / "s0"), "--out", str(tmp_path / "out.json")])
    (record,) = json.loads((tmp_path / "out.json").read_text())["check"]
    assert (record["run"], record["fitted_on"], record["staleness"]) == ("s1", "s0", 1)
    assert record["step_ratio"] == pytest.approx(1, abs=0.01)
    assert record["step_seconds"] < 0.8 * measured.compare(measured.read(tmp_path / "s0"), KNOWN)["step_seconds"]
    assert "s1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no generate span with the number of its steps: make the run again"):
        measured.fit(measured.read(tmp_path / "s1"))


def test_runs_that_cannot_be_predicted_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    synchronous_run(folder, KNOWN)
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(
        metrics.replace('"rollout/groups_left_out": 0.0', '"rollout/groups_left_out": 2.0')
    )
    with pytest.raises(ValueError, match="groups were sampled and not trained"):
        measured.read(folder)
    (folder / "metrics.jsonl").write_text(metrics)
    next((folder / "rollouts").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"rollouts of 11 of 12 steps.*run.save_rollouts=true"):
        measured.read(folder)


def test_the_command_writes_inputs_runs_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "simulate.json"
    small = ["--models", "7B", "--gpus", "8", "--staleness", "0", "1", "--steps", "10", "--set", "mfu=0.3"]
    command.main([*small, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["inputs"]["hardware"]["mfu"] == 0.3
    assert found["inputs"]["hardware"]["flops"] == 989e12
    assert {r["staleness"] for r in found["runs"]} == {0, 1}
    assert all(r["generators"] * r["generator_gpus"] + r["learner_gpus"] == 8 for r in found["runs"])
    assert "best split of each scenario" in capsys.readouterr().out
    assert "7B, 8 GPUs, long tail" in out.with_suffix(".svg").read_text()


def test_the_command_varies_what_is_assumed_and_how_often_processes_die(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    small = ["--models", "7B", "--gpus", "8", "--groups", "8", "--shares", "0.5", "--staleness", "1", "--steps", "10"]
    command.main([*small, "--failures", "0", "--out", str(out)])
    command.main([*small, "--failures", "100000", "--out", str(out)])
    never, often = json.loads(out.read_text())["runs"]
    assert (never["groups"], never["failures"], often["failures"]) == (8, 0, 100000)
    assert (sum(never["deaths"].values()), never["lost_share"]) == (0, 0)
    assert often["deaths"]["generator"] > 0
    assert 0 < often["lost_share"] < 1
    assert often["hours"] > never["hours"]
    command.main([*small, "--failures", "0", "--set", "driver=1", "--out", str(out)])
    assert len(json.loads(out.read_text())["runs"]) == 1, "others have other inputs"
    command.main([*small, "--sensitivity", "--out", str(out)])
    ratios = {(r["figure"], r["value"]): r["ratio"] for r in json.loads(out.read_text())["sensitivity"]}
    assert {name for name, _ in ratios} == set(ASSUMED)
    assert ratios["overhead", 0.004 / 1.5] > 1 > ratios["overhead", 0.004 * 1.5]
    assert ratios["learner_recovery", 600.0] == 1
    assert "hbm_share" in capsys.readouterr().out


def test_figures_that_the_hardware_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^speed=3: no figure of the hardware; there are flops, hbm, "):
        command.given_hardware(None, ["speed=3"])
    file = tmp_path / "gpu.yaml"
    file.write_text("hbm: 2.0e12\nnode: 4\n")
    hardware = command.given_hardware(file, ["hbm=1e12"])
    assert (hardware.hbm, hardware.node) == (1e12, 4)
