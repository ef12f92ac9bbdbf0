"""Every algorithm of ``configs/algorithms`` on the embedded world: gold score before and after, KL, seconds.

    python -m benchmarks.learning                       # all algorithms, three seeds; hours on two cores
    python -m benchmarks.learning --only grpo rloo --seeds 0
    python -m benchmarks.learning --stale               # PPO with staleness 1 and 4, with and without correction
    python -m benchmarks.learning --table               # print what was measured so far

One SFT and one reward-model checkpoint per seed is shared by all; each algorithm then gets the same number of steps
and of samples. Runs that the results hold already are not repeated, so a broken benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import Rows, keep, kept, print_rows

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "algorithms"
RESULTS = Path(__file__).parent / "results" / "learning.json"
#: It does not start from the shared policy but makes one.
LEFT_OUT = ("distill",)
#: PPO with generators that run ahead, beside the files of configs/algorithms.
STALE = {
    "ppo, S=1": ["rollout.max_staleness=1"],
    "ppo, S=4": ["rollout.max_staleness=4"],
    "ppo, S=4, no correction": ["rollout.max_staleness=4", "algo.rollout_correction=none"],
    "ppo, S=4, decoupled": ["rollout.max_staleness=4", "algo.policy_loss=decoupled_ppo"],
}
#: Steps of 128 samples: enough for every algorithm to show where it is going.
STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", help="names of files in configs/algorithms, without .yaml; ppo is the default"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="where the runs go")
    parser.add_argument("--stale", action="store_true", help="the runs with staleness instead")
    parser.add_argument("--table", action="store_true", help="print the results and exit")
    args = parser.parse_args()
    results = kept(RESULTS)
    if not args.table:
        files = ["ppo", *sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem not in LEFT_OUT)]
        names = list(STALE) if args.stale else args.only or files
        for seed in args.seeds:
            for name in names:
                if not any((r["algorithm"], r["seed"]) == (name, seed) for r in results["runs"]):
                    results["runs"].append(measure(name, seed, args.runs))
                    keep(RESULTS, results)
    print_rows(rows(results["runs"]))
    print_rows(rows_stale(results["runs"]), "with staleness")


def measure(name: str, seed: int, runs: Path) -> dict[str, Any]:
    """One algorithm from the seed's shared checkpoints."""
    base = shared_checkpoints(seed, runs)
    file = CONFIGS / f"{name}.yaml"
    by_default = name == "ppo" or name in STALE
    text = {} if by_default else yaml.safe_load(file.read_text())
    folder = f"{name.replace(', ', '-').replace(' ', '_').replace('=', '')}-{seed}"
    options = [f"seed={seed}", f"model.path={base / 'sft'}", "model.architecture={}", f"run.root={runs}"]
    stages = [stage for stage in text.get("pipeline", {}).get("stages", []) if stage != "sft"]
    if "reward_model" in text:  # a reward model of its own
        stages = ["compare", "reward_model", "ppo"]
    if stages:
        options += [f"pipeline.stages=[{','.join(stages)}]"]
    else:
        options += ["recipe=ppo", f"critic.path={base / 'reward_model'}"]
        if "components" not in text.get("reward", {}):
            options += [f"reward.components=[{{name: reward_model, model: {base / 'reward_model'}}}]"]
    options += [f"train.steps={STEPS}", f"run.name={folder}", "run.save_rollouts=false", *STALE.get(name, [])]
    started = time.time()
    summary = execute([*([] if by_default else ["--config", str(file)]), *options], runs / folder)
    last = stages[-1] if stages else "ppo"
    before, after = summary["eval"]["sft"], summary["eval"][last]
    return {
        "algorithm": name,
        "seed": seed,
        "sft": before["gold_score"],
        "gold_score": after["gold_score"],
        "gold_score_greedy": after["gold_score_greedy"],
        "kl": after.get("kl"),
        "stage_seconds": stage_seconds(runs / folder, last),
        "wall_seconds": round(time.time() - started, 1),
        "versions": summary["versions"],
        "options": [option.replace(str(runs), "RUNS") for option in options],
    }


def shared_checkpoints(seed: int, runs: Path) -> Path:
    """The run folder with ``sft`` and ``reward_model`` of a seed; trained on the first call."""
    folder = runs / f"base-{seed}"
    if not (folder / "reward_model").exists():
        options = [
            f"seed={seed}",
            f"run.root={runs}",
            f"run.name=base-{seed}",
            "pipeline.stages=[sft,compare,reward_model]",
        ]
        execute(options, folder)
    return folder


def execute(arguments: list[str], folder: Path) -> dict[str, Any]:
    """``python -m rlhf_dist.main``; returns the summary."""
    subprocess.run([sys.executable, "-m", "rlhf_dist.main", *arguments], cwd=ROOT, check=True)
    return json.loads((folder / "summary.json").read_text())


def stage_seconds(folder: Path, stage: str) -> float:
    """Seconds of the training steps alone, without start-up and evaluation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if line["stage"] == stage]
    return round((times[-1] - times[0]) * len(times) / max(1, len(times) - 1), 1)


def rows(runs: list[dict[str, Any]]) -> Rows:
    """For docs/benchmarks.md: one row for each algorithm, with the figures of all seeds."""
    plain = [r for r in runs if r["algorithm"] not in STALE]
    return _rows(sorted(plain, key=lambda r: (r["algorithm"] != "ppo", r["algorithm"])), "algorithm")


def rows_stale(runs: list[dict[str, Any]]) -> Rows:
    """The same of PPO by staleness."""
    return _rows([r for r in runs if r["algorithm"] in ("ppo", *STALE)], "")


def _rows(runs: list[dict[str, Any]], title: str) -> Rows:
    """Seconds are the lowest, which other work on the machine disturbed least."""
    seeds = sorted({r["seed"] for r in runs})
    each = ", ".join(map(str, seeds))
    found: Rows = [(title, f"gold score, seeds {each}", "mean", "greedy, mean", f"KL, seeds {each}", "seconds")]
    for name in dict.fromkeys(r["algorithm"] for r in runs):
        of = {r["seed"]: r for r in runs if r["algorithm"] == name}
        figures = lambda key, form, of=of: " ".join(
            form.format(of[s][key]) if s in of and of[s][key] is not None else "–" for s in seeds
        )
        mean = lambda key, of=of: f"{statistics.mean(r[key] for r in of.values()):.3f}"
        seconds = f"{min(r['stage_seconds'] for r in of.values()):.0f}"
        gold, kl = figures("gold_score", "{:.3f}"), figures("kl", "{:.2f}")
        found.append((name, gold, mean("gold_score"), mean("gold_score_greedy"), kl, seconds))
    return found


if __name__ == "__main__":
    main()
