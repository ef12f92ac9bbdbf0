"""Threads by CPUs, and no spinning: what every actor gets in its environment before it imports torch.

That it arrives there is in ``tests/integration/test_learners.py``, with a real actor.
"""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from rlhf_dist.actors import group
from rlhf_dist.actors.group import Resources


@pytest.mark.parametrize(("cpus", "threads"), [(0, "1"), (0.3, "1"), (1, "1"), (1.9, "1"), (2, "2"), (8, "8")])
def test_threads_are_whole_cpus_and_at_least_one(cpus: float, threads: str) -> None:
    environment = Resources(cpus).environment("policy-0")
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == threads


def test_threads_wait_without_spinning() -> None:
    environment = Resources(1).environment("policy-0")
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are glibc's")
def test_memory_is_used_again_without_the_kernel() -> None:
    """The activations of a forward pass, which the next one needs again: pages that the kernel had to clear."""
    passes = "import numpy as np, resource\nfor _ in range(40): layers = [np.ones(2**21) for _ in range(8)]\n"
    program = passes + "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    run = lambda env: int(subprocess.run([sys.executable, "-c", program], env=env, check=True, stdout=-1).stdout)
    assert run(Resources(1).environment("policy-0")) < run({}) / 3


def test_every_process_has_its_own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("/" in value for value in Resources(1).environment("policy-0").values())
    monkeypatch.setattr(group, "log_dir", "/runs/x/logs")
    logs = [set(Resources(1).environment(f"policy-{i}").values()) for i in range(2)]
    assert "/runs/x/logs/policy-0.log" in logs[0]
    assert "/runs/x/logs/policy-1.log" in logs[1]


def test_bundles_hold_what_is_asked_for() -> None:
    assert Resources(0.5).bundle() == {"CPU": 0.5}
    assert Resources(1, 2, {"generator": 1}).bundle() == {"CPU": 1, "GPU": 2, "generator": 1}


def test_no_search_for_garbage_while_a_process_imports_nor_in_what_it_imported() -> None:
    """In a process of its own, with nothing else to freeze."""
    code = """
import gc
from rlhf_dist.actors.group import Worker
worker = Worker("policy 0")
try:
    with worker.importing():
        assert not gc.isenabled()
        raise ImportError
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 0, [span["name"] for span in worker.spans()])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "True True ['python', 'import']\n"
