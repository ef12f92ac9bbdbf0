"""Costs of a real run, fitted from its folder, and what the simulator makes of the same run.

Read are ``config.yaml``, ``metrics.jsonl``, ``trace.json`` and ``rollouts/*.parquet``: lengths of all trained groups,
seconds of decoding, loading, scoring and training, and how many steps and sequences each stretch of decoding had.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks.simulation.cluster import Plan, Result, simulate
from benchmarks.simulation.costs import Costs
from benchmarks.simulation.generator import Sampling
from benchmarks.simulation.generators import Lengths
from rlhf_dist.observability.metrics import read_metrics

#: Steps that are not compared: compilation, first versions.
WARM_UP = 3


@dataclass(frozen=True)
class Span:
    process: str
    name: str
    start: float
    seconds: float
    args: dict[str, Any]

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True)
class Run:
    """What a run has left."""

    plan: Plan
    sampling: Sampling
    steps: list[dict[str, Any]]
    """Lines of stage ``ppo``."""
    spans: list[Span]
    """Of the training; those of evaluations are left out."""
    groups: dict[int, tuple[int, list[int]]]
    """Tokens of the prompt and of the responses."""

    @property
    def lengths(self) -> Lengths:
        return self.groups.__getitem__


def read(folder: Path) -> Run:
    """Raises ValueError: something is missing; says what, and how to have it made."""
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if line["stage"] == "ppo"]
    if len(steps) < WARM_UP + 3:
        raise ValueError(f"{folder}: {len(steps)} steps of stage ppo are too few, at least {WARM_UP + 3} are needed")
    files = sorted((folder / "rollouts").glob("*.parquet"))
    if len(files) < len(steps):
        raise ValueError(
            f"{folder}: rollouts of {len(files)} of {len(steps)} steps; their lengths are needed, run with "
            "run.save_rollouts=true"
        )
    if left_out := sum(line["rollout/groups_left_out"] for line in steps):
        raise ValueError(f"{folder}: {left_out:.0f} groups were sampled and not trained, whose lengths nobody noted")
    rollout, generator = cfg["rollout"], cfg["generator"]
    plan = Plan(
        generators=generator["replicas"],
        batch_size=rollout["batch_size"],
        n_samples_per_prompt=rollout["n_samples_per_prompt"],
        max_staleness=rollout["max_staleness"],
        steps=len(steps),
    )
    sampling = Sampling(
        generator["max_num_seqs"], rollout["in_flight_updates"], rollout["chunk_tokens"], rollout["chunk_seconds"]
    )
    return Run(plan, sampling, steps, list(_spans(folder / "trace.json")), _groups(files))


def _groups(files: Iterable[Path]) -> dict[int, tuple[int, list[int]]]:
    """Tokens of the prompt and of each response of every group that was trained."""
    found: dict[int, tuple[int, list[int]]] = {}
    for file in files:
        table = pq.read_table(file, columns=["group_id", "prompt_ids", "response_ids"])
        prompts = pc.list_value_length(table["prompt_ids"]).to_pylist()
        responses = pc.list_value_length(table["response_ids"]).to_pylist()
        for group, prompt, response in zip(table["group_id"].to_pylist(), prompts, responses, strict=True):
            found.setdefault(group, (prompt, []))[1].append(response)
    return found


def _spans(path: Path) -> Iterable[Span]:
    """Between the beginning of the first and the end of the last step."""
    trace = json.loads(path.read_text())
    if trace["otherData"]["spans_left_out"]:
        raise ValueError(f"{path}: {trace['otherData']['spans_left_out']} spans were left out; make a shorter run")
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = [
        Span(names[e["pid"]], e["name"], e["ts"] / 1e6, e["dur"] / 1e6, e["args"]) for e in events if e["ph"] == "X"
    ]
    phases = [s for s in spans if s.process == "driver" and s.name in ("generate", "push_weights")]
    start, end = min(s.start for s in phases), max(s.end for s in phases)
    return [s for s in spans if start <= s.start and s.end <= end]


def fit(run: Run) -> Costs:
    """Least squares and medians.

    Raises:
        ValueError: the trace does not say how many steps a stretch of decoding had; it was made before that was noted.
    """
    spans, steps = run.spans, run.steps
    of = lambda name, role: [s for s in spans if s.name == name and re.fullmatch(rf"{role}( \d+)?", s.process)]
    decoding = [s for s in of("generate", "generator") if s.args.get("steps")]
    if not decoding:
        raise ValueError("trace.json has no generate span with the number of its steps: make the run again")
    step, sequence = _non_negative(
        [(s.args["steps"], s.args["sequences"]) for s in decoding], [s.seconds for s in decoding]
    )
    loads = of("load", "generator")
    load = statistics.median(s.seconds for s in loads)
    tokens = [line["perf/throughput"] * line["timing/step"] for line in steps]
    phase = lambda name: of(name, "driver")
    update, update_token = _non_negative([(1, n) for n in tokens], [s.seconds for s in phase("update")])
    total = sum(tokens)
    logprobs = of("logprobs", "policy") + of("values", "critic")
    # Parts that run side by side: the slowest one is waited for.
    busiest = lambda found: max(
        (sum(s.seconds for s in g) for _, g in itertools.groupby(sorted(found, key=_process), key=_process)),
        default=0.0,
    )
    scoring = [s for s in spans if s.process.split()[0] in ("reward", "reference")]
    pushes = phase("push_weights")
    if run.plan.max_staleness:
        transfers = [min((x.start - p.start for x in loads if x.start >= p.start), default=0.0) for p in pushes]
    else:
        transfers = [max(0.0, p.seconds - load) for p in pushes]
    packing = [s.seconds for s in of("push_weights", "policy 0|policy")]
    packed = statistics.median(packing) if packing else 0.0
    between = [b["time"] - a["time"] - b["timing/step"] for a, b in itertools.pairwise(steps)]
    return Costs(
        step=step,
        sequence=sequence,
        load=load,
        score_token=busiest(scoring) / total,
        experience=_experience(phase("score"), logprobs + ([] if run.plan.max_staleness else scoring)),
        logprob_token=busiest(logprobs) / total,
        update=update,
        update_token=update_token,
        publish=packed,
        transfer=max(0.0, statistics.median(transfers) - packed),
        driver=max(0.0, statistics.median(between)),
    )


def _process(span: Span) -> str:
    return span.process


def _experience(phases: Sequence[Span], columns: Sequence[Span]) -> float:
    """From the last column of a step to the end of its phase ``score``."""
    ends = np.sort([s.end for s in columns])
    last = [max([p.start, *ends[: np.searchsorted(ends, p.end)][-1:]]) for p in phases]
    return statistics.median(p.end - at for p, at in zip(phases, last, strict=True))


def _non_negative(rows: Sequence[tuple[float, float]], seconds: Sequence[float]) -> tuple[float, float]:
    """Least squares of two coefficients; where one would be negative it is 0 and the other fitted alone."""
    a, b = np.asarray(rows, float), np.asarray(seconds, float)
    both = np.linalg.lstsq(a, b, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [float(max(0.0, a[:, i] @ b / (a[:, i] @ a[:, i]))) for i in (0, 1)]
    rests = [float(np.sum((b - alone[i] * a[:, i]) ** 2)) for i in (0, 1)]
    return (alone[0], 0.0) if rests[0] <= rests[1] else (0.0, alone[1])


def predict(run: Run, costs: Costs) -> Result:
    return simulate(run.plan, costs, run.lengths, run.sampling)


def compare(run: Run, costs: Costs) -> dict[str, float]:
    """Seconds of a step and trained tokens per second: measured, predicted, and their ratio, the warm-up left out."""
    predicted = predict(run, costs).figures(WARM_UP - 1, run.plan.steps - 1, run.plan.generators)
    counted = run.steps[WARM_UP:]
    seconds = run.steps[-1]["time"] - run.steps[WARM_UP - 1]["time"]
    tokens = sum(line["perf/throughput"] * line["timing/step"] for line in counted)
    step = seconds / len(counted)
    return {
        "step_seconds": step,
        "predicted_step_seconds": predicted["step_seconds"],
        "step_ratio": predicted["step_seconds"] / step,
        "tokens_per_second": tokens / seconds,
        "predicted_tokens_per_second": predicted["tokens_per_second"],
        "tokens_ratio": predicted["tokens_per_second"] / (tokens / seconds),
    }
