"""Comparisons of what the policy samples now, by a function or by people: the data of the next reward model.

    python -m rlhf_dist.main recipe=compare model.path=... compare.by=people

Source: Bai et al., 2204.05862, section 4.5 (online training); Ouyang et al., 2203.02155.
"""

from __future__ import annotations

import time
from pathlib import Path

from rlhf_dist.actors.data import ask_people, compare_samples, load_table, write_samples
from rlhf_dist.data.compare import ANSWERS_FILE, ASKED_FILE, SAMPLES_FILE
from rlhf_dist.recipes import groups
from rlhf_dist.recipes.evaluate import FIRST_GROUP
from rlhf_dist.run import Run, WaitingForPeople


def collect_comparisons(run: Run, model_path: str) -> str:
    """Sample, have pairs compared; returns the folder of the result.

    Raises:
        WaitingForPeople: they have not answered yet. The same command goes on when they have.
    """
    cfg, folder = run.cfg.compare, Path(run.result)
    if not (folder / SAMPLES_FILE).exists():
        sample(run, model_path)
    if cfg.by == "people" and not (folder / ANSWERS_FILE).exists():
        asked = ask_people(run.result, cfg, run.cfg.seed)
        raise WaitingForPeople(
            f"{asked} pairs are in {folder / ASKED_FILE}, one {{id, prompt, a, b}} a line. Put the answers into "
            f'{folder / ANSWERS_FILE}, one {{"id": ..., "better": "a", "b" or "tie"}} a line'
        )
    pairs = compare_samples(run.result, cfg, run.cfg.seed, run.stage.name)
    run.summary.set(f"{run.stage.label}.pairs", pairs)
    say = run.terminal.info if pairs else run.terminal.warn
    say(f"{run.stage.name}: {pairs} pairs compared")
    return run.result


def sample(run: Run, model_path: str) -> None:
    """Responses of the policy to training prompts, other ones in every round, into the folder of the result."""
    cfg = run.cfg.compare
    generators = groups.generators(run, model_path, from_learner=False)
    prompts, report = load_table("prompts", run.cfg, run.tokenizer_dir, "train")
    run.note_rows("prompts", report)
    run.start(generator=generators)
    rows = run.prompt_order(report["rows"]).take(min(cfg.prompts, report["rows"]))
    # Group ids make seeds: those of training and of evaluations are other ones.
    ids = [((2 + run.stage.round) * FIRST_GROUP + i, row) for i, row in enumerate(rows)]
    with run.terminal.stage(run.stage.label, len(ids)) as bar:
        started = time.monotonic()
        rollouts = generators.generate(prompts, ids, cfg.n_samples_per_prompt).wait(run.cfg.run.wait_limit)
        seconds = time.monotonic() - started
        bar.update(len(ids), {"samples": rollouts.samples, "tokens/s": rollouts.response_tokens / seconds})
    write_samples([part.chunk.table for part in rollouts.slices], prompts, run.tokenizer_dir, run.result)
    run.collect_spans()
    run.finish_stage()
