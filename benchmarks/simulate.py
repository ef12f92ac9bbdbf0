"""Clusters that are not there: throughput, idle time, ages and the best split, by simulation.

    python -m benchmarks.simulate                                   # all scenarios
    python -m benchmarks.simulate --models 7B --gpus 8 64 --set mfu=0.35 --set network=25e9
    python -m benchmarks.simulate --check RUNFOLDER ...             # predict real runs, from costs fitted on themselves
    python -m benchmarks.simulate --check RUNFOLDER ... --fit RUN   # ... from costs fitted on another one
    python -m benchmarks.simulate --table

The rules are the project's own (see ``benchmarks/simulation/cluster.py``), the costs arithmetic on data sheets (see
``benchmarks/simulation/costs.py``; ``--set`` or ``--hardware FILE.yaml`` gives others). GRPO with a reward that costs
nothing and no reference; response lengths are log-normal and independent, cut off at 16,384 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.simulation import measured
from benchmarks.simulation.cluster import Plan, simulate
from benchmarks.simulation.costs import MODELS, Hardware, generator_gpus, gpu_costs, least_learner_gpus, slots
from benchmarks.simulation.generator import Sampling
from benchmarks.simulation.generators import Failures, Lengths
from rlhf_dist.observability.charts import HEIGHT, WIDTH, chart

RESULTS = Path(__file__).parent / "results" / "simulate.json"
PROMPT, MEDIAN, LONGEST, SAMPLES = 512, 1024, 16_384, 8
#: Standard deviation of the logarithm of a length.
TAILS = {"equal": 0.0, "moderate": 0.5, "long": 1.0}
STEPS, WARM_UP = 16, 4
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--tails", nargs="+", choices=list(TAILS), default=["long"])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run; the first {WARM_UP} are not counted")
    parser.add_argument("--failures", type=float, default=1.0, help="times the rate of the Llama 3 report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a figure of the hardware")
    parser.add_argument("--hardware", type=Path, help="YAML with figures of the hardware")
    parser.add_argument("--check", type=Path, nargs="+", help="folders of real runs to predict")
    parser.add_argument("--fit", type=Path, help="folder of the run whose costs --check takes")
    parser.add_argument("--table", action="store_true", help="print and plot the results that are there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.check:
        results["check"] = check(args.check, args.fit)
    elif not args.table:
        hardware = given_hardware(args.hardware, args.set)
        inputs = {
            "hardware": dataclasses.asdict(hardware),
            "models": {n: dataclasses.asdict(MODELS[n]) for n in MODELS},
        }
        inputs |= {"prompt": PROMPT, "median": MEDIAN, "longest": LONGEST, "samples": SAMPLES, "tails": TAILS}
        inputs |= {"steps": args.steps, "warm_up": WARM_UP, "failures": args.failures, "seed": args.seed}
        grid = itertools.product(args.models, args.gpus, args.tails, args.staleness)
        runs = [r for point in grid for r in splits(*point, hardware, args.steps, args.failures, args.seed)]
        results |= {"machine": describe(), "inputs": inputs, "runs": runs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.check:
        show_check(results["check"])
    else:
        show(results["runs"])
        args.out.with_suffix(".svg").write_text(plot(results["runs"]))


def given_hardware(file: Path | None, assignments: Sequence[str]) -> Hardware:
    """Raises ValueError: a figure that there is not, or no number; names those that there are."""
    given: dict[str, Any] = yaml.safe_load(file.read_text()) if file else {}
    given |= dict(text.split("=", 1) for text in assignments)
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Hardware)}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"{name}={value}: no figure of the hardware; there are {', '.join(kinds)}")
        given[name] = kinds[name](float(value))
    return Hardware(**given)


def lognormal(sigma: float, seed: int) -> Lengths:
    """Lengths of :data:`SAMPLES` responses with median :data:`MEDIAN`."""

    @functools.cache
    def block(number: int) -> list[list[int]]:
        drawn = np.random.default_rng([seed, number]).lognormal(math.log(MEDIAN), sigma, (1024, SAMPLES))
        return np.clip(np.rint(drawn), 1, LONGEST).astype(int).tolist()

    return lambda group: (PROMPT, block(group // 1024)[group % 1024])


def groups_per_step(gpus: int) -> int:
    """64 on 8 GPUs, 1,024 from 128 on: batches grow with the cluster until more samples teach no more."""
    return min(1024, 8 * gpus)


def splits(
    model: str, gpus: int, tail: str, staleness: int, hardware: Hardware, steps: int, failures: float, seed: int
) -> list[Record]:
    """One run for each split between generators and learners that fits; [] where none does."""
    shape, size = MODELS[model], generator_gpus(MODELS[model], hardware)
    counts = sorted({max(1, round(share * gpus / size)) for share in SHARES})
    records = []
    for count in counts:
        learners = gpus - count * size
        if learners < least_learner_gpus(shape, hardware):
            continue
        sampling = Sampling(max_num_seqs=slots(shape, hardware, PROMPT + mean_length(TAILS[tail]) / 2))
        per_second = failures * hardware.interruptions / 3600
        faults = Failures(
            per_second * size, per_second * learners, hardware.generator_recovery, hardware.learner_recovery
        )
        plan = Plan(count, groups_per_step(gpus), SAMPLES, staleness, steps, checkpoint_every=5, goes_on=True)
        costs = gpu_costs(shape, hardware, learners)
        result = simulate(plan, costs, lognormal(TAILS[tail], seed), sampling, faults, seed)
        about = {"model": model, "gpus": gpus, "tail": tail, "staleness": staleness, "generators": count}
        about |= {"generator_gpus": size, "learner_gpus": learners, "groups": plan.batch_size}
        about |= {"max_num_seqs": sampling.max_num_seqs}
        faulty = {"deaths": result.deaths, "retried": result.retried_groups, "dropped": result.dropped_groups}
        records.append(about | result.figures(WARM_UP, steps - 1, count) | faulty)
    return records


def mean_length(sigma: float) -> float:
    """Of the log-normal lengths, before they are cut off."""
    return MEDIAN * math.exp(sigma**2 / 2)


def best(runs: list[Record]) -> list[Record]:
    """The fastest split of each scenario."""
    key = lambda r: (r["model"], r["gpus"], r["tail"], r["staleness"])
    found: dict[tuple, Record] = {}
    for run in runs:
        if key(run) not in found or run["tokens_per_second"] > found[key(run)]["tokens_per_second"]:
            found[key(run)] = run
    return list(found.values())


def show(runs: list[Record]) -> None:
    table = Table("model", "GPUs", "lengths", "S", "sampling : training", "step, s", "tokens/s", "samples/s",
                  "generators idle", "learners idle", "age", "deaths", "retried", "dropped",
                  title="best split of each scenario")  # fmt: skip
    for r in best(runs):
        table.add_row(
            r["model"], f"{r['gpus']:,}", r["tail"], str(r["staleness"]),
            f"{r['generators']} x {r['generator_gpus']} : {r['learner_gpus']}", f"{r['step_seconds']:.1f}",
            f"{r['tokens_per_second']:,.0f}", f"{r['samples_per_second']:.1f}", f"{abs(r['generators_idle']):.0%}",
            f"{abs(r['learners_idle']):.0%}", f"{r['age']:.2f}", str(sum(r["deaths"].values())), str(r["retried"]),
            str(r["dropped"]),
        )  # fmt: skip
    Console(width=160).print(table)


def check(folders: Sequence[Path], fitted_on: Path | None) -> list[Record]:
    costs = measured.fit(measured.read(fitted_on)) if fitted_on else None
    found = []
    for folder in folders:
        run = measured.read(folder)
        own = costs or measured.fit(run)
        about = {"run": folder.name, "fitted_on": (fitted_on or folder).name, "staleness": run.plan.max_staleness}
        found.append(about | measured.compare(run, own) | {"costs": dataclasses.asdict(own)})
    return found


def show_check(records: list[Record]) -> None:
    table = Table("run", "costs of", "S", "step, s", "predicted", "ratio", "tokens/s", "predicted", "ratio")
    for r in records:
        table.add_row(
            r["run"], r["fitted_on"], str(r["staleness"]), f"{r['step_seconds']:.3f}",
            f"{r['predicted_step_seconds']:.3f}", f"{r['step_ratio']:.2f}", f"{r['tokens_per_second']:,.0f}",
            f"{r['predicted_tokens_per_second']:,.0f}", f"{r['tokens_ratio']:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


def plot(runs: list[Record]) -> str:
    """Tokens per second and GPU against the share of the GPUs that sample: a panel for each model and cluster size."""
    panels = []
    scenarios = dict.fromkeys((r["model"], r["gpus"], r["tail"]) for r in runs)
    for i, (model, gpus, tail) in enumerate(scenarios):
        series: dict[str, list[tuple[float, float | None]]] = {}
        for r in runs:
            if (r["model"], r["gpus"], r["tail"]) == (model, gpus, tail):
                share = r["generators"] * r["generator_gpus"] / gpus
                series.setdefault(f"S = {r['staleness']}", []).append((share, r["tokens_per_second"] / gpus))
        drawn = re.search(r"<svg.*</svg>", chart("", "tokens/s", series, "share that samples"), re.DOTALL)
        assert drawn is not None
        title = f'<text class="t" x="0" y="14">{escape(f"{model}, {gpus:,} GPUs, {tail} tail")}</text>'
        for k, name in enumerate(series):
            title += f'<rect x="{20 + 80 * k}" y="24" width="14" height="3" fill="var(--s{k})"/>'
            title += f'<text x="{40 + 80 * k}" y="29">{escape(name)}</text>'
        panel = drawn[0].replace("<svg ", f'<svg y="36" width="{WIDTH}" height="{HEIGHT}" ', 1)
        at = f'x="{(i % 2) * (WIDTH + 20)}" y="{i // 2 * (HEIGHT + 60)}"'
        panels.append(f'<svg {at} width="{WIDTH}" height="{HEIGHT + 50}">{title}{panel}</svg>')
    width, height = 2 * WIDTH + 40, (len(panels) + 1) // 2 * (HEIGHT + 60)
    style = (
        ":root{--s0:#2563c9;--s1:#c2571a;--s2:#2f8f5b;--s3:#8a4bb0}text{font:11px sans-serif;fill:#5d6878}"
        ".t{font-size:14px;fill:#1c2430}.g{stroke:#dde2e9}.l{fill:none;stroke-width:2}.h{fill:transparent}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -6 {width} {height}"><style>{style}</style>'
        f'<rect x="-10" y="-6" width="{width}" height="{height}" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


if __name__ == "__main__":
    main()
