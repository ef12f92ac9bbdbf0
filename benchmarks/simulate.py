"""Clusters that are not there: throughput, idle time, ages, faults and the best split, by simulation.

    python -m benchmarks.simulate                                   # all scenarios
    python -m benchmarks.simulate --models 7B --gpus 8 64 --set mfu=0.35 --set network=25e9
    python -m benchmarks.simulate --models 405B --gpus 4096 --staleness 1 --failures 0 1 10 --steps 200
    python -m benchmarks.simulate --sensitivity --models 70B --gpus 512 --staleness 1
    python -m benchmarks.simulate --check RUNFOLDER ...             # predict real runs, from costs fitted on themselves
    python -m benchmarks.simulate --check RUNFOLDER ... --fit RUN   # ... from costs fitted on another one
    python -m benchmarks.simulate --table

The rules are the project's own (see ``benchmarks/simulation/cluster.py``), the costs arithmetic on data sheets (see
``benchmarks/simulation/costs.py``; ``--set`` or ``--hardware FILE.yaml`` gives others). GRPO with a reward that costs
nothing and no reference; response lengths are log-normal and independent, cut off at 16,384 tokens. What the JSON holds
already of other scenarios with the same inputs stays in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.drawing import drawing
from benchmarks.machine import describe
from benchmarks.simulation import measured
from benchmarks.simulation.cluster import Plan, simulate
from benchmarks.simulation.costs import ASSUMED, MODELS, Hardware, generator_gpus, gpu_costs, least_learner_gpus, slots
from benchmarks.simulation.generator import Sampling
from benchmarks.simulation.generators import Failures, Lengths
from rlhf_dist.observability.charts import chart

RESULTS = Path(__file__).parent / "results" / "simulate.json"
PROMPT, MEDIAN, LONGEST, SAMPLES = 512, 1024, 16_384, 8
#: Standard deviation of the logarithm of a length.
TAILS = {"equal": 0.0, "moderate": 0.5, "long": 1.0}
#: Of each run; the warm-up, in which the first long responses are still under way, is not counted.
STEPS, WARM_UP = 20, 6
CHECKPOINT_EVERY = 5
#: Of the GPUs, those that sample.
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
#: What ``--sensitivity`` multiplies each assumed figure by.
FACTORS = (1 / 1.5, 1.5)

Record = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """A cluster and its task; how it is split is left open."""

    model: str
    gpus: int
    tail: str
    staleness: int
    failures: float
    """Times the rate of the Llama 3 report."""
    groups: int
    """Of a step."""


@dataclass(frozen=True)
class Settings:
    """What all scenarios of a command share."""

    hardware: Hardware
    steps: int = STEPS
    seed: int = 0
    shares: Sequence[float] = SHARES


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.check:
        results["check"] = check(args.check, args.fit)
    elif not args.table:
        settings = Settings(given_hardware(args.hardware, args.set), args.steps, args.seed, args.shares)
        grid = itertools.product(args.models, args.gpus, args.tails, args.staleness, args.failures)
        found = [Scenario(*point, args.groups or groups_per_step(point[1])) for point in grid]
        if args.sensitivity:
            results["sensitivity"] = [r for scenario in found for r in sensitivity(scenario, settings)]
        else:
            runs = kept(results, found, settings) + [r for scenario in found for r in splits(scenario, settings)]
            results |= {"machine": describe(), "inputs": inputs(settings), "runs": runs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.check:
        show_check(results["check"])
    elif args.sensitivity:
        show_sensitivity(results["sensitivity"])
    else:
        show(results["runs"])
        args.out.with_suffix(".svg").write_text(plot(results["runs"]))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--tails", nargs="+", choices=list(TAILS), default=["long"])
    parser.add_argument(
        "--failures", type=float, nargs="+", default=[1.0], help="times the rate of the Llama 3 report; default 1"
    )
    parser.add_argument("--groups", type=int, help="of a step; default: 8 for each GPU, 1,024 at most")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the GPUs that sample")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run; the first {WARM_UP} are not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a figure of the hardware")
    parser.add_argument("--hardware", type=Path, help="YAML with figures of the hardware")
    parser.add_argument("--sensitivity", action="store_true", help="vary each assumed figure of the hardware")
    parser.add_argument("--check", type=Path, nargs="+", help="folders of real runs to predict")
    parser.add_argument("--fit", type=Path, help="folder of the run whose costs --check takes")
    parser.add_argument("--table", action="store_true", help="print and plot the results that are there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def inputs(settings: Settings) -> Record:
    """All that the runs depend on and no column of theirs says."""
    return {
        "hardware": dataclasses.asdict(settings.hardware), "seed": settings.seed,
        "models": {name: dataclasses.asdict(model) for name, model in MODELS.items()},
        "prompt": PROMPT, "median": MEDIAN, "longest": LONGEST, "samples": SAMPLES, "tails": TAILS,
        "warm_up": WARM_UP, "checkpoint_every": CHECKPOINT_EVERY,
    }  # fmt: skip


def kept(results: Record, found: Sequence[Scenario], settings: Settings) -> list[Record]:
    """Runs of other scenarios that are there, where they come from the same inputs: a large grid is made in parts."""
    if results.get("inputs") != inputs(settings):
        return []
    again = [key(dataclasses.asdict(scenario)) for scenario in found]
    return [run for run in results["runs"] if key(run) not in again]


def key(run: Record) -> tuple[Any, ...]:
    """The scenario of a run."""
    return tuple(run[field.name] for field in dataclasses.fields(Scenario))


def given_hardware(file: Path | None, assignments: Sequence[str]) -> Hardware:
    """Raises ValueError: a figure that there is not, or no number; names those that there are."""
    given: dict[str, Any] = yaml.safe_load(file.read_text()) if file else {}
    given |= dict(text.split("=", 1) for text in assignments)
    kinds: dict[str, Any] = {f.name: type(f.default) for f in dataclasses.fields(Hardware)}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"{name}={value}: no figure of the hardware; there are {', '.join(kinds)}")
        given[name] = kinds[name](float(value))
    return Hardware(**given)


def draw(sigma: float, seed: Sequence[int]) -> np.ndarray:
    """``[1024, SAMPLES]`` lengths of responses with median :data:`MEDIAN`."""
    drawn = np.random.default_rng(seed).lognormal(math.log(MEDIAN), sigma, (1024, SAMPLES))
    return np.clip(np.rint(drawn), 1, LONGEST).astype(int)


def lognormal(sigma: float, seed: int) -> Lengths:
    """Prompt and responses of each group."""

    @functools.cache
    def block(number: int) -> list[list[int]]:
        return draw(sigma, [seed, number]).tolist()

    return lambda group: (PROMPT, block(group // 1024)[group % 1024])


def in_cache(sigma: float) -> float:
    """Tokens of a sequence that is being decoded, on average: half a response, and long ones are there for longer."""
    lengths = draw(sigma, [0, 0])
    return PROMPT + float((lengths**2).sum() / lengths.sum() / 2)


def groups_per_step(gpus: int) -> int:
    """64 on 8 GPUs, 1,024 from 128 on: batches grow with the cluster until more samples teach no more."""
    return min(1024, 8 * gpus)


def splits(scenario: Scenario, settings: Settings) -> list[Record]:
    """One run for each split between generators and learners that fits; [] where none does."""
    hardware, steps, seed = settings.hardware, settings.steps, settings.seed
    shape, sigma = MODELS[scenario.model], TAILS[scenario.tail]
    size = generator_gpus(shape, hardware)
    sampling = Sampling(max_num_seqs=slots(shape, hardware, in_cache(sigma)))
    per_second = scenario.failures * hardware.interruptions / 3600
    records = []
    for count in sorted({max(1, round(share * scenario.gpus / size)) for share in settings.shares}):
        learners = scenario.gpus - count * size
        if learners < least_learner_gpus(shape, hardware):
            continue
        faults = Failures(
            per_second * size, per_second * learners, hardware.generator_recovery, hardware.learner_recovery
        )
        plan = Plan(count, scenario.groups, SAMPLES, scenario.staleness, steps, CHECKPOINT_EVERY, goes_on=True)
        costs = gpu_costs(shape, hardware, learners)
        result = simulate(plan, costs, lognormal(sigma, seed), sampling, faults, seed)
        split = {"generators": count, "generator_gpus": size, "learner_gpus": learners}
        split |= {"max_num_seqs": sampling.max_num_seqs, "steps": steps}
        faulty = {"hours": result.steps[-1].ended / 3600, "deaths": result.deaths, "retried": result.retried_groups}
        faulty |= {"dropped": result.dropped_groups, "lost_share": result.lost_tokens / result.sampled_tokens}
        records.append(dataclasses.asdict(scenario) | split | result.figures(WARM_UP - 1, steps - 1, count) | faulty)
    return records


def best(runs: list[Record]) -> list[Record]:
    """The fastest split of each scenario."""
    found: dict[tuple[Any, ...], Record] = {}
    for run in runs:
        if key(run) not in found or run["tokens_per_second"] > found[key(run)]["tokens_per_second"]:
            found[key(run)] = run
    return list(found.values())


def sensitivity(scenario: Scenario, settings: Settings) -> list[Record]:
    """What the best split makes where one assumed figure is another, over what it makes with all as they are."""
    hardware = settings.hardware
    fastest = lambda h: best(splits(scenario, dataclasses.replace(settings, hardware=h)))[0]
    plain = fastest(hardware)
    records = []
    for name, factor in itertools.product(ASSUMED, FACTORS):
        value = getattr(hardware, name) * factor
        found = fastest(dataclasses.replace(hardware, **{name: value}))
        ratio = found["tokens_per_second"] / plain["tokens_per_second"]
        split = {"generators": found["generators"], "generator_gpus": found["generator_gpus"]}
        records.append(dataclasses.asdict(scenario) | {"figure": name, "value": value, "ratio": ratio} | split)
    return records


def show(runs: list[Record]) -> None:
    table = Table("model", "GPUs", "groups", "lengths", "S", "sampling : training", "step, s", "tokens/s",
                  "generators idle", "learners idle", "age", "failures", "hours", "deaths", "retried", "dropped",
                  "lost", title="best split of each scenario")  # fmt: skip
    for r in best(runs):
        deaths = "{generator} + {learner}".format(**r["deaths"])
        table.add_row(
            r["model"], f"{r['gpus']:,}", f"{r['groups']:,}", r["tail"], str(r["staleness"]),
            f"{r['generators']} x {r['generator_gpus']} : {r['learner_gpus']}", f"{r['step_seconds']:.1f}",
            f"{r['tokens_per_second']:,.0f}", f"{abs(r['generators_idle']):.0%}", f"{abs(r['learners_idle']):.0%}",
            f"{r['age']:.2f}", f"{r['failures']:g}", f"{r['hours']:.1f}", deaths, str(r["retried"]),
            str(r["dropped"]), f"{r['lost_share']:.1%}",
        )  # fmt: skip
    Console(width=180).print(table)


def show_sensitivity(records: list[Record]) -> None:
    table = Table("model", "GPUs", "S", "figure", "value", "tokens/s, ratio", "generators")
    for r in records:
        table.add_row(
            r["model"], f"{r['gpus']:,}", str(r["staleness"]), r["figure"], f"{r['value']:g}", f"{r['ratio']:.2f}",
            f"{r['generators']} x {r['generator_gpus']}",
        )  # fmt: skip
    Console(width=120).print(table)


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
    """Tokens per second and GPU against the share of the GPUs that sample: a panel for each model and cluster size.

    Scenarios with other batches or rates of failure than by default are left out.
    """
    figures = []
    panel_of = lambda r: (r["model"], r["gpus"], r["tail"])
    runs = [r for r in runs if r["failures"] == 1 and r["groups"] == groups_per_step(r["gpus"])]
    for place in dict.fromkeys(map(panel_of, runs)):
        model, gpus, tail = place
        series: dict[str, list[tuple[float, float | None]]] = {}
        for r in runs:
            if panel_of(r) == place:
                share = r["generators"] * r["generator_gpus"] / gpus
                series.setdefault(f"S = {r['staleness']}", []).append((share, r["tokens_per_second"] / gpus))
        figures.append(chart(f"{model}, {gpus:,} GPUs, {tail} tail", "tokens/s", series, "share that samples"))
    return drawing(figures, columns=2)


if __name__ == "__main__":
    main()
