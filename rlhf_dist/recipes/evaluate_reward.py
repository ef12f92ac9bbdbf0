"""How good a reward model is: accuracy, calibration and two rules to beat, on held-out comparisons.

    python -m rlhf_dist.main recipe=evaluate_reward reward_model.path=runs/NAME/reward_model

``reward_model`` ends with the same report; ``evaluate_reward`` makes it of a model on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ray import ObjectRef

from rlhf_dist.actors.data import load_table
from rlhf_dist.data import parquet
from rlhf_dist.evaluation.preferences import judge
from rlhf_dist.recipes import groups
from rlhf_dist.run import Run

#: What is told of each set of pairs.
COLUMNS = ("pairs", "accuracy", "longer_wins", "shorter_wins", "difference")


def evaluate_reward(run: Run, model_path: str) -> None:
    """Judge the reward model in ``model_path``.

    Raises:
        ValueError: it gives every response the same score, as a model without a trained head does.
    """
    cfg = run.cfg.reward_model
    test, _ = held_out_comparisons(run)
    learner = groups.learner(
        run,
        "reward_model",
        model_path,
        head="scalar",
        objective=None,
        placement=cfg.learner,
        optim=None,
        micro_batch_tokens=cfg.micro_batch_tokens,
        packing=cfg.packing,
    )
    run.start(reward_model=learner)
    outcomes = learner.pair_outcomes(test)
    if not np.any(outcomes["difference"].to_numpy()):
        raise ValueError(
            f"{model_path}: all responses get the same score; is it a policy? A reward model is what "
            "recipe reward_model writes, a sequence classifier with one output"
        )
    report(run, outcomes)
    run.collect_spans()
    run.finish_stage()


def held_out_comparisons(run: Run) -> tuple[ObjectRef, int]:
    """``schema.COMPARISON``, labels as the data have them; and the number of rows."""
    limit = run.cfg.reward_model.max_length
    table, rows = load_table("comparisons", run.cfg, run.tokenizer_dir, "test", limit)
    run.note_rows("held-out comparisons", rows)
    return table, rows["rows"]


def report(run: Run, outcomes: pa.Table) -> None:
    """Figures of ``LearnerGroup.pair_outcomes`` into summary and terminal, the outcomes into the result."""
    parquet.write(outcomes, Path(run.result) / "held_out_pairs.parquet")
    found = judge(outcomes, run.cfg.seed)
    for name, value in found.items():
        run.summary.set(f"{run.stage.label}.{name}", value)
    sources = found["by_source"] if len(found["by_source"]) > 1 else {}  # a single one says nothing new
    _show(run, "Reward model on held-out pairs, and its lead over the better rule", "source", {"all": found, **sources})
    if found["by_agreement"]:
        _show(run, "By the share of annotators who agree", "share", found["by_agreement"])
    run.terminal.info(
        f"calibration error {found['calibration_error']:.3f}; log-likelihood {found['log_likelihood']:.3f} nats a pair "
        f"(a coin: {-np.log(2):.3f}); Brier score {found['brier']:.3f} (a coin: 0.25)"
    )


def _show(run: Run, title: str, name: str, parts: dict[str, dict[str, Any]]) -> None:
    heads = [name, "pairs", "accuracy", "longer wins", "shorter wins", "lead", "95 % interval"]
    rows = [
        [part, *(figures[column] for column in COLUMNS), "{:+.3f} to {:+.3f}".format(*figures["interval"])]
        for part, figures in parts.items()
    ]
    run.terminal.table(title, heads, rows)
