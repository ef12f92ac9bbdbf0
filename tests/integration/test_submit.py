"""``ray job submit`` from a clean checkout to a cluster with tokens: stopped and gone on with, finished, failed."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import ROOT, Head
from jobs import REWARDS

from rlhf_dist.observability.metrics import read_metrics

RUNTIME_ENV = ROOT / "cluster" / "runtime_env.yaml"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows of this one, as it is now, and a reward function of the user's own."""
    folder = tmp_path_factory.mktemp("checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    started = Head({"RAY_USAGE_STATS_ENABLED": "0"}, {"num-cpus": 2, "object-store-memory": 200 * 2**20})
    yield started
    started.die()


def submit(head: Head, checkout: Path, name: str, *arguments: str, wait: bool = True) -> tuple[int, str]:
    """Exit code and output of the command."""
    words = ["--address", head.address, "--working-dir", str(checkout), "--runtime-env", str(RUNTIME_ENV)]
    words += ["--submission-id", name, "--metadata-json", json.dumps({"experiment": name})]
    words += ["--entrypoint-num-cpus", "0", *([] if wait else ["--no-wait"])]
    done = head.run("ray", "job", "submit", *words, "--", "python", "-m", "rlhf_dist.main", *arguments, seconds=400)
    return done.returncode, done.stdout + done.stderr


def logs(head: Head, name: str) -> str:
    return head.run("ray", "job", "logs", "--address", head.address, name, seconds=60).stdout


def test_a_job_that_was_stopped_is_gone_on_with(head: Head, checkout: Path, config: str, tmp_path: Path) -> None:
    # Only the checkpoint that SIGTERM asks for.
    options = [
        "--config",
        config,
        "train.steps=40",
        "run.checkpoint_every=1000",
        f"run.root={tmp_path}",
        "run.name=job",
    ]
    folder = tmp_path / "job"
    code, output = submit(head, checkout, "first", *options, wait=False)
    assert code == 0, output
    deadline = time.monotonic() + 300
    while not any(r["step"] >= 2 for r in read_metrics(folder / "metrics.jsonl")):
        assert time.monotonic() < deadline, logs(head, "first")
        time.sleep(0.2)
    stopped = head.run("ray", "job", "stop", "--address", head.address, "first", seconds=150)
    assert stopped.returncode == 0, stopped.stderr
    assert head.status("first") == "STOPPED"
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    (manifest,) = (folder / "checkpoints").glob("step_*/manifest.json")
    saved = int(manifest.parent.name.split("_")[1])
    assert 2 <= saved < 40
    text = logs(head, "first")
    assert "SIGTERM: saving after this step" in text
    assert "stopping this job leaves" not in text, "cluster/runtime_env.yaml gives it enough time"

    code, output = submit(head, checkout, "second", *options)
    assert code == 0, output
    assert head.status("second") == "SUCCEEDED"
    assert f"going on after step {saved}" in output
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["stage"] == "ppo"] == list(range(1, 41))
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_a_job_that_fails_says_so_at_the_end(head: Head, checkout: Path, config: str, tmp_path: Path) -> None:
    wrong = submit(head, checkout, "wrong", "--config", config, "train.stepz=4", f"run.root={tmp_path}")
    assert wrong[0] == 1, wrong[1]
    assert head.status("wrong") == "FAILED"
    lines = logs(head, "wrong").strip().splitlines()
    assert lines[-1].startswith("error: "), lines
    assert "train.stepz" in lines[-1]
    assert "Traceback" not in wrong[1]
