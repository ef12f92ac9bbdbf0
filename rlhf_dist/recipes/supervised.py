"""What the stages that learn from a fixed data set share: their learner, minibatches over one table, held-out rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from ray import ObjectRef

from rlhf_dist import checkpoint
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import ObjectiveName
from rlhf_dist.actors.stats import PendingStats
from rlhf_dist.config import SupervisedConfig
from rlhf_dist.data.prompts import minibatches, some_rows
from rlhf_dist.recipes import groups
from rlhf_dist.run import Run

#: Optimizer steps that are sent to the ranks in one call.
STEPS_PER_CALL = 10


def total_steps(stage: str, cfg: SupervisedConfig, rows: int, test_rows: int) -> int:
    """Optimizer steps for ``epochs`` passes over ``rows``; the last incomplete batch of a pass is left out.

    Raises:
        ValueError: fewer rows than one batch; or ``patience`` without held-out rows.
    """
    if rows < cfg.batch_size:
        raise ValueError(f"only {rows} rows for a batch of {cfg.batch_size}: lower batch_size, or check the data")
    if cfg.patience is not None and not test_rows:
        raise ValueError(f"{stage}.patience={cfg.patience} needs held-out rows, and there are none; see data.test")
    return max(1, round(rows // cfg.batch_size * cfg.epochs))


def learner(
    run: Run,
    role: str,
    model_path: str,
    cfg: SupervisedConfig,
    rows: int,
    test_rows: int,
    *,
    head: Literal["policy", "scalar"],
    objective: ObjectiveName,
) -> LearnerGroup:
    """The stage's learner, up and ready; raises as :func:`total_steps`."""
    group = groups.learner(
        run,
        role,
        model_path,
        head=head,
        objective=objective,
        placement=cfg.learner,
        optim=cfg.optim,
        micro_batch_tokens=cfg.micro_batch_tokens,
        packing=cfg.packing,
        total_steps=total_steps(role, cfg, rows, test_rows),
    )
    run.start(**{role: group})
    return group


class HeldOut:
    """What a learner makes of rows that it is not trained on; and, with ``patience``, which weights were best."""

    def __init__(
        self, learner: LearnerGroup, table: ObjectRef, rows: np.ndarray, patience: int | None, folder: str
    ) -> None:
        """``folder``: for the best weights, while training goes on."""
        self.learner, self.table, self.rows = learner, table, rows
        self.patience, self.folder = patience, folder
        self.before = learner.evaluate(table, rows)
        """Figures before the first step."""
        self.kept: dict[str, float] = {}
        """Figures of the weights that are the stage's result,"""
        self.kept_step = 0
        """and their step."""
        self.misses = 0
        """Evaluations since then."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures of the weights after ``step``."""
        figures = self.learner.evaluate(self.table, self.rows)
        if self.patience is not None and self.kept and not figures["loss"] < self.kept["loss"]:
            self.misses += 1
            return figures
        self.kept, self.kept_step, self.misses = figures, step, 0
        if self.patience is not None:
            self.learner.keep(self.folder)
        return figures

    @property
    def out_of_patience(self) -> bool:
        return self.patience is not None and self.misses >= self.patience

    def go_back(self) -> None:
        """Give the learner the best weights, if they are not its last ones."""
        if self.misses:
            self.learner.go_back(self.folder)
        if self.patience is not None:
            checkpoint.remove(self.folder)


def train(
    run: Run,
    learner: LearnerGroup,
    table: ObjectRef,
    cfg: SupervisedConfig,
    rows: int,
    show: str,
    test: tuple[ObjectRef, int],
    loss: str = "eval_loss",
) -> None:
    """Train on ``table`` until the data or the patience is at an end; afterwards the learner has the weights to keep.

    The loss (mean of the last call), the held-out loss before and after, and where it was stopped go into the summary.

    Args:
        show: the metric beside the loss on the bar.
        test: held-out table and its rows, perhaps none.
        loss: what the held-out loss is called in the summary.
    """
    stage = run.stage.label
    steps = total_steps(stage, cfg, rows, test[1])
    batches = minibatches(rows, cfg.batch_size, steps, [run.cfg.seed])
    held_out = _held_out(run, stage, learner, *test, cfg)
    pauses = range(cfg.eval_every, steps, cfg.eval_every) if held_out is not None and cfg.eval_every else ()
    means: dict[str, float] = {}
    shown: dict[str, float] = {}
    done = 0
    with run.terminal.stage(stage, steps) as bar, run.keeping_failed_batch(stage, [learner]):
        started = time.monotonic()
        for end in (*pauses, steps):
            for results in _updates(learner, table, batches[done:end]):
                records = [{f"train/{k}": v for k, v in figures.items()} for figures in results]
                done += len(records)
                if held_out is not None and done == end:
                    figures = held_out.evaluate(done)
                    records[-1] |= {f"eval/{k}": v for k, v in figures.items()}
                    shown = {"held-out loss": figures["loss"]}
                for step, record in enumerate(records, done - len(records) + 1):
                    run.log(stage, step, record)
                means = {k: sum(r[k] for r in results) / len(results) for k in results[0]}
                rate = done * cfg.batch_size / (time.monotonic() - started)
                bar.update(done, {"loss": means["loss"], **shown, show: means[show], "samples/s": rate})
            if held_out is not None and held_out.out_of_patience:
                break
    run.summary.set(f"{stage}.loss", means["loss"])
    if held_out is None:
        return
    held_out.go_back()
    if held_out.misses:
        run.terminal.info(f"{stage}: back to step {held_out.kept_step}, where the held-out loss is lowest")
    run.summary.set(f"{stage}.{loss}_before", held_out.before["loss"])
    run.summary.set(f"{stage}.{loss}", held_out.kept["loss"])
    run.summary.set(f"{stage}.stopped_at", done if done < steps else None)


def _held_out(
    run: Run, stage: str, learner: LearnerGroup, table: ObjectRef, rows: int, cfg: SupervisedConfig
) -> HeldOut | None:
    if not rows:
        run.terminal.info(f"{stage}: no held-out rows, so there is no held-out loss")
        return None
    sample = some_rows(rows, cfg.eval_rows, run.cfg.seed)
    return HeldOut(learner, table, sample, cfg.patience, run.path(f"best_{stage}"))


def _updates(
    learner: LearnerGroup, table: ObjectRef, batches: Sequence[np.ndarray]
) -> Iterator[list[dict[str, float]]]:
    """Figures of the optimizer steps, call by call; one call is always in flight while the next is queued."""
    in_flight: list[PendingStats] = []
    for i in range(0, len(batches), STEPS_PER_CALL):
        in_flight.append(learner.update(table, batches[i : i + STEPS_PER_CALL]))
        if len(in_flight) > 1:
            yield in_flight.pop(0).steps()
    yield in_flight.pop().steps()
