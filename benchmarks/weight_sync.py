"""How long a weight sync takes, part by part, beside a plain copy of the same bytes; and whether 500 of them leak.

    python -m benchmarks.weight_sync                      # 18 MB, 500 MB and 2 GB, one and two generators
    python -m benchmarks.weight_sync --sizes 18 --generators 1
    python -m benchmarks.weight_sync --soak 500           # memory of every process over 500 syncs of 18 MB

One learner rank, real vLLM engines, float32, Ray's object store on one node. A copy is a memcpy into memory that was
just allocated, as every receiver's is; ``copies`` is the sync in such copies.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results" / "weight_sync.json"
#: Llamas by their size in MB, float32: hidden size, layers.
SIZES = {18: (256, 4), 500: (1024, 9), 2000: (2048, 9)}
SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--generators", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--soak", type=int, help="syncs of the smallest model; nothing else is measured")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = describe()
    if args.soak:
        results["soak"] = soak(args.soak)
    else:
        runs = [run for mb in args.sizes for n in args.generators for run in measure(mb, n, args.repetitions)]
        measured = {(r["mb"], r["generators"]) for r in runs}
        old = [r for r in results.get("runs", []) if (r["mb"], r["generators"]) not in measured]
        results["runs"] = sorted([*old, *runs], key=lambda r: (r["mb"], r["generators"]))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if args.soak:
        show_soak(results["soak"])
    else:
        show(results["runs"])


@contextmanager
def processes(mb: int, generators: int) -> Iterator[tuple[Any, list[Any]]]:
    """A learner and ``generators`` engines with random models of ``mb`` MB."""
    import ray
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_dist.actors.generator import Generator
    from rlhf_dist.actors.group import Group, Resources
    from rlhf_dist.actors.learner import LearnerGroup
    from rlhf_dist.actors.learner_spec import LearnerSpec
    from rlhf_dist.config import Config, LearnerConfig

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_preallocate_plasma_memory"] = "1"  # noqa: SIM112  (Ray spells it so)
    store = int(2.5 * mb * 1e6) + 200 * 2**20
    ray.init(address="local", num_cpus=4, object_store_memory=store, include_dashboard=False, log_to_driver=False)
    hidden, layers = SIZES[mb]
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        dtype="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        cfg = Config.model_validate(
            {
                "model": {"path": folder},
                "rollout": {"max_prompt_length": 48, "max_response_length": 16},
                "generator": {"kv_cache_gb": 0.05, "max_num_seqs": 16},
            }
        )
        spec = LearnerSpec(
            role="policy",
            model_path=folder,
            head="policy",
            objective=None,
            model=cfg.model,
            learner=LearnerConfig(),
            optim=None,
            micro_batch_tokens=1000,
        )
        policy = LearnerGroup(spec, "PACK", SECONDS).start()
        group = Group(
            "generator",
            Generator,
            generators,
            Resources(1),
            lambda i: (i, folder, cfg, [], True, 64),
            strategy="PACK",
            seconds=SECONDS,
            concurrency=4,
        )
        policy.wait_ready()
        group.wait_ready()
        try:
            yield policy, group.actors
        finally:
            ray.shutdown()


def measure(mb: int, generators: int, repetitions: int) -> list[dict[str, Any]]:
    """Seconds by part for each repetition; the first two syncs, which compile and touch the store, are left out."""
    import ray

    runs = []
    with processes(mb, generators) as (policy, actors):
        for version in range(repetitions + 2):
            policy.spans()
            started = time.perf_counter()
            weights = policy.weights(version)
            ray.wait(weights.parts, num_returns=len(weights.parts), fetch_local=False)
            published = time.perf_counter()
            records = ray.get(weights.deliver(actors))
            done = time.perf_counter()
            spans = {s["name"]: s["end"] - s["start"] for s in policy.spans()}
            nbytes = records[0]["nbytes"]
            slowest = lambda name, records=records: max(r[name] for r in records)
            runs.append(
                {
                    "mb": mb,
                    "generators": generators,
                    "bytes": nbytes,
                    "pack": spans["push_weights"],
                    "publish": published - started - spans["push_weights"],
                    "transfer": slowest("pull_seconds"),
                    "load": slowest("load_seconds"),
                    "canary": slowest("verify_seconds"),
                    "total": done - started,
                    "copy": copy_seconds(nbytes),
                    "digest": digest_seconds(nbytes),
                }
            )
            del weights, records
    return runs[2:]


def copy_seconds(nbytes: int) -> float:
    """A memcpy into memory that was just allocated."""
    source = np.ones(nbytes, np.uint8)
    started = time.perf_counter()
    source.copy()
    return time.perf_counter() - started


def digest_seconds(nbytes: int) -> float:
    """What the check of the bytes costs on each side."""
    from xxhash import xxh3_128

    source = np.ones(nbytes, np.uint8)
    started = time.perf_counter()
    xxh3_128(source.data).digest()
    return time.perf_counter() - started


def soak(syncs: int) -> dict[str, Any]:
    """Resident memory of every process and use of the store, after each sync."""
    import ray

    samples: list[dict[str, float]] = []
    with processes(18, 2) as (policy, actors):
        pids = {f"generator {i}": pid for i, pid in enumerate(ray.get([a.ready.remote() for a in actors]))}
        pids |= {f"learner {i}": pid for i, pid in enumerate(ray.get([r.ready.remote() for r in policy.ranks]))}
        pids["driver"] = os.getpid()
        for version in range(syncs):
            ray.get(policy.weights(version).deliver(actors))
            memory = {name: psutil.Process(pid).memory_info() for name, pid in pids.items()}
            # Without the object store, which every process maps.
            sample = {name: (m.rss - m.shared) / 1e6 for name, m in memory.items()}
            total = ray.cluster_resources()["object_store_memory"]
            sample["object store"] = (total - ray.available_resources().get("object_store_memory", 0)) / 1e6
            samples.append(sample)
    warm = max(1, syncs // 10)
    part = max(1, syncs // 5)
    first, last = samples[warm : warm + part], samples[-part:]
    mean = lambda rows, name: statistics.mean(r[name] for r in rows)
    return {
        "syncs": syncs,
        "mb": {name: [mean(first, name), mean(last, name)] for name in samples[0]},
        "counted": f"means of {part} syncs after {warm}, and of the last {part}",
    }


def show(runs: list[dict[str, Any]]) -> None:
    parts = ("pack", "publish", "transfer", "load", "canary", "total", "copy", "digest")
    table = Table("MB", "generators", *parts, "copies", "verification", title="milliseconds, medians")
    for mb, n in dict.fromkeys((r["mb"], r["generators"]) for r in runs):
        rows = [r for r in runs if (r["mb"], r["generators"]) == (mb, n)]
        median = {p: statistics.median(r[p] for r in rows) for p in parts}
        verification = (median["canary"] + 2 * median["digest"]) / median["total"]
        cells = [f"{1000 * median[p]:,.0f}" for p in parts]
        table.add_row(str(mb), str(n), *cells, f"{median['total'] / median['copy']:.1f}", f"{verification:.0%}")
    Console(width=140).print(table)


def show_soak(result: dict[str, Any]) -> None:
    table = Table("process", "first, MB", "last, MB", "growth", title=f"{result['syncs']} syncs: {result['counted']}")
    for name, (first, last) in result["mb"].items():
        table.add_row(name, f"{first:,.1f}", f"{last:,.1f}", f"{(last - first) / max(first, 1e-9):+.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
