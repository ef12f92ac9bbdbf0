"""Distillation: the student learns the teacher's next-token distributions; with a context, context distillation.

    python -m rlhf_dist.main recipe=distill model.path=... distill.context="..."

The teacher runs on the generators. It reads each demonstration, behind the
context if there is one, and its most likely tokens at every position are kept
in the object store. The student, which does not see the context, learns them.

Source: Askell et al., 2112.00861; Bai et al., 2204.05862.
"""

from __future__ import annotations

import time

import numpy as np

from rlhf_dist.actors.data import join_columns, load_table
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.recipes import groups, supervised
from rlhf_dist.run import Run

#: Rows that a generator reads in one call.
ROWS_PER_CALL = 1024


def distill(run: Run, model_path: str) -> str:
    """Returns the folder of the student."""
    cfg = run.cfg.distill
    table, report = load_table("distillation", run.cfg, run.tokenizer_dir)
    run.note_rows("demonstrations", report)
    rows = report["rows"]
    teacher = groups.generators(run, cfg.teacher or model_path, from_learner=False, context=report["longest"] + 1)
    run.start(generator=teacher)
    calls = np.array_split(np.arange(rows), -(-rows // ROWS_PER_CALL))
    with run.terminal.stage("teacher", rows) as bar:
        started, done = time.monotonic(), 0
        parts = [teacher.next_tokens(i, table, call, cfg.top_k) for i, call in enumerate(calls)]
        for count, _ in parts:
            done += wait_for(count, "generator, reading demonstrations")
            bar.update(done, {"rows/s": done / (time.monotonic() - started)})
    table = join_columns(table, [part for _, part in parts], "teacher")
    run.finish_stage()

    student = run.model_path if cfg.from_scratch else model_path
    learner = supervised.learner(run, "distill", student, cfg, rows, head="policy", objective="distill")
    last = supervised.train(run, learner, table, cfg, rows, show="lr")
    run.summary.set(f"{run.stage.label}.loss", last["loss"])
    run.summary.set(f"{run.stage.label}.demonstrations", rows)
    learner.export(run.result, run.tokenizer_dir)
    run.collect_spans()
    run.finish_stage()
    return run.result
