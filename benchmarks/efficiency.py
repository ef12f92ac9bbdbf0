"""Seconds of a step beside what its parts would take by themselves, spread over all cores without a gap.

    python -m benchmarks.efficiency

GRPO with a reward model and a reference, one core each for generator and learner, with staleness 0 and 1: as in its
paper, the KL in the loss and one optimizer step for each batch; and ``S=1, twice``, the KL in the reward and two
optimizer steps, for which the learner passes over the batch before the update as well. The bound is the sum of

generation   ``LLM.generate`` on the requests of the same steps
reference    its forward passes over the same samples; for ``twice`` once more, the learner's
reward       the same of the reward model
update       a plain PyTorch loop over them, padded in the order in which they come

each in a process by itself with one thread, divided by the cores. Then, from the run's trace, how long each process was
at work in a step: what is missing to the length of the step it has waited. ``fetch`` is the part of it in which the
experience process takes all chunks and columns of a batch out of the object store.

The policy is random and its learning rate next to nothing, so that every run and the bare loops have the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.asynchrony import COMMON, MODEL, ONE, STARTING, WARM_UP, random_policy, seconds_per_step
from benchmarks.bare_vllm import bare_loops
from benchmarks.program import ppo_steps, run_program
from benchmarks.results import Report, Run

PROMPTS, SAMPLES, MICRO_BATCH_TOKENS = 32, 4, 8192
STEPS = 16
GOAL = 1.15
#: Of each kind of run the staleness, and the optimizer steps for each batch.
KINDS = {"S=0": (0, 1), "S=1": (1, 1), "S=1, twice": (1, 2)}
REPORT = Report("efficiency", case=("kind", "part"), figures=("seconds",))


def main() -> None:
    parser = REPORT.parser(__doc__, repetitions=3)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    args = parser.parse_args()
    if args.table:
        runs = REPORT.read(args)
        REPORT.show(runs)
    else:
        steps, repetitions = (WARM_UP + 2, 1) if args.small else (STEPS, args.repetitions)
        runs = measure(steps, repetitions)
        REPORT.finish(runs, {"model": MODEL, "steps": steps, "options": options_of(Path("POLICY"), "S=0", steps)}, args)
    show_bound(runs)


def options_of(policy: Path, kind: str, steps: int) -> list[str]:
    staleness, updates = KINDS[kind]
    in_loss = "true, kl_estimator: k3" if updates == 1 else "false"
    return [
        *COMMON,
        *ONE,
        f"model.path={policy}",
        f"reward.components=[{{name: reward_model, model: {policy}}}]",
        f"algo={{advantage_estimator: grpo, kl_coef: 0.05, rollout_correction: tis, use_kl_loss: {in_loss}}}",
        f"rollout={{batch_size: {PROMPTS}, n_samples_per_prompt: {SAMPLES}, max_response_length: 48}}",
        f"rollout={{max_prompt_length: 48, max_staleness: {staleness}}}",
        f"train={{steps: {steps}, batch_size: {PROMPTS * SAMPLES // updates}}}",
        f"train.micro_batch_tokens={MICRO_BATCH_TOKENS}",
        "generator.enforce_eager=false",  # compiled, as the bare loop and as a long run wants it
        "run={save_rollouts: true, checkpoint_every: 0}",
    ]


def measure(steps: int, repetitions: int) -> list[Run]:
    """Runs and bare loops in turns."""
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy = random_policy(folder / "policy", MODEL)
        for repetition in range(repetitions):
            whole = {
                kind: run_program(folder / f"{repetition}-{i}", options_of(policy, kind, steps))
                for i, kind in enumerate(KINDS)
            }
            for kind, place in whole.items():
                parts = parts_of(place)
                runs += [{"kind": kind, "part": name, "seconds": x} for name, x in parts.items()]
            bare = bare_parts(policy, options_of(policy, "S=0", steps), whole["S=0"])
            runs += [{"kind": "bare", "part": name, "seconds": x} for name, x in bare.items()]
    return runs


def parts_of(folder: Path) -> dict[str, float]:
    """Seconds of a step, and those of it in which each process was at work; the first steps are left out."""
    steps = ppo_steps(folder)[WARM_UP - 1 :]
    trace = json.loads((folder / "trace.json").read_text())
    origin = trace["otherData"]["unix_time_of_zero"]
    between = (steps[0]["time"] - origin, steps[-1]["time"] - origin)
    events, count = trace["traceEvents"], len(steps) - 1
    busy = {name: x / count for name, x in busy_seconds(events, between).items()}
    fetches = [e["dur"] for e in events if e["name"] == "fetch" and between[0] <= e["ts"] / 1e6 < between[1]]
    return {"step": seconds_per_step(steps), **busy, "fetch": sum(fetches) / 1e6 / count}


def busy_seconds(events: Sequence[Mapping[str, Any]], between: tuple[float, float]) -> dict[str, float]:
    """Seconds of an interval that lie in a span of each process, spans in spans counted once; the driver only waits."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    busy = dict.fromkeys((name for name in names.values() if name != "driver"), 0.0)
    until = dict.fromkeys(busy, between[0])
    spans = [e for e in events if e.get("ph") == "X" and names[e["pid"]] in busy and e["name"] not in STARTING]
    for event in sorted(spans, key=lambda e: e["ts"]):
        name, end = names[event["pid"]], min((event["ts"] + event["dur"]) / 1e6, between[1])
        start = max(event["ts"] / 1e6, until[name])
        busy[name] += max(0.0, end - start)
        until[name] = max(until[name], end)
    return busy


def bare_parts(policy: Path, options: Sequence[str], folder: Path) -> dict[str, float]:
    """Seconds of a step for the requests and samples of a run, each part alone on one core."""
    tables = [pq.read_table(file) for file in sorted((folder / "rollouts").glob("*.parquet"))][WARM_UP:]
    with bare_loops(options) as loops:
        generation = [loops.generate(list(requests(table))) for table in tables]
    tokens = sum(len(x) for table in tables for x in table["response_ids"])
    generated = sum(n for n, _ in generation)
    if abs(generated - tokens) > 0.01 * tokens:
        raise SystemExit(f"the bare loop generated {generated} tokens, the run {tokens}: they are not comparable")
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        learning = process.submit(bare_learning, policy, tables).result()
    return {"generation": sum(x for _, x in generation) / len(tables), **learning}


def requests(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Groups of a step and the rows of their prompts."""
    groups = table["group_id"].to_pylist()
    yield from dict(zip(groups, table["prompt_id"].to_pylist(), strict=True)).items()


def bare_learning(policy: Path, tables: Sequence[pa.Table]) -> dict[str, float]:
    """Seconds of each part of a step, in a process with one thread; the first step is left out."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.learner_loops import PlainLoop, Samples, Values, policy_loss
    from rlhf_dist.models import load_policy, load_scalar

    loop = PlainLoop("policy", policy)
    reference, reward = load_policy(str(policy), "float32", "sdpa"), Values(load_scalar(str(policy), "float32", "sdpa"))
    seconds: dict[str, list[float]] = {"reference": [], "reward": [], "update": []}
    for table in tables:
        # The learner needs no log-probabilities from before its only optimizer step; the plain loss reads some.
        samples = Samples.of(table.append_column("old_logprobs", table["rollout_logprobs"]), loop.names)
        rows = list(range(table.num_rows))
        size = max(1, MICRO_BATCH_TOKENS // max(len(x) for x in samples.ids))
        micro_batches = [rows[i : i + size] for i in rows[::size]]
        times = [time.perf_counter()]
        with torch.no_grad():
            for part in map(samples.padded, micro_batches):
                policy_loss(reference, part)
            times.append(time.perf_counter())
            for part in map(samples.padded, micro_batches):
                reward(input_ids=part["ids"], attention_mask=part["attention"], use_cache=False)
        times.append(time.perf_counter())
        loop.update(samples, [micro_batches])
        times.append(time.perf_counter())
        for name, (began, ended) in zip(seconds, itertools.pairwise(times), strict=True):
            seconds[name].append(ended - began)
    return {name: sum(x[1:]) / len(x[1:]) for name, x in seconds.items()}


def show_bound(runs: Sequence[Run]) -> None:
    """Steps over the bound, and what each process did in a step."""
    medians = {case: row["seconds"] for case, row in REPORT.medians(runs).items()}
    cores = os.cpu_count() or 1
    alone = sum(x for (kind, _), x in medians.items() if kind == "bare")
    console = Console()
    for kind, (_, updates) in KINDS.items():
        bound = (alone + (medians["bare", "reference"] if updates > 1 else 0.0)) / cores
        step = medians[kind, "step"]
        goal = f" (goal {GOAL})" if kind == "S=1" else ""
        console.print(
            f"{kind}: {step:.3f} s a step, {step / bound:.2f} times the bound of {bound:.3f} s on {cores} cores{goal}"
        )
        table = Table("process", "at work, s", "waits, s", title=f"{kind}, in a step")
        for (of, part), seconds in medians.items():
            if of == kind and part not in ("step", "fetch"):
                table.add_row(part, f"{seconds:.3f}", f"{step - seconds:.3f}")
        console.print(table)
        console.print(f"a batch is taken out of the object store in {medians[kind, 'fetch'] / step:.2%} of a step")


if __name__ == "__main__":
    main()
