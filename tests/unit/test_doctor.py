"""The doctor's judgement: from what was found on which node to findings; and the probes that need no cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config_io import load
from rlhf_dist.doctor import judge, probes
from rlhf_dist.doctor.judge import GB, REQUIRED, Finding
from rlhf_dist.doctor.probes import Machine
from rlhf_dist.doctor.resources import judge_resources, place
from rlhf_dist.main import main
from rlhf_dist.planner import Role

VERSIONS = dict.fromkeys(REQUIRED, "1.0")
MACHINE = Machine(
    memory=64 * GB,
    memory_available=50 * GB,
    shm=32 * GB,
    store=16 * GB,
    store_folder="/dev/shm",
    temp="/tmp/ray",
    temp_free=100 * GB,
    temp_size=200 * GB,
    open_files=65536,
    ports=(32768, 60999),
)
GPU = {"name": "H200", "bytes": 140 * GB, "free": 139 * GB}
GPUS = {"devices": [GPU, GPU], "driver": "570.86", "cuda": "12.8", "nccl": "2.27.5"}


def one(findings: list[Finding]) -> tuple[str, str]:
    [finding] = findings
    return finding.level, str(finding)


# What the machines say of themselves


def test_what_all_nodes_have_is_said_once() -> None:
    assert judge.spread({"a": 1}) == "1 on a"
    assert judge.spread({"a": 1, "b": 1}) == "1 on all nodes"
    assert judge.spread({"a": 1, "b": 2, "c": 1}) == "1 on a, c; 2 on b"


def test_equal_versions_are_shown_once() -> None:
    level, text = one(judge.versions({"a": VERSIONS, "b": VERSIONS}))
    assert level == "ok"
    assert "torch 1.0" in text


def test_a_version_that_differs_is_named_with_its_nodes() -> None:
    level, text = one(judge.versions({"a": VERSIONS, "b": VERSIONS | {"torch": "2.0"}, "c": VERSIONS}))
    assert level == "fault"
    assert text.startswith("torch differs: 1.0 on a, c; 2.0 on b. ")


def test_a_library_that_is_missing_somewhere_or_everywhere() -> None:
    without = {name: v for name, v in VERSIONS.items() if name != "vllm"}
    assert one(judge.versions({"a": VERSIONS, "b": without}))[1].startswith("vllm differs: 1.0 on a; none on b")
    assert one(judge.versions({"a": without, "b": without}))[1].startswith("vllm is installed nowhere")


def test_other_source_code_is_a_fault() -> None:
    found = {"a": VERSIONS, "b": VERSIONS | {"source of rlhf_dist": "abc"}}
    assert one(judge.versions(found))[1].startswith("source of rlhf_dist differs: 1.0 on a; abc on b")


def test_the_versions_of_this_machine_have_all_that_is_compared() -> None:
    assert set(REQUIRED) <= probes.versions().keys()


def test_a_file_that_some_nodes_lack() -> None:
    assert one(judge.files({"a": [], "b": []}))[0] == "ok"
    level, text = one(judge.files({"a": [], "b": ["data.train=x: no such file"]}))
    assert level == "fault"
    assert "data.train=x: no such file (on b)" in text
    both = judge.files({"a": ["data.train=x: no such file"], "b": ["data.train=x: no such file"]})
    assert "(on every node)" in one(both)[1]


def test_a_folder_is_judged_by_each_node() -> None:
    assert one(judge.folder("run.root", "/runs", {"a": ""})) == ("ok", "/runs: writable")
    assert one(judge.folder("run.root", "/runs", {"a": "", "b": ""}))[1].startswith("/runs: the same folder on 2 nodes")
    level, text = one(judge.folder("run.root", "/runs", {"a": "", "b": "does not see it"}))
    assert level == "fault"
    assert text.startswith("/runs: b does not see it. All nodes must mount")


def test_a_store_needs_its_package_on_every_node() -> None:
    assert one(judge.url("run.checkpoint_dir", "s3://b", {"a": "", "b": ""}))[0] == "ok"
    level, text = one(judge.url("run.checkpoint_dir", "s3://b", {"a": "", "b": "Install s3fs to access S3"}))
    assert level == "fault"
    assert text.startswith("s3://b: Install s3fs to access S3 on b. ")


@pytest.mark.parametrize(
    ("free", "needed", "level"),
    [(100, None, "ok"), (1, None, "warning"), (100, 90, "ok"), (100, 99, "warning"), (100, 200, "warning")],
)
def test_free_disk_against_the_checkpoints(free: int, needed: int | None, level: str) -> None:
    assert one(judge.disk("run.root", "/runs", free * GB, needed and needed * GB))[0] == level


@pytest.mark.parametrize(
    ("check", "change", "text"),
    [
        (judge.shared_memory, {"store_folder": "/tmp", "shm": GB}, "b: Ray keeps its object store of 16.0 GB in /tmp"),
        (judge.memory, {"memory_available": 3 * GB}, "b: 3.0 of 64.0 GB are left"),
        (judge.temp, {"temp_free": 5 * GB}, "b: /tmp/ray has 5.0 of 200.0 GB free"),
        (judge.temp, {"temp_free": GB, "temp_size": 10 * GB}, "b: /tmp/ray has 1.0 of 10.0 GB free"),
        (judge.open_files, {"open_files": 1024}, "b: a process may open 1024 files. Raise it before ray start"),
    ],
)
def test_a_node_that_has_too_little_is_named(check: Any, change: dict[str, Any], text: str) -> None:
    assert one(check({"a": MACHINE, "b": MACHINE}))[0] == "ok"
    level, found = one(check({"a": MACHINE, "b": replace(MACHINE, **change)}))
    assert level == "warning"
    assert found.startswith(text)


def test_clocks_differ_when_the_measurement_cannot_explain_it() -> None:
    assert one(judge.clock({"a": (0.001, 0.002), "b": (-1.5, 0.6)}))[0] == "ok"
    level, text = one(judge.clock({"a": (0.001, 0.002), "b": (-1.5, 0.01)}))
    assert level == "warning"
    assert text.startswith("b is 1.500 s behind the driver (±0.010 s)")


def test_ports_are_judged_in_both_directions() -> None:
    ranges = {"a": (32768, 60999), "b": (40000, 50000)}
    assert one(judge.ports({"a": {}, "b": {}}, ranges))[0] == "ok"
    level, text = one(judge.ports({"a": {}, "b": {"a": "10.0.0.1:40000: timed out"}}, ranges))
    assert level == "fault"
    assert text.startswith("b does not reach a at 10.0.0.1:40000: timed out. ")
    assert "32768 to 60999 on a; 40000 to 50000 on b" in text


def test_gpus() -> None:
    level, text = one(judge.gpus({"a": GPUS, "b": GPUS}, {"a": 2, "b": 2}))
    assert (level, text) == ("ok", "2 x H200 of 140 GB on all nodes; driver 570.86, CUDA 12.8, NCCL 2.27.5")
    level, text = one(judge.gpus({"a": GPUS | {"devices": []}}, {"a": 2}))
    assert level == "fault"
    assert "Ray has 2 GPUs there, torch sees 0" in text
    busy = GPUS | {"devices": [GPU, GPU | {"free": 70 * GB}]}
    assert one(judge.gpus({"a": busy}, {"a": 2}))[1].startswith("a: GPU 1 has 70.0 of 140.0 GB free")
    assert one(judge.gpus({"a": GPUS, "b": GPUS | {"nccl": "2.20.0"}}, {"a": 2, "b": 2}))[0] == "fault"
    assert one(judge.gpus({"a": GPUS, "b": GPUS | {"driver": "550.1"}}, {"a": 2, "b": 2}))[0] == "warning"


# What the config asks for

TWO = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}


def fits(*overrides: str, nodes: dict[str, dict[str, float]] = TWO, free: float = 4) -> list[Finding]:
    return judge_resources(load(None, ["recipe=sft", *overrides]), nodes, {"CPU": free})


def test_a_config_that_fits() -> None:
    assert one(fits())[0] == "ok"


def test_a_missing_resource_is_named_with_who_asks_for_it() -> None:
    asked = "sft.learner={ranks: 2, resources: {learner: 1}}"
    level, text = one(fits(asked))
    assert level == "fault"
    assert text.startswith(
        "stage sft needs 2 of the resource learner (sft 2x1), but the cluster has 0. Start nodes with"
    )
    assert "--resources='{\"learner\": 2}'" in text
    assert one(fits(asked, nodes={name: node | {"learner": 1.0} for name, node in TWO.items()}))[0] == "ok"


def test_too_few_cpus_are_a_fault_and_busy_ones_a_warning() -> None:
    level, text = one(fits("sft.learner={ranks: 5}"))
    assert level == "fault"
    assert text.startswith("stage sft needs 5 CPUs (sft 5x1), but the cluster has 4")
    level, text = one(fits(free=1))
    assert level == "warning"
    assert text.startswith("only 1 CPUs and 0 GPUs are free now")


@pytest.mark.parametrize(
    ("processes", "cpus", "resources", "strategy", "text"),
    [
        (2, 2, {}, "PACK", ""),
        (4, 1, {}, "PACK", ""),
        (10, 0.4, {}, "PACK", ""),
        (1, 0, {}, "PACK", ""),
        (1, 3, {}, "PACK", "1 processes of 3 CPU each, and no node holds one"),
        (2, 1.5, {"big": 1}, "PACK", "2 processes of 1.5 CPU and 1 big each, and the nodes hold 1 of them together"),
        (3, 1, {}, "STRICT_PACK", "and no node holds all of them"),
        (3, 1, {}, "STRICT_SPREAD", "and only 2 nodes hold one"),
    ],
)
def test_every_process_needs_a_node(
    processes: int, cpus: float, resources: dict[str, float], strategy: str, text: str
) -> None:
    nodes = {"a": {"CPU": 2.0, "big": 1.0}, "b": {"CPU": 2.0}}
    found = place(Role("sft", "sft", processes, cpus, 0, "", resources), strategy, nodes)
    assert text in found
    assert bool(found) == bool(text)


# Probes that need no cluster


def test_a_folder_is_visited(tmp_path: Path) -> None:
    words = {"driver": "one", "node": "two"}
    assert probes.visit(str(tmp_path), "node", words) == "does not see a file that was written there"
    (tmp_path / "driver").write_text("one")
    assert probes.visit(str(tmp_path), "node", words) == ""
    assert (tmp_path / "node").read_text() == "two"
    (tmp_path / "driver").write_text("another")
    assert probes.visit(str(tmp_path), "node", words) == "reads another content of a file than was written"
    (tmp_path / "driver").write_text("one")
    (tmp_path / "node").unlink()
    (tmp_path / "node").mkdir()
    assert probes.visit(str(tmp_path), "node", words).startswith("cannot write there: ")


def test_a_port_is_reached_when_the_right_process_answers() -> None:
    address, port, word = probes.listen()
    targets = {"it": (address, port, word), "another": (address, port, "other"), "nobody": (address, 1, word)}
    found = probes.reach(targets)
    assert found.keys() == {"another", "nobody"}
    assert found["another"] == f"{address}:{port}: somebody else answers there"


def test_what_a_store_needs_is_named() -> None:
    assert probes.file_system("memory://bucket") == ""
    assert "nix" in probes.file_system("nix://bucket")


def test_a_failure_of_the_program_with_torch_is_its_message() -> None:
    with pytest.raises(RuntimeError, match="invalid literal for int"):
        probes._children([["all_reduce", "zero", *"01234"]], 120)


# Command line


def test_a_mistake_in_the_config_ends_before_ray_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "train.stebs=3"]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err
