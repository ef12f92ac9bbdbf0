"""Runs of the program as people start it, for the integration tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from tiny import LLAMA

from rlhf_dist.observability.metrics import read_metrics

MARK = "RLHF_DIST_TEST"
# Heads of 32: vLLM's attention on CPUs takes no smaller ones.
SMALL = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128, "initializer_range": 0.1}
#: The embedded default, less of it.
SHORTER = [
    "model.architecture={hidden_size: 64, intermediate_size: 128, num_attention_heads: 2, num_key_value_heads: 2}",
    "data.world={demonstrations: 320, comparisons: 160, prompts: 64, test_prompts: 32}",
    "compare={prompts: 32, pairs: 40}",
    "sft.epochs=1",
    "rollout={batch_size: 16, chunk_tokens: 200}",
    "train={steps: 6, batch_size: 16}",
    "critic.warmup_steps=1",
    "evaluation={prompts: 8, n_samples_per_prompt: 1}",
]
REWARDS = """
import time

def length(prompts, responses, fields):
    return [len(r) / 10 for r in responses]

def long_enough(prompts, responses, fields):
    return [float(len(r) > 40) for r in responses]

def constant(prompts, responses, fields):
    return [1.0] * len(prompts)

def broken(prompts, responses, fields):
    raise KeyError("no such family")

batches = 0

def nan_in_step_two(terms):
    global batches
    batches += 1
    advantages = (terms.scores - terms.scores.mean())[:, None] * terms.mask
    if batches == 2:
        advantages[9] = float("nan")
    return advantages, None
"""


class Job:
    """One run of the program in a folder of its own."""

    def __init__(self, folder: Path, arguments: list[str], program: Sequence[str] = ("rlhf_dist.main",)) -> None:
        self.folder = folder / "runs" / "job"
        self.mark = uuid.uuid4().hex
        # A wide terminal, so that messages are not broken into lines.
        environment = {**os.environ, MARK: self.mark, "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
        paths = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.process = subprocess.Popen(
            [sys.executable, "-m", *program, *arguments, f"run.root={folder / 'runs'}", "run.name=job"],
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
        return [r for r in read_metrics(path) if r["stage"] == stage]

    def wait_for_step(self, step: int, seconds: float = 300, stage: str = "ppo") -> Job:
        """Until ``step`` of a stage is logged."""
        deadline = time.monotonic() + seconds
        while not any(r["step"] >= step for r in self.metrics(stage)):
            assert self.process.poll() is None, self.wait().output
            assert time.monotonic() < deadline, f"step {step} did not come within {seconds:g} s"
            time.sleep(0.05)
        return self

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

    def assert_nothing_left(self, seconds: float = 60) -> None:
        """Ray's node mostly ends within 3 seconds of its driver; now and then a process takes more than 20."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert left == [], f"still there after {seconds:g} s: {left}"

    def assert_failed(self, code: int, message: str) -> None:
        assert self.code == code, f"exit code {self.code}\n{self.output}"
        assert message in self.output, self.output
        assert "Traceback" not in self.output
        self.assert_nothing_left()
