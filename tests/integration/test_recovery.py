"""Processes of a run are killed: it goes on, and the record says what died."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest
from jobs import MARK, Job

from benchmarks.chaos import processes
from rlhf_dist.data.trained import final_line

OPTIONS = [
    "data.world={prompts: 32, test_prompts: 16}",
    "run={checkpoint_every: 2, wait_limit: 120}",
    "evaluation={prompts: 4, n_samples_per_prompt: 1}",
]


def kill(job: Job, role: str) -> None:
    """The reward crashes, the others are killed."""
    victim = processes(role, MARK, job.mark)[0]
    victim.send_signal(signal.SIGSEGV if role == "reward" else signal.SIGKILL)


def wait_until_it_works_again(job: Job, role: str, seconds: float = 180) -> None:
    path = job.folder / "faults.jsonl"
    deadline = time.monotonic() + seconds
    while not (path.exists() and f'"process": "{role} ' in path.read_text()):
        assert job.process.poll() is None, job.wait().output
        assert time.monotonic() < deadline, f"{role} did not come back within {seconds:g} s"
        time.sleep(0.2)


def assert_nothing_lost(job: Job) -> None:
    """With a staleness of 0: every group in its turn, exactly once."""
    line = final_line(job.folder / "ledger.jsonl")
    assert [s.step for s in line] == list(range(1, len(line) + 1))
    groups = Counter(group for step in line for group in step.rows)
    assert set(groups.values()) == {1}, "no group is trained twice"
    assert sorted(groups) == list(range(8 * len(line))), "and none is lost"
    versions = [json.loads(x)["version"] for x in (job.folder / "ledger.jsonl").read_text().splitlines()]
    assert len(versions) == len(set(versions)), "no version is used twice"


OTHERS = pytest.param(("reference", "experience"), marks=pytest.mark.slow)


@pytest.mark.parametrize("roles", [("generator", "reward", "policy"), OTHERS])
def test_a_run_outlives_its_processes(roles: tuple[str, ...], start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, *OPTIONS, "train.steps=2000", "generator={replicas: 2, cpus: 0.2}")
    job.wait_for_step(3)
    for role in roles:
        kill(job, role)
        wait_until_it_works_again(job, role)
        done = job.metrics("ppo")[-1]["step"]
        job.wait_for_step(done + 2)
    assert job.process.poll() is None, "the run was still going on: the faults came in the middle"
    job.process.send_signal(signal.SIGTERM)
    job.wait(120)
    assert "Traceback" not in job.output, job.output
    faults = job.summary["faults"]
    assert [f["process"].split()[0] for f in faults] == list(roles), faults
    for fault in faults:
        assert fault["away_seconds"] > 0
        said = "Fatal Python error: Segmentation fault" if fault["process"] == "reward 0" else "killed from outside"
        assert said in fault["cause"]
        assert f"{fault['process']} died: " in job.output
        assert f"{fault['process']} works again after " in job.output
    assert_nothing_lost(job)


@pytest.mark.slow
def test_too_many_deaths_end_the_run_with_the_cause(start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, *OPTIONS, "train.steps=1000", "run.max_restarts=0").wait_for_step(2)
    kill(job, "policy")
    job.wait(120)
    job.assert_failed(1, "policy 0 died: the process died")
    assert "run.max_restarts allows 0" in job.output


@pytest.mark.parametrize(
    "role",
    ["reference", *(pytest.param(r, marks=pytest.mark.slow) for r in ("generator", "policy", "reward", "experience"))],
)
def test_a_process_that_is_stopped_is_named_and_replaced(role: str, start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, *OPTIONS, "train.steps=2000", "run.wait_limit=30").wait_for_step(3)
    stopped = processes(role, MARK, job.mark)[0]
    stopped.send_signal(signal.SIGSTOP)
    wait_until_it_works_again(job, role)
    job.wait_for_step(job.metrics("ppo")[-1]["step"] + 2)
    job.process.send_signal(signal.SIGTERM)
    job.wait(120)
    assert "the driver waited 30 s for" in job.output
    named = re.search(rf"{role} 0 \(pid {stopped.pid}\) does not answer: stopped", job.output)
    assert named, job.output
    assert "answers: " in job.output, "the others do"
    assert f"{role} 0 died: " in job.output
    assert not stopped.is_running()


@pytest.mark.slow
def test_a_hang_ends_the_run_where_that_is_wanted(start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, *OPTIONS, "train.steps=2000", "run={wait_limit: 30, on_hang: fail}")
    stopped = processes("reward", MARK, job.wait_for_step(3).mark)[0]
    stopped.send_signal(signal.SIGSTOP)
    job.wait(120)
    job.assert_failed(1, f"reward 0 (pid {stopped.pid}) does not answer: stopped")
    assert job.summary["error"].startswith("WaitLimitExceeded: the driver waited 30 s for")


@pytest.mark.slow
def test_a_node_that_is_lost(start: Callable[..., Job], config: str) -> None:
    """A generator on each of two nodes: the run goes on with one, and takes in the other when its node is replaced."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    try:
        node = {"num_cpus": 1, "resources": {"gen": 1}, "object_store_memory": 100 * 2**20}
        nodes = [cluster.add_node(**node) for _ in range(2)]
        generators = "generator={replicas: 2, cpus: 0.2, resources: {gen: 1}}"
        options = [*OPTIONS, "train.steps=2000", generators, f"cluster.address={cluster.address}"]
        job = start("--config", config, *options, "cluster.placement=SPREAD").wait_for_step(3)
        cluster.remove_node(nodes[0], allow_graceful=False)
        without = job.metrics("ppo")[-1]["step"]
        job.wait_for_step(without + 10)
        cluster.add_node(**node)
        wait_until_it_works_again(job, "generator")
        job.wait_for_step(job.metrics("ppo")[-1]["step"] + 5)
        job.process.send_signal(signal.SIGTERM)
        job.wait(120)
    finally:
        cluster.shutdown()
    assert job.code == 130, job.output
    assert re.search(r"generator [01] died: ", job.output), job.output
    assert_nothing_lost(job)
