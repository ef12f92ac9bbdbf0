"""What a checkpoint costs: how long it holds the step, beside a plain copy of the same bytes; how long writing takes.

    python -m benchmarks.saving                     # 18 MB and 500 MB of weights, with critic-free optimizer states
    python -m benchmarks.saving --steps             # seconds of PPO steps with and without checkpoints

One learner rank, float32, ZeRO-2. The state is weights, master weights and two moments, and the exported policy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks.asynchrony import COMMON, GRPO, MODEL, ONE, OVERLAP, random_policy, run, seconds_per_step
from benchmarks.machine import describe
from benchmarks.weight_sync import SECONDS, SIZES, copy_seconds

RESULTS = Path(__file__).parent / "results" / "saving.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[18, 500], choices=list(SIZES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="whole steps instead")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = describe()
    if args.steps:
        results["steps"] = whole_steps(args.repetitions)
    else:
        results["saves"] = [r for mb in args.sizes for r in measure(mb, args.repetitions)]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def measure(mb: int, repetitions: int) -> list[dict[str, Any]]:
    """Seconds of the copy, which holds the step, and until everything is written; the first save is left out."""
    import ray

    from rlhf_dist import checkpoint
    from rlhf_dist.actors.learner import LearnerGroup
    from rlhf_dist.actors.learner_spec import LearnerSpec
    from rlhf_dist.config import LearnerConfig, ModelConfig, OptimConfig

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    runs = []
    hidden, layers = SIZES[mb]
    model = MODEL | {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
    }
    with tempfile.TemporaryDirectory() as folder:
        policy = random_policy(Path(folder) / "policy", model)
        spec = LearnerSpec(
            role="policy",
            model_path=str(policy),
            head="policy",
            objective="sft",
            model=ModelConfig(path=str(policy)),
            learner=LearnerConfig(zero_stage=2),
            optim=OptimConfig(),
            micro_batch_tokens=1000,
        )
        ids = pa.array([[1, 2, 3, 4]] * 4, pa.list_(pa.int32()))
        table = pa.table({"prompt_ids": ids, "response_ids": ids})
        learner = LearnerGroup(spec, "PACK", SECONDS).start()
        learner.wait_ready()
        for i in range(repetitions + 1):
            learner.update(table, [np.arange(4)]).steps()
            copied, written = learner.save(f"{folder}/step_{i:06d}", str(policy))
            seconds = ray.get(copied)[0]
            files = checkpoint.merged(ray.get(written))
            nbytes = sum(about["bytes"] for about in files.values())
            checkpoint.remove(f"{folder}/step_{i:06d}")
            copies = {"copy_fresh": copy_seconds(nbytes), "copy_used": copy_into_used(nbytes)}
            runs.append({"mb": mb, "bytes": nbytes, "hold": seconds, **copies})
    ray.shutdown()
    return runs[1:]


def copy_into_used(nbytes: int) -> float:
    """A memcpy into memory that was written to before, which is what a snapshot after the first does."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    started = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - started


def whole_steps(repetitions: int) -> list[dict[str, Any]]:
    """GRPO steps, in turns, without checkpoints and with one every 20 steps, which is the default."""
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy = random_policy(folder / "policy", MODEL)
        base = [*COMMON, f"model.path={policy}", *GRPO, *OVERLAP, *ONE, "train.steps=60"]
        for _ in range(repetitions):
            for every in (0, 20):
                lines = run(folder, "steps", [*base, f"run.checkpoint_every={every}"])
                total = (lines[-1]["time"] - lines[0]["time"]) / (len(lines) - 1)
                runs.append({"checkpoint_every": every, "step": total, "median_step": seconds_per_step(lines)})
    return runs


def show(results: dict[str, Any]) -> None:
    console = Console()
    if "saves" in results:
        columns = ("hold", "copy_fresh", "copy_used")
        names = ("hold, ms", "copy to fresh memory, ms", "to used memory, ms", "hold / copy to used memory")
        table = Table("MB of weights", "MB of state", *names, title="medians")
        for mb in dict.fromkeys(r["mb"] for r in results["saves"]):
            part = [r for r in results["saves"] if r["mb"] == mb]
            median = {k: statistics.median(r[k] for r in part) for k in ("bytes", *columns)}
            cells = [f"{median['bytes'] / 1e6:,.0f}", *(f"{1000 * median[k]:,.0f}" for k in columns)]
            table.add_row(str(mb), *cells, f"{median['hold'] / median['copy_used']:.2f}")
        console.print(table)
    if "steps" in results:
        median_of = lambda every: statistics.median(
            r["step"] for r in results["steps"] if r["checkpoint_every"] == every
        )
        without, with_ = median_of(0), median_of(20)
        console.print(f"mean step {without:.3f} s without checkpoints, {with_:.3f} s with: {with_ / without - 1:+.1%}")


if __name__ == "__main__":
    main()
