"""The reward model: Bradley-Terry on comparisons, or on all pairs of rankings; then accuracy on held-out comparisons.

    python -m rlhf_dist.main recipe=reward_model model.path=...

Source: Ouyang et al., 2203.02155; Bai et al., 2204.05862.
"""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
from ray import ObjectRef

from rlhf_dist.actors.data import load_table
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.recipes import supervised
from rlhf_dist.run import Run


def reward_model(run: Run, model_path: str, sampled: ObjectRef | None = None) -> str:
    """Train from ``model_path``; returns the folder of the result, ``reward_model/`` in the run folder.

    Args:
        sampled: rollouts of the SFT policy, of which the embedded world makes a part of its pairs.
    """
    cfg = run.cfg.reward_model
    kind = "rankings" if cfg.loss == "kwise" else "comparisons"
    table, report = load_table(kind, run.cfg, run.tokenizer_dir, "train", cfg.max_length, sampled)
    run.note_rows(kind, report)
    test, test_report = load_table("comparisons", run.cfg, run.tokenizer_dir, "test", cfg.max_length)
    run.note_rows("held-out comparisons", test_report)
    rows, test_rows = report["rows"], test_report["rows"]
    start = cfg.path or model_path
    learner = supervised.learner(run, "reward_model", start, cfg, rows, test_rows, head="scalar", objective=cfg.loss)
    supervised.train(run, "reward_model", learner, table, cfg, rows, show="accuracy", test=(test, test_rows))
    run.summary.set(f"reward_model.{kind}", rows)
    report_accuracy(run, learner, test)
    learner.export(run.path("reward_model"), run.tokenizer_dir)
    run.collect_spans()
    run.finish_stage()
    return run.path("reward_model")


def report_accuracy(run: Run, learner: LearnerGroup, test: ObjectRef) -> None:
    """Accuracy on held-out pairs, overall and by source, beside "the longer answer wins"."""
    pairs = learner.pair_outcomes(test)
    rows: list[list[Any]] = []
    for source in ["all", *sorted(set(pairs["source"].to_pylist()))]:
        part = pairs if source == "all" else pairs.filter(pc.equal(pairs["source"], source))
        accuracy, baseline = pc.mean(part["correct"]).as_py(), pc.mean(part["longer_wins"]).as_py()
        rows.append([source, part.num_rows, accuracy, baseline])
        key = "" if source == "all" else f".by_source.{source.replace('.', '_') or 'unknown'}"
        run.summary.set(f"reward_model{key}.accuracy", accuracy)
        run.summary.set(f"reward_model{key}.longer_wins", baseline)
        run.summary.set(f"reward_model{key}.pairs", part.num_rows)
    if len(rows) == 2:  # one source only: its row says nothing new
        rows.pop()
    run.terminal.table("Reward model on held-out pairs", ["source", "pairs", "accuracy", "longer answer wins"], rows)
