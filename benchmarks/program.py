"""Runs of the program, as a user starts them, and the lines that they write for each step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.observability.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def command_of(root: Path, options: Sequence[str]) -> list[str]:
    """The command of a run whose folder is ``run`` under ``root``."""
    return [sys.executable, "-m", "rlhf_dist.main", *options, f"run.root={root}", "run.name=run"]


def environment() -> dict[str, str]:
    """The caller's, with this checkout's modules."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_program(root: Path, options: Sequence[str]) -> Path:
    """One run to its end; its folder."""
    subprocess.run(command_of(root, options), cwd=ROOT, check=True, env=environment())
    return root / "run"


def ppo_steps(folder: Path) -> list[dict[str, Any]]:
    """What a run says of each step of PPO."""
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["stage"] == "ppo"]
