"""A preference model from scratch on HH data: accuracy against two rules and a bag of bigrams, and with wrong labels.

    python -m benchmarks.preference_model FOLDER                                 # seeds 0, 1, 2
    python -m benchmarks.preference_model FOLDER --noise 0 0.1 0.2 0.3 0.4
    python -m benchmarks.preference_model --table                                # print what was measured so far

FOLDER holds train.jsonl.gz and test.jsonl.gz in the form of Anthropic's HH, with a `source` in each row. For each seed
one SFT run with configs/hh_cpu.yaml, and from it a reward model for each share of flipped labels. The bag of bigrams is
a logistic regression on the unigrams and bigrams that one response has more of than the other; it reads the same pairs
with the same labels flipped. Results that are there already are not measured again, so a broken benchmark goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.results import Rows, keep, kept, print_rows
from rlhf_dist.config_io import load
from rlhf_dist.data.load import load_comparisons
from rlhf_dist.data.tokenization import load_tokenizer
from rlhf_dist.evaluation.preferences import credit, figures, paired_interval

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "preference_model.json"
HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None
Texts = tuple[list[str], list[str]]
#: Figures whose mean over the seeds is shown.
MEANS = ("accuracy", "longer_wins", "shorter_wins", "difference", "bigrams", "to_bigrams")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0], help="shares of training labels to flip")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "preference_model", help="where the runs go")
    parser.add_argument("--table", action="store_true", help="print the results and exit")
    args = parser.parse_args()
    results = kept(RESULTS)
    if not args.table:
        if args.data is None:
            parser.error("FOLDER is missing: the data to train on")
        if not HAS_SKLEARN:
            print("scikit-learn is not installed (pip install 'rlhf_dist[bench]'): no bag of bigrams. The same command "
                  "adds it later from the runs, if they are still there.")  # fmt: skip
        for seed in args.seeds:
            for noise in args.noise:
                known = [r for r in results["runs"] if (r["seed"], r["noise"]) == (seed, noise)]
                if known and (known[0]["scikit-learn"] or not HAS_SKLEARN):
                    continue
                found = compare(trained(args.data.resolve(), seed, noise, args.runs.resolve()), seed, noise)
                results["runs"] = [r for r in results["runs"] if r not in known] + [found]
                keep(RESULTS, results)
    print_rows(rows(results["runs"]))
    print_rows(rows_noise(results["runs"]))


def trained(data: Path, seed: int, noise: float, runs: Path) -> Path:
    """The run folder of a reward model; trained if it is not there, and its SFT policy before it."""
    common = ["--config", str(ROOT / "configs" / "hh_cpu.yaml"), f"data.dir={data}", f"seed={seed}", f"run.root={runs}"]
    sft = execute(runs / f"sft-{seed}", [*common, "recipe=sft"])
    start = [f"model.path={sft / 'sft'}", "model.architecture={}", f"reward_model.label_noise={noise}"]
    return execute(runs / f"reward_model-{seed}-{noise:g}", [*common, "recipe=reward_model", *start])


def execute(folder: Path, arguments: list[str]) -> Path:
    """``python -m rlhf_dist.main`` into ``folder``, unless that holds a finished run."""
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "rlhf_dist.main", *arguments, f"run.name={folder.name}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def compare(folder: Path, seed: int, noise: float) -> dict[str, Any]:
    """Figures of the run in ``folder`` on all test pairs and on those of each source, beside the bag of bigrams."""
    outcomes = pq.read_table(folder / "reward_model" / "held_out_pairs.parquet")
    summary = json.loads((folder / "summary.json").read_text())
    bag = bag_of_bigrams(*texts(folder, noise)) if HAS_SKLEARN else None
    sources, preference = (outcomes[name].to_numpy(zero_copy_only=False) for name in ("source", "preference"))
    parts = {}
    for source in ["all", *sorted(set(sources))]:
        rows = (sources == source) | (source == "all")
        part = parts[source] = figures(outcomes.filter(pa.array(rows)), seed)
        if bag is not None:
            part |= beside_bag(outcomes, bag, rows & (preference != 0.5), seed)
    return {
        "seed": seed,
        "noise": noise,
        "flipped": summary["reward_model"].get("flipped", 0),
        "parts": parts,
        "versions": summary["versions"],
        "scikit-learn": metadata.version("scikit-learn") if HAS_SKLEARN else None,
        "commit": summary["commit"],
    }


def beside_bag(outcomes: pa.Table, bag: np.ndarray, rows: np.ndarray, seed: int) -> dict[str, Any]:
    preference = outcomes["preference"].to_numpy()[rows]
    model, other = (credit(x[rows], preference) for x in (outcomes["difference"].to_numpy(), bag))
    lead = float(model.mean() - other.mean())
    return {
        "bigrams": float(other.mean()),
        "to_bigrams": lead,
        "to_bigrams_interval": paired_interval(model, other, seed),
    }


def texts(folder: Path, noise: float) -> tuple[Texts, Texts]:
    """Chosen and rejected responses, for training and for test: exactly the pairs of the run, in its order."""
    cfg, tokenizer = load(str(folder / "config.yaml")), load_tokenizer(str(folder / "tokenizer"))
    found = []
    for split, share in (("train", noise), ("test", 0.0)):
        table, _ = load_comparisons(cfg, str(folder / "tokenizer"), split, cfg.reward_model.max_length, (), share)
        sides = (table[name].to_pylist() for name in ("chosen_ids", "rejected_ids"))
        chosen, rejected = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in sides)
        found.append((chosen, rejected))
    return found[0], found[1]


def bag_of_bigrams(train: Texts, test: Texts) -> np.ndarray:
    """Log-odds that the chosen response of each test pair wins. The penalty is chosen by cross-validation."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, KFold

    counts = CountVectorizer(ngram_range=(1, 2), min_df=2).fit(train[0] + train[1])
    surplus = lambda pairs: counts.transform(pairs[0]) - counts.transform(pairs[1])
    # Every other pair is turned round, for a classifier wants both labels. Without an intercept that changes no loss.
    label = np.where(np.arange(len(train[0])) % 2, 1, -1)
    search = GridSearchCV(
        LogisticRegression(fit_intercept=False, max_iter=1000),
        {"C": np.logspace(-4, 1, 11)},
        scoring="neg_log_loss",
        cv=KFold(5, shuffle=True, random_state=0),
    )
    search.fit(surplus(train).multiply(label[:, None]).tocsr(), label)
    return search.decision_function(surplus(test))


def rows(runs: list[dict[str, Any]]) -> Rows:
    """With the labels as they are: one row for each half and seed, and the means over the seeds."""
    heads = ("half", "seed", "accuracy", "longer wins", "shorter wins", "over the better rule", "95 %")
    found: Rows = [(*heads, "bigrams", "over bigrams", "95 %")]
    runs = sorted((r for r in runs if r["noise"] == 0), key=lambda r: r["seed"])
    for half in runs[0]["parts"] if runs else ():
        parts = [r["parts"][half] for r in runs]
        found += [(half, str(run["seed"]), *cells(part)) for run, part in zip(runs, parts, strict=True)]
        found.append((half, "mean", *cells(means(parts))))
    return found


def rows_noise(runs: list[dict[str, Any]]) -> Rows:
    """Means over the seeds on all pairs, by the share of training labels that were flipped."""
    found: Rows = [("flipped", "seeds", "accuracy", "lowest", "highest", "bigrams")]
    for noise in sorted({r["noise"] for r in runs}):
        parts = [r["parts"]["all"] for r in runs if r["noise"] == noise]
        seeds = " ".join(str(s) for s in sorted(r["seed"] for r in runs if r["noise"] == noise))
        accuracy = [p["accuracy"] for p in parts]
        bigrams = f"{mean['bigrams']:.3f}" if "bigrams" in (mean := means(parts)) else ""
        found.append((f"{noise:.0%}", seeds, *(f"{f(accuracy):.3f}" for f in (statistics.mean, min, max)), bigrams))
    return found


def means(parts: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.mean(p[key] for p in parts) for key in MEANS if all(key in p for p in parts)}


def cells(part: dict[str, Any]) -> list[str]:
    figure = lambda key, form: format(part[key], form) if key in part else ""
    interval = lambda key: "{:+.3f} to {:+.3f}".format(*part[key]) if key in part else ""
    rules = [figure(key, ".3f") for key in ("accuracy", "longer_wins", "shorter_wins")]
    leads = [figure("difference", "+.3f"), interval("interval"), figure("bigrams", ".3f")]
    return [*rules, *leads, figure("to_bigrams", "+.3f"), interval("to_bigrams_interval")]


if __name__ == "__main__":
    main()
