"""How cost grows with work: one thing at a time, with the exponent of its curve; and what the driver pays for it.

    python -m benchmarks.scaling                            # all sweeps
    python -m benchmarks.scaling --sweeps prompts length --repetitions 1
    python -m benchmarks.scaling --sweeps long              # one long run: is the driver's memory flat?

GRPO with a random policy and a reward function, one core each for generator and learner. Figures are medians over the
steps of a run, without the first ones:

step             seconds of a step
driver_cpu       CPU seconds of the driver's process for 1,000 samples
driver_mb        its memory at the end, private pages

The driver holds references and lengths, never tokens: ``driver_cpu`` must not grow with the length of responses, nor
``driver_mb`` with the tokens already trained. Its work is by group and by chunk.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from benchmarks.asynchrony import COMMON, GRPO, MODEL, SMALL, WARM_UP, random_policy
from benchmarks.program import ROOT, command_of, environment, ppo_steps
from benchmarks.results import Report, Run

SAMPLES_PER_PROMPT = 4
POLL_SECONDS = 0.1
#: What one run is described by, and its value where nothing else is asked for.
BASE = {"prompts": 16, "length": 32, "generators": 1, "ranks": 1, "size": 1, "steps": 10}
SWEEPS: dict[str, list[dict[str, int]]] = {
    "prompts": [{"prompts": 16 * n} for n in (1, 4, 16, 64)],
    "length": [{"length": 32 * n} for n in (1, 4, 16, 32)],
    "generators": [{"generators": n, "prompts": 128} for n in (1, 2, 4)],
    "ranks": [{"ranks": n, "prompts": 128} for n in (1, 2, 4)],
    "size": [{"size": n} for n in (1, 10, 100)],
    "long": [{"steps": 400}],
}
#: The models of ``size``: their parameters are about so many times those of SMALL.
MODELS: dict[int, dict[str, Any]] = {
    1: SMALL,
    10: MODEL | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2},
    100: MODEL | {"hidden_size": 448, "intermediate_size": 1344, "num_hidden_layers": 4},
}
REPORT = Report(
    "scaling",
    case=("sweep", *BASE),
    figures=("step", "generate", "update", "samples_per_second", "driver_cpu", "driver_mb", "driver_mb_growth"),
)


def main() -> None:
    parser = REPORT.parser(__doc__, repetitions=3)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    args = parser.parse_args()
    if args.table:
        runs = REPORT.read(args)
        REPORT.show(runs)
    else:
        runs = list(measure(args.sweeps, args.repetitions, args.small))
        REPORT.finish(runs, {"models": MODELS, "samples_per_prompt": SAMPLES_PER_PROMPT, "warm_up": WARM_UP}, args)
    for line in exponents(runs):
        Console().print(line)


def measure(sweeps: Sequence[str], repetitions: int, small: bool) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for repetition in range(1 if small else repetitions):
            for sweep in sweeps:
                for change in SWEEPS[sweep][: 1 if small else None]:
                    case = BASE | change
                    policy = random_policy(folder / f"policy-{case['size']}", MODELS[case["size"]])
                    figures = run(Path(tempfile.mkdtemp(dir=folder)), options_of(case, policy))
                    yield {"sweep": sweep, **case, "repetition": repetition, **figures}


def options_of(case: Mapping[str, int], policy: Path) -> list[str]:
    prompts, length = case["prompts"], case["length"]
    rollout = {
        "batch_size": prompts,
        "n_samples_per_prompt": SAMPLES_PER_PROMPT,
        "max_response_length": length,
        "max_prompt_length": 48,
    }
    return [
        *COMMON,
        *GRPO,
        f"model.path={policy}",
        f"rollout={json.dumps(rollout)}",
        f"train={{steps: {case['steps']}, batch_size: {prompts * SAMPLES_PER_PROMPT}, micro_batch_tokens: 8192}}",
        f"generator={{replicas: {case['generators']}, cpus: 1, max_num_seqs: 128}}",
        f"policy.learner={{ranks: {case['ranks']}, cpus: 1}}",
        f"cluster.local_cpus={3 + case['generators'] + case['ranks']}",
    ]


def run(folder: Path, options: Sequence[str]) -> dict[str, float]:
    """One run of the program, watched from outside."""
    command = command_of(folder, options)
    with subprocess.Popen(command, cwd=ROOT, env=environment()) as process:
        watched = list(watch(process))
    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}: {' '.join(command)}")
    return figures_of(ppo_steps(folder / "run"), watched)


def watch(process: subprocess.Popen[bytes]) -> Iterator[tuple[float, float, float]]:
    """Unix time, CPU seconds so far and private memory in MB of a process, until it ends."""
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            cpu, memory = driver.cpu_times(), driver.memory_info()
        except psutil.NoSuchProcess:
            return
        yield time.time(), cpu.user + cpu.system, (memory.rss - memory.shared) / 1e6
        time.sleep(POLL_SECONDS)


def figures_of(steps: Sequence[Mapping[str, float]], watched: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    """Of the steps after the warm-up; ``time`` of a step is that of its end."""
    counted = steps[WARM_UP:]
    first, last = steps[WARM_UP - 1]["time"], counted[-1]["time"]
    times, cpu, memory = np.array(watched).T
    spent = np.interp(last, times, cpu) - np.interp(first, times, cpu)
    total = lambda rate: sum(step[rate] * step["timing/step"] for step in counted)
    samples = total("perf/samples_per_second")
    during = memory[(times >= first) & (times <= last)]
    fifth = max(1, len(during) // 5)
    return {
        "step": (last - first) / len(counted),
        "generate": statistics.median(step["timing/generate"] for step in counted),
        "update": statistics.median(step["timing/update"] for step in counted),
        "samples_per_second": samples / (last - first),
        "tokens": total("perf/throughput"),
        "driver_cpu": 1000 * spent / samples,
        "driver_mb": float(during[-fifth:].mean()),
        "driver_mb_growth": float(during[-fifth:].mean() / during[:fifth].mean() - 1),
    }


def exponents(runs: Sequence[Run]) -> Iterator[str]:
    """Slope of log(figure) over log(what was varied), least squares through the medians."""
    medians = REPORT.medians(runs)
    for sweep in dict.fromkeys(run["sweep"] for run in runs):
        rows = {case[1:][list(BASE).index(sweep)]: row for case, row in medians.items() if case[0] == sweep in BASE}
        if len(rows) > 1:
            x = np.log(list(rows))
            for figure in ("step", "driver_cpu", "driver_mb"):
                slope = np.polyfit(x, [math.log(row[figure]) for row in rows.values()], 1)[0]
                yield f"{figure} grows with {sweep} to the power of {slope:.2f}"


if __name__ == "__main__":
    main()
