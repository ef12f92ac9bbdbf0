"""Distillation: the student learns the teacher's next-token distributions; with a context, context distillation.

    python -m rlhf_dist.main recipe=distill model.path=... distill.context="..."

The teacher runs on the generators. It reads each demonstration, and texts of
another source if there is one, behind the context. Its most likely tokens at
every position and their log-probabilities are written to ``distill_teacher/``
in the run folder, once. The student, which does not see the context, learns them.

Source: Askell et al., 2112.00861; Bai et al., 2204.05862.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from ray import ObjectRef

from rlhf_dist.actors.data import join_columns, load_table, read_arrow, write_arrow
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.recipes import groups, supervised
from rlhf_dist.run import Run

#: Rows that a generator reads in one call.
ROWS_PER_CALL = 1024


def distill(run: Run, model_path: str) -> str:
    """Returns the folder of the student.

    The summary has the KL on held-out rows before and after. Before, a student that begins as the teacher is the
    teacher without the context.
    """
    cfg = run.cfg.distill
    taught = run.once(partial(teach, run, cfg.teacher or model_path), teacher_name(run))
    table, rows = read_arrow(str(taught / "train.arrow"))
    test, test_rows = read_arrow(str(taught / "test.arrow"))
    student = run.model_path if cfg.from_scratch else model_path
    learner = supervised.learner(run, "distill", student, cfg, rows, test_rows, head="policy", objective="distill")
    supervised.train(run, learner, table, cfg, rows, show="lr", test=(test, test_rows), loss="kl")
    learner.export(run.result, run.tokenizer_dir)
    run.collect_spans()
    run.finish_stage()
    return run.result


def teacher_name(run: Run) -> str:
    """Of what the teacher says, and of its folder."""
    return f"{run.stage.name}_teacher"


def teach(run: Run, teacher_path: str) -> str:
    """The teacher reads everything; returns the folder of ``train.arrow`` and ``test.arrow``."""
    cfg = run.cfg.distill
    tables: dict[str, ObjectRef] = {}
    reports: dict[str, dict[str, Any]] = {}
    for split, what in (("train", "demonstrations"), ("test", "held-out demonstrations")):
        tables[split], reports[split] = load_table("distillation", run.cfg, run.tokenizer_dir, split)
        run.note_rows(what, reports[split])
    rows = {split: report["rows"] for split, report in reports.items()}
    supervised.total_steps(run.stage.label, cfg, rows["train"], rows["test"])  # refuses too few before anything starts
    run.summary.set(f"{run.stage.label}.demonstrations", rows["train"] - reports["train"]["extra"])
    run.summary.set(f"{run.stage.label}.extra", reports["train"]["extra"])
    longest = max(report["longest"] for report in reports.values())
    teacher = groups.generators(run, teacher_path, from_learner=False, context=longest + 1)
    run.start(generator=teacher)
    seen = {"rows": 0.0, "tokens": 0.0, "probability": 0.0}
    with run.terminal.stage("teacher", sum(rows.values())) as bar:
        started = time.monotonic()
        for split, table in tables.items():  # one after the other: the generators tell texts by their rows
            calls = np.array_split(np.arange(rows[split]), max(1, -(-rows[split] // ROWS_PER_CALL)))
            parts = [teacher.next_tokens(i, table, call, cfg.top_k) for i, call in enumerate(calls)]
            for figures, _ in parts:
                new = wait_for(figures, "generator, reading demonstrations")
                seen = {name: seen[name] + new[name] for name in seen}
                kept = seen["probability"] / seen["tokens"]
                run.log("teacher", int(seen["rows"]), {"teacher/kept_probability": kept})
                rate = seen["rows"] / (time.monotonic() - started)
                bar.update(int(seen["rows"]), {"kept probability": kept, "rows/s": rate})
            joined = join_columns(table, [columns for _, columns in parts], "teacher")
            write_arrow(joined, run.path(teacher_name(run), f"{split}.arrow"))
    run.summary.set(f"{run.stage.label}.kept_probability", kept)
    run.collect_spans()
    run.finish_stage()
    return run.path(teacher_name(run))
