"""Seconds from the command to the first rollout, by part and process.

    python -m benchmarks.startup
    python -m benchmarks.startup --policy SFT_FOLDER --reward-model REWARD_MODEL_FOLDER

``python -m rlhf_dist.main recipe=ppo`` with the models and processes of the embedded default. ``command`` is the time
until the reward model gets the first chunk of responses; the parts come from the run's ``trace.json``:

python      from the start of the process to the first line of ours: the interpreter, Ray, what the class imports
connect     a Ray cluster of its own
import      torch, vLLM, DeepSpeed
start       loading the model, building the engine
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.asynchrony import random_policy
from benchmarks.program import run_program
from benchmarks.results import Report, Run
from rlhf_dist.config_io import load

GOAL = 25
#: What a process does before its work.
STARTING = ("python", "import", "start")
REPORT = Report("startup", case=("process", "part"), figures=("begins", "seconds"))


def main() -> None:
    parser = REPORT.parser(__doc__, repetitions=5)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policy", help="default: a random one of the embedded default's shape")
    parser.add_argument("--reward-model", help="default: the policy with a random head")
    args = parser.parse_args()
    if args.table:
        runs = REPORT.read(args)
        REPORT.show(runs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            policy = args.policy or str(random_policy(Path(folder) / "policy", load(None, []).model.architecture))
            options = options_of(policy, args.reward_model or policy)
            repetitions = 1 if args.small else args.repetitions
            runs = [run for i in range(repetitions) for run in measure(Path(folder) / f"run-{i}", options, i)]
        REPORT.finish(runs, {"options": [o.replace(policy, "POLICY") for o in options]}, args)
    whole = [run["seconds"] for run in runs if run["part"] == "command"]
    Console().print(f"first rollout after {statistics.median(whole):.1f} s (goal {GOAL}): {sorted(whole)}")


def options_of(policy: str, reward_model: str) -> list[str]:
    return [
        "recipe=ppo",
        f"model.path={policy}",
        "model.architecture={}",
        f"reward.components=[{{name: reward_model, model: {reward_model}}}]",
        "train.steps=1",
        "critic.warmup_steps=0",
        "run.checkpoint_every=0",
    ]


def measure(folder: Path, options: Sequence[str], repetition: int) -> list[Run]:
    """One run; when each part of its start began, in seconds after the command, and how long it took."""
    events = json.loads((run_program(folder, options) / "trace.json").read_text())["traceEvents"]
    return [
        {"process": process, "part": part, "repetition": repetition, "begins": start, "seconds": end - start}
        for process, part, start, end in parts(events)
    ]


def parts(events: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
    """Process, part, begin and end: the whole, and all that ended before the first responses were scored.

    A trace begins with its earliest span, which is the start of the driver's process.
    """
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = [
        (names[e["pid"]], e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events if e.get("ph") == "X"
    ]
    first = min(start for process, part, start, _ in spans if process == "reward" and part not in STARTING)
    yield "all", "command", 0.0, first
    yield from sorted((span for span in spans if span[3] <= first), key=lambda span: span[2])


if __name__ == "__main__":
    main()
