"""The reward model: Bradley-Terry on comparisons, or on all pairs of rankings; then a report on held-out comparisons.

    python -m rlhf_dist.main recipe=reward_model model.path=...

Source: Ouyang et al., 2203.02155; Bai et al., 2204.05862.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.actors.data import load_table, preferred_responses
from rlhf_dist.recipes import supervised
from rlhf_dist.recipes.evaluate_reward import held_out_comparisons, report
from rlhf_dist.run import Run

#: Preferred responses whose mean score becomes 0.
REFERENCE_RESPONSES = 1024


def reward_model(run: Run, model_path: str, compared: Sequence[str] = ()) -> str:
    """Train from ``model_path``; returns the folder of the result.

    Args:
        compared: folders of comparisons that are learnt beside those of the data.
    """
    cfg = run.cfg.reward_model
    kind = "rankings" if cfg.loss == "kwise" else "comparisons"
    noise = [cfg.label_noise] if kind == "comparisons" else []
    table, loaded = load_table(kind, run.cfg, run.tokenizer_dir, "train", cfg.max_length, compared, *noise)
    run.note_rows(kind, loaded)
    test, test_rows = held_out_comparisons(run)
    rows, label = loaded["rows"], run.stage.label
    start = cfg.path or model_path
    learner = supervised.learner(run, "reward_model", start, cfg, rows, test_rows, head="scalar", objective=cfg.loss)
    supervised.train(run, learner, table, cfg, rows, show="accuracy", test=(test, test_rows))
    run.summary.set(f"{label}.{kind}", rows)
    if cfg.label_noise:
        run.summary.set(f"{label}.flipped", loaded["flipped"])
    if cfg.center:
        reference = preferred_responses(table, REFERENCE_RESPONSES, run.cfg.seed)
        run.summary.set(f"{label}.mean", learner.center(reference))
    learner.export(run.result, run.tokenizer_dir)
    report(run, learner.pair_outcomes(test))
    run.collect_spans()
    run.finish_stage()
    return run.result
