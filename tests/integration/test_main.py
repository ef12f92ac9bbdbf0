"""The program as people start it: ``python -m rlhf_dist.main``, its run folder, its exit codes, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from jobs import Job
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist import schema
from rlhf_dist.checkpoint import complete, verify

# The whole pipeline

PIPELINE = [
    "model.architecture={hidden_size: 64, intermediate_size: 128, num_attention_heads: 2, num_key_value_heads: 2}",
    "data.world={demonstrations: 640, comparisons: 240, prompts: 96, test_prompts: 32}",
    "compare.pairs=80",
    "sft={epochs: 1, learner: {ranks: 1}}",
    "reward_model={epochs: 1, learner: {ranks: 1}}",
    "rollout.batch_size=32",
    "rollout.chunk_tokens=200",
    "train={steps: 3, batch_size: 16, epochs: 2}",
    "critic.warmup_steps=1",
    "evaluation={prompts: 16, n_samples_per_prompt: 2}",
    "evaluation.metrics=[{function: 'rlhf_dist.data.world:gold_score'}, {name: reward_again, model: trained}]",
    "run={checkpoint_every: 1, keep_last: 2, eval_every: 2}",
    "cluster={local_cpus: 2, object_store_mb: 100}",
]
PPO_METRICS = [
    *[f"rollout/{n}" for n in ("reward_mean", "reward_std", "response_length_mean", "truncated_rate", "kl")],
    *[f"train/{n}" for n in ("rollout_logprob_abs_diff", "value_loss", "explained_variance", "kl_coef")],
    *[f"timing/{n}" for n in ("generate", "score", "update", "push_weights", "step")],
    "perf/throughput",
    "weight_sync/canary_diff",
]
POLICY_METRICS = [f"train/{n}" for n in ("policy_loss", "entropy", "kl", "ppo_kl", "clip_frac", "grad_norm", "lr")]


def test_the_pipeline_from_scratch(start: Callable[..., Job]) -> None:
    job = start(*PIPELINE).wait(600)
    assert job.code == 0, job.output
    assert_summary(job.summary)
    assert_metrics(job)
    assert_files(job.folder)
    job.assert_nothing_left()


def assert_summary(summary: dict[str, Any]) -> None:
    assert (summary["status"], summary["recipe"], summary["steps"]) == ("finished", "pipeline", 3)
    assert summary["seconds"] > 0
    assert {"ray", "torch", "vllm", "deepspeed", "transformers"} <= summary["versions"].keys()
    assert 0 <= summary["reward_model"]["accuracy"] <= 1
    for stage in ("sft", "ppo"):
        assert 0 <= summary["eval"][stage]["gold_score"] <= 1
        assert summary["eval"][stage]["reward_again"] == pytest.approx(summary["eval"][stage]["reward"], abs=1e-5)
        assert abs(summary["eval"][stage]["kl"]) < 5
    assert summary["eval"]["sft"]["kl"] == pytest.approx(0, abs=1e-3), "the SFT policy is its own reference"
    assert 0 <= summary["weight_sync"]["max_canary_diff"] < 1e-4
    assert summary["rows_skipped"] == 0


def assert_metrics(job: Job) -> None:
    assert len(job.metrics("sft")) == 40
    assert len(job.metrics("reward_model")) == 20
    assert [r["step"] for r in job.metrics("eval")] == [0, 2, 3]
    records = job.metrics("ppo")
    assert [r["step"] for r in records] == [1, 2, 3]
    for record in records:
        for name in PPO_METRICS:
            assert isinstance(record[name], (int, float)), f"{name} in step {record['step']}"
        assert record["train/rollout_logprob_abs_diff_max"] < 1e-4
        assert "nonfinite" not in record
    assert not set(POLICY_METRICS) & records[0].keys(), "the critic warms up alone"
    for record in records[1:]:
        assert set(POLICY_METRICS) <= record.keys()


def assert_files(folder: Path) -> None:
    assert sorted(p.name for p in (folder / "rollouts").iterdir()) == [f"step_{i:06d}.parquet" for i in (1, 2, 3)]
    table = pq.read_table(folder / "rollouts" / "step_000002.parquet")
    assert table.num_rows == 32
    assert {*schema.EXPERIENCE.names, "prompt", "response", "score/reward_model", "values"} <= {*table.column_names}
    assert set(table["group_id"].to_pylist()) == set(range(32, 64)), "the second batch of the prompt stream"
    assert {v for row in table["policy_version"].to_pylist() for v in row} == {1}
    for name in ("sft", "policy", "checkpoints/step_000003/policy"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / name))
    assert [Path(p).name for p in complete(folder / "checkpoints")] == ["step_000002", "step_000003"]
    assert verify(folder / "checkpoints" / "step_000003")["step"] == 3
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e.get("name") == "process_name"}
    assert {"driver", "generator 0", "policy 0", "critic 0"} <= names
    assert starting(events) >= {
        ("driver", "connect"), ("driver", "prepare_model"), ("driver", "start"),
        *((name, part) for name in names - {"driver"} for part in ("python", "import", "start")),
    }  # fmt: skip
    assert "<html" in (folder / "report.html").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 3


def starting(events: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Who spent time on what, among other things on its start."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    return {(names[e["pid"]], e["name"]) for e in events if e["ph"] == "X"}


# More processes, same numbers


def step_one(job: Job) -> list[dict[str, Any]]:
    table = pq.read_table(job.folder / "rollouts" / "step_000001.parquet")
    return table.sort_by([("group_id", "ascending"), ("sample_index", "ascending")]).to_pylist()


@pytest.mark.slow
def test_two_generators_and_two_ranks_do_what_one_does(start: Callable[..., Job], config: str) -> None:
    one = start("--config", config, "train.steps=1", folder="one").wait()
    assert one.code == 0, one.output
    both = ["generator={replicas: 2, cpus: 0.2}", "policy.learner={ranks: 2, zero_stage: 2, cpus: 0.2}"]
    two = start("--config", config, "train.steps=1", *both, folder="two").wait()
    assert two.code == 0, two.output

    a, b = step_one(one), step_one(two)
    assert [r["response_ids"] for r in a] == [r["response_ids"] for r in b]
    assert len({tuple(r["response_ids"]) for r in a}) > 20, "samples differ from one another"
    assert [r["score"] for r in a] == [r["score"] for r in b]
    for x, y in zip(a, b, strict=True):
        assert "old_logprobs" not in x, "the only optimizer step has them itself"
        for column in ("rollout_logprobs", "ref_logprobs", "advantages"):
            assert x[column] == pytest.approx(y[column], abs=1e-4), column
    [x], [y] = one.metrics("ppo"), two.metrics("ppo")
    for name in ("policy_loss", "loss", "kl", "entropy", "grad_norm"):
        assert x[f"train/{name}"] == pytest.approx(y[f"train/{name}"], abs=1e-4), name
    for job in (one, two):
        assert job.metrics("ppo")[0]["train/rollout_logprob_abs_diff_max"] < 1e-4
    trained = AutoModelForCausalLM.from_pretrained(two.folder / "policy")
    initial = dict(AutoModelForCausalLM.from_pretrained(Path(config).parent).named_parameters())
    for name, weight in trained.named_parameters():
        assert (weight - initial[name]).abs().max().item() > 1e-4, f"{name} was trained"


# Signals


@pytest.mark.slow  # test_resume.py has a shorter one
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_finished_summary_and_no_process(
    number: signal.Signals, start: Callable[..., Job], config: str
) -> None:
    job = start("--config", config, "train.steps=1000")
    deadline = time.monotonic() + 300
    while not job.metrics("ppo"):
        assert job.process.poll() is None, job.wait().output
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert len(job.processes()) > 5, "the mark finds the run's processes"
    job.process.send_signal(number)
    job.wait(60)
    assert job.code == 130, job.output
    assert "Traceback" not in job.output
    assert job.summary["status"] == "interrupted"
    assert 1 <= job.summary["steps"] < 1000
    assert (job.folder / "report.html").exists()
    json.loads((job.folder / "trace.json").read_text())
    job.assert_nothing_left()


@pytest.mark.parametrize("target", [os.kill, pytest.param(os.killpg, marks=pytest.mark.slow)])
def test_a_signal_while_the_driver_waits(
    target: Callable[[int, int], None], start: Callable[..., Job], config: str
) -> None:
    """As nearly always: it is in ``ray.get``. ``timeout`` and batch systems signal the whole group, Ray included."""
    job = start("--config", config, "recipe=sft", "sft.epochs=100000", "data.world.demonstrations=64")
    while not job.metrics("sft"):
        assert job.process.poll() is None, job.wait().output
        time.sleep(0.5)
    target(job.process.pid, signal.SIGTERM)
    job.wait(60)
    assert job.code == 130, job.output
    assert job.summary["status"] == "interrupted"
    assert job.summary["error"] == "SIGTERM"
    job.assert_nothing_left()


@pytest.mark.slow
def test_a_signal_while_the_processes_start(start: Callable[..., Job], config: str) -> None:
    job = start("--config", config)
    while not (job.folder / "logs" / "generator-0.log").exists():
        assert job.process.poll() is None, job.wait().output
        time.sleep(0.2)
    job.process.send_signal(signal.SIGTERM)
    job.wait(60)
    assert job.code == 130, job.output
    assert job.summary["status"] == "interrupted"
    job.assert_nothing_left()


# Failures


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["reward.components=[{function: 'no_such_module:f'}]"],
            "reward.components[0].function=no_such_module:f: no such module",
        ),
        (["model.path=./nowhere"], "model.path=./nowhere: no folder with a config.json there"),
        (["policy.learner.cpus=64"], "stage ppo needs 64."),
    ],
    ids=["module", "model folder", "too few CPUs"],
)
def test_what_can_be_seen_before_anything_is_loaded(
    overrides: list[str], message: str, start: Callable[..., Job], config: str
) -> None:
    job = start("--config", config, *overrides).wait(120)
    job.assert_failed(2, message)
    assert job.summary["status"] == "failed"
    assert message in job.summary["error"]


def test_a_port_in_use(start: Callable[..., Job], config: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = start("--config", config, f"run.prometheus_port={port}").wait(120)
    job.assert_failed(2, f"run.prometheus_port={port}: cannot listen on 127.0.0.1:{port}")
    assert job.summary["status"] == "failed"


def test_a_faulty_row_is_fatal_where_the_config_says_so(start: Callable[..., Job], tmp_path: Path) -> None:
    rows = [{"prompt": "Count to three.", "response": "1 2 3"}] * 3
    lines = [json.dumps({"messages": [{"role": "user", "content": r["prompt"]},
                                      {"role": "assistant", "content": r["response"]}]}) for r in rows]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("\n".join([*lines, '{"messages": "hello"}', *lines]) + "\n")
    job = start(
        *PIPELINE[:1],
        "recipe=sft",
        "data={format: messages, train: chat.jsonl, on_bad_row: fail}",
        f"data.dir={tmp_path}",
        "cluster={local_cpus: 2, object_store_mb: 100}",
    ).wait(120)
    job.assert_failed(2, "chat.jsonl:4: 'messages' must be a list of {role, content}, got 'hello'")
    assert job.summary["status"] == "failed"


@pytest.mark.slow
def test_a_reward_function_that_raises(start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, "reward.components=[{name: mine, function: 'my_rewards:broken'}]").wait(300)
    job.assert_failed(2, "reward 'mine': my_rewards:broken raised KeyError: 'no such family'")
    assert job.summary["status"] == "failed"
    assert "KeyError" in (job.folder / "logs" / "driver.log").read_text(), "the traceback is in the log"
