"""Tokens per second of the generators beside bare ``LLM.generate`` loops on the same requests.

    python -m benchmarks.rollout                              # one and two generators, three spreads of lengths
    python -m benchmarks.rollout --generators 1 --lengths short --chunk-tokens 500 2000 8000

Ours goes the way of a run: groups through the dispatcher to Ray actors, samples as Arrow chunks through the object
store, until the driver holds a reference to every chunk. The bare side is one process with one engine for each
generator, with its share of the prompts dealt out beforehand, and forgets what it has sampled. One thread an engine.

Lengths come from a random policy, to which each token is the last one with about the same probability:

short   up to 24 tokens, of which most are reached
long    up to 200 tokens
tails   up to 1,400 tokens: the longest of some hundreds is about ten times as long as the median
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.asynchrony import COMMON, GRPO, SMALL, random_policy
from benchmarks.bare_vllm import bare_loops
from benchmarks.results import Report, Run
from rlhf_dist.config import Config
from rlhf_dist.config_io import load

SAMPLES_PER_PROMPT = 4
#: Longest response and groups of a repetition: so many that an engine is full for most of the time.
LENGTHS = {"short": (24, 512), "long": (200, 256), "tails": (1400, 192)}
REPORT = Report(
    "rollout",
    case=("generators", "lengths", "chunk_tokens", "kind"),
    figures=("tokens_per_second", "seconds", "tokens", "chunks"),
)
SECONDS = 600


def main() -> None:
    parser = REPORT.parser(__doc__, repetitions=5)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--generators", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=[2000])
    args = parser.parse_args()
    if args.table:
        runs = REPORT.read(args)
        REPORT.show(runs)
    else:
        if args.small:
            args.generators, args.lengths, args.repetitions = [1], ["short"], 1
        runs = measure(args)
        REPORT.finish(runs, {"model": SMALL, "lengths": LENGTHS, "samples_per_prompt": SAMPLES_PER_PROMPT}, args)
    for line in ratios(runs):
        Console().print(line)


def measure(args: argparse.Namespace) -> list[Run]:
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        policy = random_policy(Path(folder), SMALL)
        for count, lengths, chunk_tokens in itertools.product(args.generators, args.lengths, args.chunk_tokens):
            options = options_of(policy, lengths, chunk_tokens, count)
            groups = LENGTHS[lengths][1] // (8 if args.small else 1)
            case = {"generators": count, "lengths": lengths, "chunk_tokens": chunk_tokens}
            runs += [case | run for run in compare(options, count, groups, args.repetitions)]
    return runs


def options_of(policy: Path, lengths: str, chunk_tokens: int, generators: int) -> list[str]:
    return [
        *COMMON,
        *GRPO,
        f"model.path={policy}",
        f"rollout={{n_samples_per_prompt: {SAMPLES_PER_PROMPT}, max_prompt_length: 48}}",
        f"rollout.max_response_length={LENGTHS[lengths][0]}",
        f"rollout.chunk_tokens={chunk_tokens}",
        # Compiled, as ``LLM`` is by default and as a long run wants it.
        f"generator={{replicas: {generators}, cpus: 1, max_num_seqs: 128, enforce_eager: false}}",
    ]


def compare(options: Sequence[str], count: int, groups: int, repetitions: int) -> Iterator[Run]:
    """Both sides in turns, on other prompts and seeds each time; the first time, which fills caches, is left out."""
    from rlhf_dist.data.prompts import PromptOrder

    cfg = load(None, options)
    with bare_loops(options, count) as bare, generators_of(cfg, count) as (group, prompts, rows):
        order = PromptOrder(rows, cfg.seed, cfg.data.shuffle)
        for repetition in range(-1, repetitions):
            wanted = [(groups * (repetition + 1) + i, row) for i, row in enumerate(order.take(groups))]
            started = time.perf_counter()
            batch = group.generate(prompts, wanted, SAMPLES_PER_PROMPT).wait(SECONDS)
            seconds = time.perf_counter() - started
            ours = {"tokens": batch.response_tokens, "seconds": seconds, "chunks": len(batch.slices)}
            tokens, seconds = bare.generate(wanted)
            for kind, run in {"ours": ours, "bare": {"tokens": tokens, "seconds": seconds}}.items():
                if repetition >= 0:
                    rate = {"tokens_per_second": run["tokens"] / run["seconds"]}
                    yield {"kind": kind, "repetition": repetition, **run, **rate}


@contextmanager
def generators_of(cfg: Config, count: int) -> Iterator[tuple[Any, Any, int]]:
    """The generators of a run, the prompts in the object store, and how many these are."""
    import ray

    from rlhf_dist.actors.data import load_table
    from rlhf_dist.actors.dispatch import GeneratorGroup
    from rlhf_dist.actors.generator import Generator
    from rlhf_dist.actors.group import Group, Resources
    from rlhf_dist.data.tokenization import load_tokenizer

    assert cfg.model.path is not None
    path, eos_id = cfg.model.path, load_tokenizer(cfg.model.path).eos_token_id
    context = cfg.rollout.max_prompt_length + cfg.rollout.max_response_length
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    store = 300 * 2**20
    ray.init(
        address="local", num_cpus=count + 1, object_store_memory=store, include_dashboard=False, log_to_driver=False
    )
    with ExitStack() as ending:
        ending.callback(ray.shutdown)
        group = Group(
            "generator",
            Generator,
            count,
            Resources(1),
            lambda i: (i, path, cfg, [eos_id], False, context),
            strategy="PACK",
            seconds=SECONDS,
            concurrency=8,
        )
        prompts, report = load_table("prompts", cfg, path, "train")
        group.wait_ready()
        generators = GeneratorGroup(group, cfg.generator.max_num_seqs)
        ending.callback(generators.stop_calling)
        yield generators, prompts, report["rows"]


def ratios(runs: Sequence[Run]) -> Iterator[str]:
    """Ours over bare, for each case; the goal is 0.95 for chunks of 2,000 tokens and more."""
    for (count, lengths, chunk_tokens), ratio in REPORT.paired(runs, "tokens_per_second", "ours", "bare").items():
        yield f"{count} x {lengths}, chunks of {chunk_tokens:,}: {ratio:.2f} of bare vLLM (goal 0.95)"


if __name__ == "__main__":
    main()
