"""The doctor on a cluster of two nodes, one of which lacks something, and on a cluster of its own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from rlhf_dist.actors.probe import Probes, nodes

SMALL = ["recipe=sft", "sft.learner={ranks: 2, cpus: 1}"]
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the second node has of its own: a file system that the others do not see is mounted there."""
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def two_nodes(private: Path) -> Iterator[str]:
    """Address of a cluster whose second node has few open files, and its own file system at ``private``."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a node with a file system of its own needs the right to use namespaces (unshare --mount)")
    head = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    start = f"{RAY} start --block --address={cluster.address} --num-cpus=2 --object-store-memory={100 * 2**20}"
    # 0: any port that is free, for there may be more nodes on this machine.
    start += " --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats"
    script = f"mount -t tmpfs tmpfs {private} && ulimit -n 4096 && exec {start}"
    node = subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        deadline = time.monotonic() + 60
        while len(nodes()) < 2:
            assert node.poll() is None, node.communicate()[0]
            assert time.monotonic() < deadline, "the second node did not join within 60 s"
            time.sleep(0.2)
        yield cluster.address
    finally:
        ray.shutdown()
        node.send_signal(signal.SIGTERM)
        node.communicate(timeout=60)
        cluster.shutdown()


def examine(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines of the doctor."""
    command = [sys.executable, "-m", "rlhf_dist.main", "doctor", *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def line(lines: list[str], check: str) -> str:
    [found] = [text for text in lines if text.partition(" ")[2].strip().startswith(f"{check}: ")]
    return found


def test_a_cluster_that_can_hold_the_run(two_nodes: str, tmp_path: Path) -> None:
    code, lines = examine(f"cluster.address={two_nodes}", f"run.root={tmp_path / 'new' / 'runs'}")
    assert code == 0, lines
    for check in ("cluster", "resources", "versions", "files", "clock", "ports", "GPUs", "all-reduce"):
        assert line(lines, check).startswith("ok "), lines
    assert f"joined the cluster at {two_nodes}: 2 nodes, 4 CPUs" in line(lines, "cluster")
    assert any("the same folder on 2 nodes, writable from each" in text for text in lines)
    assert "every node reaches every other" in line(lines, "ports")
    assert "2 ranks on 2 nodes by gloo" in line(lines, "all-reduce")
    assert line(lines, "open files").startswith("warning"), "it stops no run"
    assert "a process may open 4096 files" in line(lines, "open files")
    assert lines[-1].endswith("a run can start")
    assert list(tmp_path.iterdir()) == [], "what the doctor made is gone"


def test_what_is_missing_is_named(two_nodes: str, private: Path) -> None:
    (private / "train.jsonl").touch()
    (second,) = [name for name, node in nodes().items() if node.id != ray.get_runtime_context().get_node_id()]
    asked = "sft.learner={ranks: 2, cpus: 1, resources: {fast: 1}}"
    data = ["data.format=prompts", f"data.dir={private}", "data.train=train.jsonl"]
    code, lines = examine(f"cluster.address={two_nodes}", f"run.root={private}", asked, *data)
    assert code == 1
    faults = [text for text in lines if text.startswith("fault ")]
    assert len(faults) == 3, lines
    assert "stage sft needs 2 of the resource fast (sft 2x1), but the cluster has 0" in line(faults, "resources")
    assert f"data.train=train.jsonl: no such file in {private} (on {second})" in line(faults, "files")
    assert f"{private}: {second} does not see a file that was written there" in line(faults, "run.root")
    assert [file.name for file in private.iterdir()] == ["train.jsonl"]


def test_a_node_that_does_not_answer_is_named_and_not_asked_again(two_nodes: str) -> None:
    first, second = nodes()
    probes = Probes(nodes())
    assert probes.ask(abs, 60, {first: (-1,), second: (-2,)}) == ({first: 1, second: 2}, {})
    answers, reasons = probes.ask(time.sleep, 2, {first: (0,), second: (600,)})
    assert (answers, reasons) == ({first: None}, {second: f"{second}: no answer within 2 s"})
    assert probes.names == [first]
    answers, reasons = probes.ask(int, 60, {first: ("x",), second: ("2",)})
    assert answers == {}
    assert reasons == {first: f"{first}: invalid literal for int() with base 10: 'x'"}


def test_a_cluster_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cluster = "cluster={local_cpus: 2, object_store_mb: 100}"
    code, lines = examine(cluster, f"run.root={tmp_path / 'file' / 'runs'}")
    assert code == 1
    assert "a local cluster, as a run would start it: 1 node, 2 CPUs" in line(lines, "cluster")
    [fault] = [text for text in lines if text.startswith("fault ")]
    assert f"run.root: the driver cannot write to {tmp_path / 'file' / 'runs'}: " in fault
    assert "2 ranks on 1 node by gloo" in line(lines, "all-reduce")
    assert lines[-1].endswith("a run would be stopped")


def test_an_address_where_nobody_answers() -> None:
    code, lines = examine("cluster.address=127.0.0.1:1")
    assert code == 1
    said = "fault    cluster: the cluster at 127.0.0.1:1 cannot be joined: nobody answers at 127.0.0.1:1"
    assert line(lines, "cluster").startswith(said)
