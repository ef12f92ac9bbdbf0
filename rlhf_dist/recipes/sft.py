"""Supervised finetuning: cross entropy on the responses of demonstrations.

python -m rlhf_dist.main recipe=sft
"""

from __future__ import annotations

from rlhf_dist.actors.data import load_table
from rlhf_dist.recipes import supervised
from rlhf_dist.run import Run


def sft(run: Run, model_path: str) -> str:
    """Finetune the model in ``model_path``; returns the folder of the result."""
    cfg = run.cfg.sft
    table, report = load_table("demonstrations", run.cfg, run.tokenizer_dir, "train", cfg.max_length)
    run.note_rows("demonstrations", report)
    test, test_report = load_table("demonstrations", run.cfg, run.tokenizer_dir, "test", cfg.max_length)
    run.note_rows("held-out demonstrations", test_report)
    rows, test_rows = report["rows"], test_report["rows"]
    learner = supervised.learner(run, "sft", model_path, cfg, rows, test_rows, head="policy", objective="sft")
    supervised.train(run, learner, table, cfg, rows, show="lr", test=(test, test_rows))
    run.summary.set(f"{run.stage.label}.demonstrations", rows)
    learner.export(run.result, run.tokenizer_dir)
    run.collect_spans()
    run.finish_stage()
    return run.result
