"""Runs over three Ray nodes that share no memory and no loopback: ``cluster/namespaces.sh``. Roles are pinned to nodes;
what they exchange goes over the nodes' cables, and is counted there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jobs import REWARDS, SHORTER

from rlhf_dist.data.trained import final_line
from rlhf_dist.observability.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "namespaces.sh"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed"),
]

LEARNER, GENERATOR, SCORER = "node1", "node2", "node0"
PLACES = [
    f"policy.learner.resources={{{LEARNER}: 1}}",
    f"generator.resources={{{GENERATOR}: 1}}",
    f"reference.resources={{{SCORER}: 1}}",
    f"reward.resources={{{SCORER}: 1}}",
]
DEFAULT = [*SHORTER, *(f"{stage}.learner.resources={{{LEARNER}: 1}}" for stage in ("sft", "reward_model", "critic"))]


class Outcome:
    """Of a run over nodes."""

    def __init__(self, folder: Path, done: subprocess.CompletedProcess[str]) -> None:
        self.output = done.stdout
        assert done.returncode == 0, self.output
        report = json.loads((folder / "report.json").read_text())
        self.nodes: dict[str, dict[str, int]] = report["nodes"]
        self.summary: dict[str, Any] = json.loads((folder / "job" / "summary.json").read_text())
        self.steps = [r for r in read_metrics(folder / "job" / "metrics.jsonl") if r["stage"] == "ppo"]

    @property
    def weights(self) -> float:
        """Bytes of one version."""
        return self.steps[0]["weight_sync/bytes"]


def run_on_nodes(folder: Path, *arguments: str, cut: tuple[str, int] | None = None) -> Outcome:
    """``python -m rlhf_dist.main`` on the head of three nodes of two CPUs."""
    (folder / "my_rewards.py").write_text(REWARDS)
    watch = ["--cut", cut[0], str(folder / "job" / "metrics.jsonl"), str(cut[1])] if cut else []
    program = [sys.executable, "-m", "rlhf_dist.main", *arguments, f"run.root={folder}", "run.name=job"]
    paths = [str(folder), str(ROOT), str(ROOT / "tests")]
    cluster = ["bash", str(SCRIPT), "-n", "3", "-c", "2", "-m", "200", "-k", str(folder.parent), "--"]
    counted = [sys.executable, str(ROOT / "tests" / "on_nodes.py"), str(folder / "report.json"), *watch, "--"]
    done = subprocess.run(
        [*cluster, *counted, *program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "1000"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    return Outcome(folder, done)


def test_two_ranks_on_one_node_a_generator_on_another(tmp_path: Path, config: str) -> None:
    options = ["train.steps=6", "policy.learner.ranks=2", "evaluation.prompts=8"]
    found = run_on_nodes(tmp_path, "--config", config, *PLACES, *options)
    assert len(found.steps) == 6
    versions = len(found.steps) + 1
    # Every version of the weights goes from the learners' node to the generator's, every rollout the other way; the
    # scorers on the head read rollouts too.
    assert found.nodes[GENERATOR]["received"] > versions * found.weights
    assert found.nodes[LEARNER]["sent"] > versions * found.weights
    rollouts = sum(file.stat().st_size for file in (tmp_path / "job" / "rollouts").glob("*.parquet"))
    assert rollouts > 0
    assert found.nodes[GENERATOR]["sent"] > rollouts / 4  # Parquet has more columns, and compresses them
    assert found.nodes[SCORER]["received"] > 0


@pytest.mark.slow
def test_the_embedded_default_over_three_nodes(tmp_path: Path) -> None:
    found = run_on_nodes(tmp_path, *DEFAULT, *PLACES)
    assert found.summary["status"] == "finished"
    assert len(found.steps) == 6
    assert found.nodes[GENERATOR]["received"] > 7 * found.weights


@pytest.mark.slow
def test_a_node_that_is_cut_off_in_a_step_is_survived(tmp_path: Path, config: str) -> None:
    """Ray takes about a minute to see it; the generator of the head goes on with the groups of the other."""
    # Only nodes 0 and 2 have room for a generator.
    places = [f"{group}.resources={{{LEARNER}: 1}}" for group in ("policy.learner", "reference", "reward")]
    places += ["generator={replicas: 2, cpus: 1.7}", "train.steps=40"]
    found = run_on_nodes(tmp_path, "--config", config, *places, cut=("2", 2))
    assert found.summary["status"] == "finished"
    assert len(found.steps) == 40
    trained = [row for step in final_line(tmp_path / "job" / "ledger.jsonl") for row in step.rows.values()]
    assert set(Counter(trained).values()) == {5}  # 64 prompts, 40 steps of 8
    assert any(fault["process"].startswith("generator") for fault in found.summary["faults"])
