"""The program as people start it: ``python -m rlhf_dist.main``, its run folder, its exit codes, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import LLAMA
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist import schema
from rlhf_dist.checkpoint import complete, verify
from rlhf_dist.data.tokenization import save_tokenizer
from rlhf_dist.data.world import build_tokenizer
from rlhf_dist.models import build_policy

MARK = "RLHF_DIST_TEST"
# Heads of 32: vLLM's attention on CPUs takes no smaller ones.
SMALL = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128, "initializer_range": 0.1}
REWARDS = """
import time

def length(prompts, responses, fields):
    return [len(r) / 10 for r in responses]

def broken(prompts, responses, fields):
    raise KeyError("no such family")
"""


class Job:
    """One run of the program in a folder of its own."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder = folder / "runs" / "job"
        self.mark = uuid.uuid4().hex
        # A wide terminal, so that messages are not broken into lines.
        environment = {**os.environ, MARK: self.mark, "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_dist.main", *arguments, f"run.root={folder / 'runs'}", "run.name=job"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""

    def wait(self, seconds: float = 400) -> Job:
        try:
            self.output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            state = "still running" if self.process.poll() is None else "gone, but something holds its output open"
            raise AssertionError(f"after {seconds:g} s: {state}; {self.processes()}; output {error.output!r}") from None
        return self

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [r for r in records if r["stage"] == stage]

    def processes(self) -> list[str]:
        """Every process that inherited this run's environment, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def assert_nothing_left(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert left == []

    def assert_failed(self, code: int, message: str) -> None:
        assert self.code == code, self.output
        assert message in self.output
        assert "Traceback" not in self.output
        self.assert_nothing_left()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a run; whatever the test does, its processes end with the test."""
    jobs: list[Job] = []

    def begin(*arguments: str, folder: str = "job") -> Job:
        place = tmp_path / folder
        place.mkdir()
        (place / "my_rewards.py").write_text(REWARDS)
        jobs.append(Job(place, list(arguments)))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGTERM)
            job.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy with the world's tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, str(folder))
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    build_policy(SMALL, len(tokenizer), special, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(policy: Path) -> str:
    """GRPO with a Python function: the smallest run with every part but the critic."""
    tree = {
        "recipe": "ppo",
        "model": {"path": str(policy)},
        "data": {"format": "world", "world": {"prompts": 64, "test_prompts": 32}},
        "rollout": {
            "batch_size": 8,
            "n_samples_per_prompt": 4,
            "max_prompt_length": 48,
            "max_response_length": 12,
            "chunk_tokens": 60,
        },
        "algo": {"advantage_estimator": "grpo", "kl_estimator": "k3", "use_kl_loss": True},
        "train": {"steps": 2, "batch_size": 32, "micro_batch_tokens": 400},
        "policy": {"learner": {"cpus": 0.2}, "optim": {"lr": 1e-3, "schedule": "constant", "warmup_ratio": 0}},
        "reference": {"cpus": 0.1},
        "reward": {"cpus": 0.1, "components": [{"name": "length", "function": "my_rewards:length"}]},
        "generator": {"cpus": 0.2},
        "evaluation": {"prompts": 8, "greedy": False},
        "cluster": {"local_cpus": 2, "object_store_mb": 100},
        "run": {"wait_limit": 300},
    }
    file = policy / "grpo.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


# The whole pipeline

PIPELINE = [
    "model.architecture={hidden_size: 64, intermediate_size: 128, num_attention_heads: 2, num_key_value_heads: 2}",
    "data.world={demonstrations: 640, comparisons: 320, prompts: 96, test_prompts: 32, sampled_pairs: 0.25}",
    "sft={epochs: 1, learner: {ranks: 1}}",
    "reward_model={epochs: 1, learner: {ranks: 1}}",
    "rollout.batch_size=32",
    "rollout.chunk_tokens=200",
    "train={steps: 3, batch_size: 16, epochs: 2}",
    "critic.warmup_steps=1",
    "evaluation={prompts: 16, n_samples_per_prompt: 2}",
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
        assert abs(summary["eval"][stage]["kl"]) < 5
    assert summary["eval"]["sft"]["kl"] == pytest.approx(0, abs=1e-3), "the SFT policy is its own reference"
    assert 0 <= summary["weight_sync"]["max_canary_diff"] < 1e-4
    assert summary["rows_skipped"] == 0


def assert_metrics(job: Job) -> None:
    assert len(job.metrics("sft")) == 20
    assert len(job.metrics("reward_model")) == 10
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
    assert [p.name for p in complete(folder / "checkpoints")] == ["step_000002", "step_000003"]
    assert verify(folder / "checkpoints" / "step_000003")["step"] == 3
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e.get("name") == "process_name"}
    assert {"driver", "generator 0", "policy 0", "critic 0"} <= names
    assert "<html" in (folder / "report.html").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 3


# More processes, same numbers


def step_one(job: Job) -> list[dict[str, Any]]:
    table = pq.read_table(job.folder / "rollouts" / "step_000001.parquet")
    return table.sort_by([("group_id", "ascending"), ("sample_index", "ascending")]).to_pylist()


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
        for column in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages"):
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


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
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


def test_a_run_folder_that_exists(start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, "model.path=./nowhere").wait(120)
    again = Job(job.folder.parents[1], ["--config", config]).wait(120)
    again.assert_failed(2, f"{job.folder} holds a run already; choose another name or remove it")


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
