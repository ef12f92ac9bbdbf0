"""The simulator against what can be worked out by hand, and its bookkeeping under faults."""

from __future__ import annotations

import itertools
import json
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
from benchmarks.simulation.costs import MODELS, Costs, Hardware, gpu_costs, slots
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
    assert result.sampled_tokens > 20 * 6 * 2 * 300, "what was lost had to be sampled again"
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
    assert result.sampled_tokens >= tokens
    if not rate:
        assert sorted(trained) == list(range(len(trained)))
        assert result.sampled_tokens == tokens, "nothing is sampled that nobody trains"
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
    assert costs.transfer == pytest.approx(15.2e9 / 25e9)
    # (72 - 15.2) GB of cache, 57,344 bytes a token.
    assert slots(MODELS["7B"], Hardware(), tokens=2000.0) == 495


def test_a_fit_finds_the_costs_that_made_a_run(tmp_path: Path) -> None:
    """A folder as a run of S = 0 leaves it: the spans are those of known costs."""
    step, sequence, load, update_token = 0.01, 0.002, 0.3, 1e-3
    lengths = [[10 + i, 20 + 7 * i, 15, 30] for i in range(8)]
    trace, now = Trace(), 1000.0

    def span(process: str, name: str, seconds: float, **args: Any) -> None:
        trace.add([{"name": name, "process": process, "start": now, "end": now + seconds, "args": args}])

    with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
        for i, of_step in enumerate(lengths):
            began, tokens = now, sum(of_step) + 4 * 5
            decoded = step * max(of_step) + sequence * sum(of_step)
            span("generator 0", "generate", decoded, running=0, steps=max(of_step), sequences=sum(of_step))
            span("driver", "generate", decoded)
            now += decoded
            span("driver", "score", 0.05)
            now += 0.05
            span("driver", "update", update_token * tokens)
            now += update_token * tokens
            span("policy 0", "push_weights", 0.1)
            span("driver", "push_weights", 0.1 + 0.05 + load)
            now += 0.15
            span("generator 0", "load", load, version=i + 1)
            now += load
            seconds = now - began
            metrics.log(i + 1, "ppo", {"perf/throughput": tokens / seconds, "timing/step": seconds})
            file = tmp_path / "rollouts" / f"step_{i:06}.parquet"
            file.parent.mkdir(exist_ok=True)
            columns = {
                "group_id": [2 * i, 2 * i, 2 * i + 1, 2 * i + 1],
                "prompt_ids": [[1] * 5] * 4,
                "response_ids": [[1] * n for n in of_step],
            }
            pq.write_table(pa.table(columns), file)
    # The clock of the metrics is the machine's own; a run of known costs has a clock of its own.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ends = itertools.accumulate(line["timing/step"] for line in lines)
    text = "".join(json.dumps(line | {"time": end}) + "\n" for line, end in zip(lines, ends, strict=True))
    (tmp_path / "metrics.jsonl").write_text(text)
    trace.write(tmp_path / "trace.json")
    rollout = {"batch_size": 2, "n_samples_per_prompt": 2, "max_staleness": 0, "in_flight_updates": "keep"}
    generator = {"replicas": 1, "max_num_seqs": 8}
    config = {"rollout": rollout | {"chunk_tokens": 2000, "chunk_seconds": 0.1}, "generator": generator}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    run = measured.read(tmp_path)
    costs = measured.fit(run)
    assert (costs.step, costs.sequence) == pytest.approx((step, sequence), rel=1e-3)
    assert (costs.load, costs.update_token) == pytest.approx((load, update_token), rel=1e-3)
    assert (costs.publish, costs.transfer, costs.experience) == pytest.approx((0.1, 0.05, 0.05), abs=1e-3)
    (record,) = command.check([tmp_path], None)
    assert record["step_ratio"] == pytest.approx(1, abs=0.01)
    assert record["tokens_ratio"] == pytest.approx(1, abs=0.01)
    command.show_check([record])
    next((tmp_path / "rollouts").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"rollouts of 7 of 8 steps.*run.save_rollouts=true"):
        measured.read(tmp_path)


def test_the_command_writes_inputs_runs_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "simulate.json"
    small = ["--models", "7B", "--gpus", "8", "--staleness", "0", "1", "--steps", "6", "--set", "mfu=0.3"]
    command.main([*small, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["inputs"]["hardware"]["mfu"] == 0.3
    assert found["inputs"]["hardware"]["flops"] == 989e12
    assert {r["staleness"] for r in found["runs"]} == {0, 1}
    assert all(r["generators"] * r["generator_gpus"] + r["learner_gpus"] == 8 for r in found["runs"])
    assert "best split of each scenario" in capsys.readouterr().out
    assert "7B, 8 GPUs, long tail" in out.with_suffix(".svg").read_text()


def test_figures_that_the_hardware_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^speed=3: no figure of the hardware; there are flops, hbm, "):
        command.given_hardware(None, ["speed=3"])
    file = tmp_path / "gpu.yaml"
    file.write_text("hbm: 2.0e12\nnode: 4\n")
    hardware = command.given_hardware(file, ["hbm=1e12"])
    assert (hardware.hbm, hardware.node) == (1e12, 4)
