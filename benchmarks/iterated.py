"""Three rounds of comparisons, reward model and PPO, each with the newest policy, against one round; same budget.

    python -m benchmarks.iterated                    # three seeds
    python -m benchmarks.iterated --seeds 0 --kl-coef 0.05 --pairs 6000
    python -m benchmarks.iterated --table            # print what was measured so far

The budget is compared pairs and samples of PPO: each of N rounds gets the N-th part of both. SFT is made once for each
seed. With the KL penalty of the embedded default, 0.05, one round ends before its reward model is over-optimised, and
there is nothing to mend; next to none shows what comparisons of the newest policy are for (Bai et al., 2204.05862,
section 4.5). Runs that the results hold already are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import Rows, keep, kept, print_rows

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "iterated.json"
#: Steps of PPO in all rounds together.
STEPS = 120
#: Comparisons that are there before the first round, of demonstrations.
DATA = "data.world={comparisons: 2000}"
ROUND = "pipeline={stages: [sft], round: [compare, reward_model, ppo]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--kl-coef", type=float, nargs="+", default=[0.001], help="weight of the KL in the reward")
    parser.add_argument("--pairs", type=int, nargs="+", default=[12_000], help="compared in all rounds together")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "iterated", help="where the runs go")
    parser.add_argument("--table", action="store_true", help="print the results and exit")
    args = parser.parse_args()
    results = kept(RESULTS)
    if not args.table:
        for case in itertools.product(args.pairs, args.kl_coef, args.seeds, args.rounds):
            if not any((r["pairs"], r["kl_coef"], r["seed"], r["rounds"]) == case for r in results["runs"]):
                results["runs"].append(measure(*case, args.runs))
                keep(RESULTS, results)
    print_rows(rows(results["runs"]))


def measure(pairs: int, kl_coef: float, seed: int, rounds: int, runs: Path) -> dict[str, Any]:
    """Gold scores before the first and after every round."""
    name = f"{rounds}_rounds-{seed}-kl_{kl_coef:g}-{pairs}"
    options = [ROUND, DATA, f"pipeline.rounds={rounds}", f"seed={seed}", f"run.root={runs}", f"run.name={name}"]
    options += [f"compare.pairs={pairs // rounds}", f"train.steps={STEPS // rounds}", "run.save_rollouts=false"]
    options += [f"algo.kl_coef={kl_coef:g}"]
    subprocess.run([sys.executable, "-m", "rlhf_dist.main", *options], cwd=ROOT, check=True)
    summary = json.loads((runs / name / "summary.json").read_text())
    after = [summary["eval"][f"round_{i}/policy"] for i in range(1, rounds + 1)]
    return {
        "pairs": pairs,
        "kl_coef": kl_coef,
        "rounds": rounds,
        "seed": seed,
        "before": summary["eval"]["round_1/policy start"]["gold_score"],
        "gold_score": [figures["gold_score"] for figures in after],
        "kl": [figures["kl"] for figures in after],
        "accuracy": [summary[f"round_{i}/reward_model"]["accuracy"] for i in range(1, rounds + 1)],
        "seconds": summary["seconds"],
        "versions": summary["versions"],
        "options": [option.replace(str(runs), "RUNS") for option in options],
    }


def rows(runs: list[dict[str, Any]]) -> Rows:
    """One row for each budget of pairs, weight of the KL and number of rounds."""
    last = "gold score after the last, by seed"
    header = ("pairs", "kl_coef", "rounds", "SFT, mean", last, "mean after each", "KL, mean", "reward model's accuracy")
    case = lambda run: (run["pairs"], run["kl_coef"], run["rounds"])
    found: Rows = [header]
    for pairs, kl_coef, rounds in sorted(set(map(case, runs))):
        part = sorted((r for r in runs if case(r) == (pairs, kl_coef, rounds)), key=lambda r: r["seed"])
        means = lambda key, form, part=part: " ".join(
            form.format(statistics.mean(values)) for values in zip(*(r[key] for r in part), strict=True)
        )
        before = f"{statistics.mean(r['before'] for r in part):.3f}"
        golds = ", ".join(f"{r['seed']}: {r['gold_score'][-1]:.3f}" for r in part)
        figures = (means("gold_score", "{:.3f}"), means("kl", "{:.1f}"), means("accuracy", "{:.3f}"))
        found.append((f"{pairs:,}", f"{kl_coef:g}", str(rounds), before, golds, *figures))
    return found


if __name__ == "__main__":
    main()
