"""Gold score against KL on the embedded world: PPO with next to no KL penalty beside best-of-n of its initial policy.

    python -m benchmarks.overoptimization                 # proxies of 24,000 and 1,000 comparisons, three seeds
    python -m benchmarks.overoptimization --seeds 0 --comparisons 1000
    python -m benchmarks.overoptimization --table         # print and plot what was measured so far

For each seed one SFT policy, and reward models of it that have seen many comparisons or few: the proxies. Best-of-n is
estimated from 16 samples to each held-out prompt; its KL is the bound log n - (n - 1) / n. PPO weighs the KL by 1e-9,
which measures it and leaves the policy free. Runs that the results hold already are not repeated. Beside the results
there is a plot, the mean over the seeds.

Source: Gao et al., 2210.10760.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.drawing import drawing
from benchmarks.learning import ROOT, execute, shared_checkpoints
from benchmarks.results import Rows, keep, kept, print_rows
from rlhf_dist.evaluation.overoptimization import fit
from rlhf_dist.observability.charts import chart
from rlhf_dist.observability.metrics import read_metrics

RESULTS = Path(__file__).parent / "results" / "overoptimization.json"
#: What the shared reward model of a seed has seen.
SHARED = 24_000
LARGEST_N = 16
KL_COEF = 1e-9
FIGURES = ("reward", "gold_score")
#: The same in every method: held-out prompts, no greedy decoding.
EVALUATION = "evaluation={prompts: 512, greedy: false}"

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--comparisons", type=int, nargs="+", default=[SHARED, 1000], help="that a proxy learns from")
    parser.add_argument("--steps", type=int, default=120, help="of PPO")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="where the runs go")
    parser.add_argument("--table", action="store_true", help="print the results and exit")
    args = parser.parse_args()
    results = kept(RESULTS)
    todo = [(m, c, s) for s in args.seeds for c in args.comparisons for m in ("best-of-n", "ppo")]
    for method, comparisons, seed in [] if args.table else todo:
        if any((r["method"], r["comparisons"], r["seed"]) == (method, comparisons, seed) for r in results["runs"]):
            continue
        started = time.time()
        sft, proxy = models(seed, comparisons, args.runs)
        if method == "ppo":
            record = ppo(seed, comparisons, sft, proxy, args)
        else:
            record = best_of_n(seed, comparisons, sft, proxy, args.runs)
        wall = round(time.time() - started, 1)
        results["runs"].append({"method": method, "comparisons": comparisons, "seed": seed, **record, "seconds": wall})
        keep(RESULTS, results)
    print_rows(rows(results["runs"]))
    RESULTS.with_suffix(".svg").write_text(plot(results["runs"]))


def models(seed: int, comparisons: int, runs: Path) -> tuple[Path, Path]:
    """SFT policy and proxy of a seed; trained on the first call."""
    base = shared_checkpoints(seed, runs)
    if comparisons == SHARED:
        return base / "sft", base / "reward_model"
    name = f"proxy-{comparisons}-{seed}"
    if not (runs / name / "reward_model").exists():
        options = [f"model.path={base / 'sft'}", "model.architecture={}", f"data.world.comparisons={comparisons}"]
        options += ["pipeline.stages=[reward_model]", f"seed={seed}", f"run.root={runs}", f"run.name={name}"]
        execute(options, runs / name)
    return base / "sft", runs / name / "reward_model"


def best_of_n(seed: int, comparisons: int, sft: Path, proxy: Path, runs: Path) -> Record:
    """Proxy and gold of best-of-n, n = 1 ... 16, of the SFT policy."""
    name = f"best-of-n-{comparisons}-{seed}"
    sizes = list(range(1, LARGEST_N + 1))
    options = [*common(seed, sft, proxy, runs, name), "recipe=evaluate", EVALUATION]
    options += [f"evaluation.n_samples_per_prompt={LARGEST_N}", f"evaluation.best_of_n={sizes}"]
    found = execute(options, runs / name)["eval"]["policy"]
    points = [
        {"n": n, "kl": found[f"kl_bound_best_of_{n}"], **{f: found[f"{f}_best_of_{n}"] for f in FIGURES}} for n in sizes
    ]
    gain = [p["gold_score"] - found["gold_score"] for p in points]
    fitted = fit("bon", [math.sqrt(p["kl"]) for p in points], gain)
    return {"points": points, "stderr": {f: found["stderr"][f] for f in FIGURES}, "fit": fitted}


def ppo(seed: int, comparisons: int, sft: Path, proxy: Path, args: argparse.Namespace) -> Record:
    """Proxy, gold and measured KL of PPO, evaluation by evaluation."""
    name = f"ppo-{comparisons}-{seed}"
    options = [*common(seed, sft, proxy, args.runs, name), "recipe=ppo", f"critic.path={proxy}", EVALUATION]
    options += [f"algo.kl_coef={KL_COEF}", f"train.steps={args.steps}", f"run.eval_every={args.every}"]
    options += ["policy.optim.schedule=constant", "run.save_rollouts=false", "run.checkpoint_every=0"]
    gold = execute(options, args.runs / name)["overoptimization"]["gold_score"]
    rows = [row for row in read_metrics(args.runs / name / "metrics.jsonl") if row["stage"] == "eval"]
    keys = ["kl", *FIGURES, *(f"{f}_stderr" for f in FIGURES), "response_length_mean"]
    points = [{"step": row["step"], **{key: row[f"eval/{key}"] for key in keys}} for row in rows]
    return {"points": points, "turn": gold["turn"], "fit": gold["fit_rl"]}


def common(seed: int, sft: Path, proxy: Path, runs: Path, name: str) -> list[str]:
    reward = f"reward.components=[{{name: reward_model, model: {proxy}}}]"
    return [
        f"seed={seed}",
        f"model.path={sft}",
        "model.architecture={}",
        reward,
        f"run.root={runs}",
        f"run.name={name}",
    ]


def curves(runs: list[Record]) -> Iterable[tuple[int, str, list[Record], list[dict[str, float]]]]:
    """Comparisons, method, its runs, and its points as means over the seeds."""
    for comparisons in sorted({r["comparisons"] for r in runs}, reverse=True):
        for method in sorted({r["method"] for r in runs if r["comparisons"] == comparisons}):
            part = [r for r in runs if (r["comparisons"], r["method"]) == (comparisons, method)]
            points = zip(*(r["points"] for r in part), strict=False)
            yield comparisons, method, part, [{key: mean(p[key] for p in same) for key in same[0]} for same in points]


def rows(runs: list[Record]) -> Rows:
    """Where gold is highest and where each method ends, means over the seeds."""
    heads = ("proxy's comparisons", "method", "seeds", "start: gold", "highest gold", "there", "its KL", "its proxy")
    found: Rows = [(*heads, "end: gold", "its KL", "its proxy")]
    for comparisons, method, part, points in curves(runs):
        best, last = max(points, key=lambda p: p["gold_score"]), points[-1]
        where = f"n = {best['n']:g}" if method == "best-of-n" else f"step {best['step']:g}"
        of = lambda p: (f"{p['gold_score']:.3f}", f"{p['kl']:.2f}", f"{p['reward']:.2f}")
        gold, *others = of(best)
        start = f"{points[0]['gold_score']:.3f}"
        found.append((f"{comparisons:,}", method, str(len(part)), start, gold, where, *others, *of(last)))
    return found


def plot(runs: list[Record]) -> str:
    """One panel for each proxy, an SVG that stands alone: gold score against √KL."""
    figures = []
    found = list(curves(runs))
    for comparisons in dict.fromkeys(c for c, *_ in found):
        series = {
            "best-of-n, KL at most" if method == "best-of-n" else "PPO": [
                (math.sqrt(max(0.0, p["kl"])), p["gold_score"]) for p in points
            ]
            for c, method, _, points in found
            if c == comparisons
        }
        figures.append(chart(f"Gold score, proxy of {comparisons:,} comparisons", "", series, "√KL"))
    return drawing(figures)


if __name__ == "__main__":
    main()
