"""Memory as ``--dry-run`` predicts it, against the peak of each process in a run.

    python -m benchmarks.memory                      # five configs with 1 GB of state or more, about ten minutes
    python -m benchmarks.memory --only sft_zero3

Measured is the peak of resident memory without what is shared, the largest process of each kind, above what a process
mostly holds in a run of the same config with a model of next to nothing: what the libraries take. Of the object
store, the pages of its file that were ever written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.asynchrony import GRPO, MODEL, random_policy
from benchmarks.machine import describe
from benchmarks.results import Rows, print_rows

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "memory.json"
MARK = "RLHF_DIST_MEMORY"
#: Actor's class -> how the plan calls what it is.
KINDS = {"LearnerWorker": "learner", "Generator": "generator", "Reference": "reference"}
PERIOD = 0.3
STORE = 2 * 10**9


def model(hidden: int, layers: int) -> dict[str, Any]:
    heads = max(2, hidden // 64)
    return MODEL | {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


TINY = model(64, 1)
SUPERVISED = [
    "recipe=sft",
    "data.world.demonstrations=192",
    # Rows that are shorter than max_length fill a micro-batch all the same.
    "sft={epochs: 1, batch_size: 64, micro_batch_tokens: 640, max_length: 40, eval_rows: 64}",
]
PPO = [
    "recipe=ppo",
    "critic.warmup_steps=0",
    "rollout={batch_size: 8, max_prompt_length: 14, max_response_length: 24}",
    "train={steps: 3, batch_size: 32}",
    "evaluation={prompts: 8, n_samples_per_prompt: 1, greedy: false, metrics: [], group_by: null}",
    "run.checkpoint_every=1",
    "generator.kv_cache_gb=0.06",  # which 32 sequences and the canary nearly fill
    *GRPO,
]
GROUPS = "rollout.n_samples_per_prompt=4"
LARGE, SMALLER = (768, 8), (640, 8)
#: Name -> the model (hidden size, layers), the options, and the name in the table.
CONFIGS: dict[str, tuple[tuple[int, int], list[str], str]] = {
    "sft_zero2": (LARGE, [*SUPERVISED, "sft.learner={ranks: 1, zero_stage: 2}"], "SFT, float32, ZeRO-2"),
    "sft_zero2_bfloat16": (
        LARGE,
        [*SUPERVISED, "model.dtype=bfloat16", "sft.learner={ranks: 2, zero_stage: 2}"],
        "SFT, bfloat16, ZeRO-2, two ranks",
    ),
    "sft_zero3": (LARGE, [*SUPERVISED, "sft.learner={ranks: 2, zero_stage: 3}"], "SFT, float32, ZeRO-3, two ranks"),
    "grpo": (
        LARGE,
        [*PPO, GROUPS, "algo={advantage_estimator: grpo, kl_coef: 0.05}"],
        "GRPO, float32, ZeRO-1",
    ),
    "ppo_bfloat16": (
        SMALLER,
        [*PPO, GROUPS, "model.dtype=bfloat16", "rollout.max_staleness=1"],
        "PPO, bfloat16, ZeRO-1, S = 1",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    results["machine"] = describe()
    for name in args.only:
        size, options, _ = CONFIGS[name]
        with tempfile.TemporaryDirectory() as folder:
            found = compare(Path(folder), size, options)
        kept = [run for run in results["runs"] if run["config"] != name]
        results["runs"] = kept + [{"config": name, "process": kind, **figures} for kind, figures in found.items()]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print_rows(rows(results["runs"]))


def compare(folder: Path, size: tuple[int, int], options: list[str]) -> dict[str, dict[str, float]]:
    """Predicted and measured bytes, by kind of process, and of the object store."""
    large = prepared(folder / "large", model(*size), options)
    small = prepared(folder / "small", TINY, [*options, "generator.kv_cache_gb=0.02"])
    base, found = measure(folder / "small", small)[1], measure(folder / "large", large)[0]
    planned, program = predicted(large), predicted(small)
    return {
        kind: {"predicted": planned[kind] - program[kind], "measured": found[kind] - base[kind], "base": base[kind]}
        for kind in planned
    }


def prepared(folder: Path, shape: dict[str, Any], options: list[str]) -> list[str]:
    """The options of a run with a random model of this shape."""
    return [*options, "model.architecture={}", f"model.path={random_policy(folder / 'policy', shape)}"]


def predicted(options: list[str]) -> dict[str, float]:
    """Bytes of the largest process of each kind, and of the object store, as planned."""
    from rlhf_dist.config_io import load
    from rlhf_dist.needs import needs, object_store, sent_parameters

    cfg = load(None, options)
    found: dict[str, float] = defaultdict(float)
    for need in needs(cfg):
        kind = need.role.role if need.role.role in KINDS.values() else "learner"
        if need.role.role not in ("reward", "metrics"):
            found[kind] = max(found[kind], need.memory.host_bytes)
    if cfg.runs_ppo:
        found["object store"] = sum(object_store(cfg, sent_parameters(cfg)).values())
    return dict(found)


def measure(folder: Path, options: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Peaks of one run in bytes, and the median of what was held."""
    import ray

    peaks: dict[str, float] = defaultdict(float)
    held: dict[str, list[float]] = defaultdict(list)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=4, object_store_memory=STORE, include_dashboard=False, log_to_driver=False)
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, MARK: str(folder), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    done = threading.Event()
    sampler = threading.Thread(target=sample, args=(peaks, held, done))
    sampler.start()
    try:
        command = [sys.executable, "-m", "rlhf_dist.main", *options, f"run.root={folder}", "run.name=run"]
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
    finally:
        done.set()
        sampler.join()
        ray.shutdown()
    return dict(peaks), {kind: statistics.median(values) for kind, values in held.items()}


def sample(peaks: dict[str, float], held: dict[str, list[float]], done: threading.Event) -> None:
    """Look at the actors until ``done``."""
    newest: dict[tuple[str, int], float] = {}
    while not done.wait(PERIOD):
        for pid, kind in actors():
            if (memory := memory_of(pid)) is not None:
                newest[kind, pid] = memory[0]
                held[kind].append(memory[1])
    for (kind, _), peak in newest.items():
        peaks[kind] = max(peaks[kind], peak)
    peaks["object store"] = store_bytes()
    held["object store"] = [0.0]


def actors() -> list[tuple[int, str]]:
    found = []
    for process in psutil.Process().children(recursive=True):  # our own Ray's, whatever else runs on the machine
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # it has ended
            continue
        if (match := re.match(r"ray::(\w+)", title)) and match[1] in KINDS:
            found.append((process.pid, KINDS[match[1]]))
    return found


def memory_of(pid: int) -> tuple[float, float] | None:
    """Bytes of a process without libraries and shared memory: its peak so far, and now; None when it has ended.

    The peak is the kernel's of all memory (``VmHWM``), less libraries and shared memory, of which little ever goes.
    Models that are mapped from their files now count; the file's cache while they are read into another type does not.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        maps = Path(f"/proc/{pid}/smaps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    kb = {name: int(value) for name, value in re.findall(r"(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB", status)}
    if len(kb) < 4:
        return None
    mapped = sum(int(rss) for rss in re.findall(r"\.safetensors\n(?:[A-Z]\w*:.*\n)*?Rss:\s+(\d+) kB", maps))
    return 1024.0 * (kb["VmHWM"] - kb["RssFile"] - kb["RssShmem"] + mapped), 1024.0 * kb["RssAnon"]


def store_bytes() -> float:
    """Pages of the object store's file that were ever written: Ray does not give them back before it ends."""
    for raylet in psutil.Process().children(recursive=True):
        if raylet.name() != "raylet":
            continue
        for entry in Path(f"/proc/{raylet.pid}/fd").iterdir():
            if "/plasma" in os.readlink(entry):
                return 512.0 * entry.stat().st_blocks
    raise RuntimeError("Ray's node holds no file of an object store")


def rows(runs: list[dict[str, Any]]) -> Rows:
    """One row for each process, in the order of the configs; GB."""
    found: Rows = [("config", "process", "predicted, GB", "measured, GB", "ratio")]
    for name, (_, _, title) in CONFIGS.items():
        for run in (run for run in runs if run["config"] == name):
            planned, measured = run["predicted"] / 1e9, run["measured"] / 1e9
            found.append((title, run["process"], f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured:.2f}"))
    return found


if __name__ == "__main__":
    main()
