"""Direct preference optimisation: the policy learns from comparisons, without a reward model or sampling.

    python -m rlhf_dist.main recipe=dpo model.path=...

The reference is the policy before the first step: its log-probabilities of all
pairs are computed once, by the learner itself, so that no second model is held.

Source: Rafailov et al., 2305.18290; IPO: Azar et al., 2310.12036.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.actors.data import load_table
from rlhf_dist.recipes import supervised
from rlhf_dist.recipes.evaluate import compare
from rlhf_dist.run import Run


def dpo(run: Run, model_path: str, compared: Sequence[str] = ()) -> str:
    """Train from ``model_path``, compare before and after; returns the result's folder.

    Args:
        compared: folders of comparisons that are learnt beside those of the data.
    """
    cfg = run.cfg.dpo
    table, report = load_table("comparisons", run.cfg, run.tokenizer_dir, "train", cfg.max_length, compared)
    run.note_rows("comparisons", report)
    test, test_report = load_table("comparisons", run.cfg, run.tokenizer_dir, "test", cfg.max_length)
    run.note_rows("held-out comparisons", test_report)
    rows, test_rows = report["rows"], test_report["rows"]
    learner = supervised.learner(run, "dpo", model_path, cfg, rows, test_rows, head="policy", objective="dpo")
    table, test = learner.pair_logprobs(table), learner.pair_logprobs(test)
    supervised.train(run, learner, table, cfg, rows, show="accuracy", test=(test, test_rows))
    run.summary.set(f"{run.stage.label}.comparisons", rows)
    learner.export(run.result, run.tokenizer_dir)
    run.collect_spans()
    run.finish_stage()
    compare(run, {"sft": model_path, run.stage.label: run.result})
    return run.result
