"""GRPO from prompt to update beside TRL's, on the same cores: samples per second, and what both learn.

    python -m benchmarks.end_to_end --trl-python PYTHON         # both lengths, three repetitions
    python -m benchmarks.end_to_end --lengths log-normal --trl-modes generate
    python -m benchmarks.end_to_end --table

Both sides get the same policy, prompts in the same order, reward function, sampling, loss, optimizer and number of
updates. ``short``: the embedded world after SFT, on its gold score, whose curves show that speed is not bought with
quality. ``log-normal``: responses of very different lengths, by the weights of a policy that does not learn.

TRL runs in a process of its own (``benchmarks.trl_run``), with every mode of generation that it has without a GPU; the
fastest one is measured, for each of the lengths. Times begin with the end of the warm-up: neither side's start counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.algorithms import REQUIREMENTS
from benchmarks.asynchrony import MODEL
from benchmarks.drawing import drawing
from benchmarks.grpo_sides import (
    CASES,
    MEDIAN,
    REWARD,
    ROOT,
    SIGMA,
    TRL_MODES,
    Case,
    Place,
    environment,
    our_options,
    tiny,
    trl_config,
)
from benchmarks.lognormal import lognormal_policy
from benchmarks.program import ppo_steps, run_program
from benchmarks.results import Report, Run
from rlhf_dist.observability.charts import chart

REPORT = Report(
    "end_to_end",
    case=("lengths", "side"),
    figures=("samples_per_second", "tokens_per_second", "step_seconds", "first_step_seconds", "length", "reward"),
)
TRL = "TRL"
GOAL = 2.5
#: Seconds for the few steps in which a mode of TRL is tried: one that hangs must not hold up the others.
TRY_LIMIT = 900.0
#: Of our runs: how many versions of the policy a trained token may be old.
STALENESS = (0, 1)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.table:
        runs = REPORT.read(options)
        REPORT.show(runs)
        conclude(runs)
        return
    checked = check_trl(options.trl_python)
    if not checked["ppo"]:
        Console().print(f"PPO is not compared: TRL {checked['version']} has no trainer for it (1.13 took it out)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        place = Place(folder.resolve(), options.trl_python, tuple(options.options))
        runs, settings = measure(options, place)
    REPORT.finish(runs, settings | {"trl": checked}, options)
    conclude(runs)
    if not options.small or options.out:
        out = options.out or Path(__file__).parent / "results" / "end_to_end.json"
        out.with_suffix(".svg").write_text(plot(runs))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = REPORT.parser("GRPO from prompt to update beside TRL's, on the same cores.", repetitions=3)
    names = [case.lengths for case in CASES]
    parser.add_argument("--lengths", nargs="+", choices=names, default=names, help="default: both")
    parser.add_argument("--trl-python", default=sys.executable, metavar="PATH", help="interpreter that has TRL")
    parser.add_argument(
        "--trl-modes", nargs="+", choices=list(TRL_MODES), default=list(TRL_MODES), metavar="MODE",
        help=f"of these the fastest is measured; default: {'; '.join(TRL_MODES)}",
    )  # fmt: skip
    parser.add_argument(
        "--trl-settings", type=json.loads, metavar="JSON",
        help="arguments of GRPOConfig as a further mode, such as '{\"cache_implementation\": \"static\"}'",
    )  # fmt: skip
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="of our config, for both S")
    parser.add_argument("--policy", type=Path, metavar="FOLDER", help="for short; default: SFT with the default config")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where all files go, and stay")
    return parser.parse_args(arguments)


def check_trl(python: str) -> dict[str, Any]:
    """What ``benchmarks.trl_run`` finds; ends the program where it is not the release that is compared."""
    command = [python, "-m", "benchmarks.trl_run", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    wanted = REQUIREMENTS["trl"]
    if f"trl=={found['version']}" not in wanted.split():  # other releases may name their options otherwise
        why = found.get("error") or f"the one there is {found['version']}"
        remedy = f"pip install --target FOLDER --no-deps {wanted}, and run with PYTHONPATH=FOLDER or --trl-python"
        raise SystemExit(f"{python} has not the TRL that is compared: {why}\n{remedy}")
    return found


def measure(options: argparse.Namespace, place: Place) -> tuple[list[Run], dict[str, Any]]:
    """All runs, repetition by repetition in turns, and the settings that they depend on."""
    runs, settings = [], {}
    modes = {name: TRL_MODES[name] for name in options.trl_modes}
    if options.trl_settings:
        modes["as given"] = options.trl_settings
    for case in (case for case in CASES if case.lengths in options.lengths):
        case = tiny(case) if options.small else case
        policy = policy_for(case, options, place)
        tried = try_modes(case, policy, modes, place)
        best = fastest(tried)
        config = trl_config(case, place, modes[best])
        settings[case.lengths] = {
            **asdict(case),
            "ours": {f"S={s}": our_options(case, Path("POLICY"), s, place) for s in STALENESS},
            "trl_config": config | {"output_dir": "FOLDER"},
            "trl_mode": best,
            "trl_modes": tried,
            "cores": place.cores,
        }
        for repetition in range(1 if options.small else options.repetitions):
            case_runs = one_repetition(case, policy, config, place)
            runs += [{"lengths": case.lengths, "side": s, "repetition": repetition, **r} for s, r in case_runs.items()]
    return runs, settings


def one_repetition(case: Case, policy: Path, config: dict[str, Any], place: Place) -> dict[str, Run]:
    """A run of each side."""
    ours = {f"ours, S={staleness}": run_ours(case, policy, staleness, place) for staleness in STALENESS}
    return ours | {TRL: run_trl(case, policy, config, place)}


def policy_for(case: Case, options: argparse.Namespace, place: Place) -> Path:
    """The checkpoint that both sides start from."""
    if case.lengths == "log-normal":
        model = MODEL | {"max_position_embeddings": case.max_prompt_length + case.max_response_length}
        return lognormal_policy(place.folder / "log-normal", model, MEDIAN, SIGMA)
    if options.policy:
        return Path(options.policy).resolve()
    few = ["data.world.demonstrations=640", "evaluation.prompts=8"] if options.small else []
    place_options = [f"run.root={place.folder}", "run.name=sft", "pipeline.stages=[sft]", *few]
    subprocess.run([sys.executable, "-m", "rlhf_dist.main", *place_options], cwd=ROOT, check=True)
    return place.folder / "sft" / "sft"


def try_modes(case: Case, policy: Path, modes: dict[str, dict[str, Any]], place: Place) -> dict[str, dict[str, Any]]:
    """Samples per second of each mode of TRL, from few steps, or how it failed; without choice nothing is measured."""
    if len(modes) == 1:
        return {name: {"settings": settings} for name, settings in modes.items()}
    short = replace(case, steps=case.warm_up + 3)
    tried: dict[str, dict[str, Any]] = {}
    for name, settings in modes.items():
        tried[name] = {"settings": settings}
        try:
            run = run_trl(short, policy, trl_config(short, place, settings), place, TRY_LIMIT)
            tried[name]["samples_per_second"] = run["samples_per_second"]
        except subprocess.CalledProcessError as error:
            tried[name]["error"] = last_line(error.stderr)
        except subprocess.TimeoutExpired:
            tried[name]["error"] = f"{short.steps} steps took more than {TRY_LIMIT:.0f} s"
        Console().print(case.lengths, TRL, tried[name])
    return tried


def fastest(tried: dict[str, dict[str, Any]]) -> str:
    """The mode to measure.

    Raises:
        ValueError: none of them runs.
    """
    if len(tried) == 1:
        return next(iter(tried))
    rates = {name: found["samples_per_second"] for name, found in tried.items() if "samples_per_second" in found}
    if not rates:
        raise ValueError(f"no mode of TRL runs here: {tried}")
    return max(rates, key=lambda name: rates[name])


def last_line(text: str) -> str:
    """What an exception says, from the output of the program that it ended."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")[:500]


def run_ours(case: Case, policy: Path, staleness: int, place: Place) -> Run:
    """One run of the program."""
    root = Path(tempfile.mkdtemp(prefix="ours", dir=place.folder))
    started = time.time()
    lines = ppo_steps(run_program(root, our_options(case, policy, staleness, place)))
    names = {"time": "time", "reward": "rollout/reward_mean", "length": "rollout/response_length_mean"}
    steps = [{name: line[key] for name, key in names.items()} for line in lines]
    # Beside the last S steps nothing is generated any more.
    return figures(steps, started, case, uncounted=staleness)


def run_trl(case: Case, policy: Path, config: dict[str, Any], place: Place, limit: float | None = None) -> Run:
    """The same with TRL, in a process of its own that may take ``limit`` seconds."""
    root = Path(tempfile.mkdtemp(prefix="trl", dir=place.folder))
    job = {"policy": str(policy), "prompts": prompts_of(case, policy, place), "reward": REWARD, "config": config}
    (root / "job.json").write_text(json.dumps(job | {"steps": str(root / "steps.jsonl")}))
    started = time.time()
    command = [place.trl_python, "-m", "benchmarks.trl_run", str(root / "job.json")]
    environ = environment(place.cores)
    done = subprocess.run(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True, timeout=limit)
    (root / "stderr").write_text(done.stderr)
    done.check_returncode()
    steps = [json.loads(line) for line in (root / "steps.jsonl").read_text().splitlines()]
    return figures(steps, started, case)


def prompts_of(case: Case, policy: Path, place: Place) -> list[dict[str, Any]]:
    """The prompts of all steps in the order in which our side trains them."""
    from rlhf_dist.config_io import load
    from rlhf_dist.data.load import load_prompts
    from rlhf_dist.data.prompts import PromptOrder
    from rlhf_dist.data.tokenization import load_tokenizer

    cfg = load(None, our_options(case, policy, 0, place))
    table = load_prompts(cfg, str(policy), "train")[0]
    order = PromptOrder(table.num_rows, cfg.seed, cfg.data.shuffle).take(case.prompts * case.steps)
    rows = table.take(order).to_pylist()
    # With the special tokens, which the column ``prompt`` leaves out: TRL adds none of its own.
    texts = load_tokenizer(str(policy)).batch_decode([row["prompt_ids"] for row in rows])
    return [
        {"prompt": text, "ids": row["prompt_ids"], "fields": json.loads(row["fields"])}
        for text, row in zip(texts, rows, strict=True)
    ]


def figures(steps: Sequence[dict[str, float]], started: float, case: Case, uncounted: int = 0) -> Run:
    """What a run came to.

    Args:
        steps: ``time`` when each one ended, mean ``reward`` and ``length`` of its samples.
        started: time when the process was started.
        uncounted: last steps that say nothing of the speed.

    Raises:
        ValueError: steps are missing.
    """
    if len(steps) != case.steps:
        raise ValueError(f"{case.lengths}: {len(steps)} steps were recorded, {case.steps} were to be made")
    first, last = case.warm_up - 1, case.steps - 1 - uncounted
    counted, seconds = steps[first + 1 : last + 1], steps[last]["time"] - steps[first]["time"]
    per_step = [b["time"] - a["time"] for a, b in zip(steps[first:last], counted, strict=True)]
    tokens = sum(step["length"] for step in counted) * case.samples_per_step
    quarter = steps[-max(1, case.steps // 4) :]
    return {
        "samples_per_second": len(counted) * case.samples_per_step / seconds,
        "tokens_per_second": tokens / seconds,
        "step_seconds": statistics.median(per_step),
        "first_step_seconds": steps[0]["time"] - started,
        "length": statistics.mean(step["length"] for step in counted),
        "reward": statistics.mean(step["reward"] for step in quarter),
        "curve": {
            "samples": [(i + 1) * case.samples_per_step for i in range(case.steps)],
            "seconds": [step["time"] - steps[0]["time"] for step in steps],
            "reward": [step["reward"] for step in steps],
        },
    }


def conclude(runs: list[Run]) -> None:
    """Print the ratios that matter: samples per second against the goal, and reward at the end."""
    for lengths, side, ratio, ours, trl in ratios(runs):
        goal = f", goal {GOAL}" if lengths == "log-normal" else ""
        rewards = f"; reward in the last quarter {ours:.3f} and {trl:.3f}" if lengths == "short" else ""
        Console().print(f"{lengths}: {side} / {TRL} in samples/s: {ratio:.2f}{goal}{rewards}")


def ratios(runs: list[Run]) -> list[tuple[str, str, float, float, float]]:
    """Lengths, our side, samples per second over TRL's, reward of both at the end; medians of the repetitions."""
    medians, found = REPORT.medians(runs), []
    for (lengths, side), row in medians.items():
        trl = medians.get((lengths, TRL))
        if side != TRL and trl:
            ratio = row["samples_per_second"] / trl["samples_per_second"]
            found.append((lengths, side, ratio, row["reward"], trl["reward"]))
    return found


def curves(runs: list[Run], against: str) -> dict[str, list[tuple[float, float | None]]]:
    """Reward by side for the short lengths, mean over the repetitions; ``against``: samples or seconds."""
    series: dict[str, list[tuple[float, float | None]]] = {}
    for side in dict.fromkeys(run["side"] for run in runs):
        same = [run["curve"] for run in runs if (run["lengths"], run["side"]) == ("short", side)]
        if same:
            across, up = (map(statistics.mean, zip(*(c[k] for c in same), strict=True)) for k in (against, "reward"))
            series[side] = list(zip(across, up, strict=True))
    return series


def plot(runs: list[Run]) -> str:
    """Reward against samples and against seconds after the first step; an SVG that stands alone."""
    axes = {"samples": "samples", "seconds": "seconds after the first step"}
    figures = [
        chart(f"Gold score against {against}", "", curves(runs, against), axis) for against, axis in axes.items()
    ]
    return drawing([figure for figure in figures if figure])  # without the short lengths there is no curve


if __name__ == "__main__":
    main()
