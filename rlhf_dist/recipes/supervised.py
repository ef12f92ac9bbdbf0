"""What the stages that learn from a fixed data set share: their learner, minibatches over one table, a bar, a log."""

from __future__ import annotations

import time
from typing import Literal

from ray import ObjectRef

from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import ObjectiveName
from rlhf_dist.actors.stats import PendingStats
from rlhf_dist.config import SupervisedConfig
from rlhf_dist.data.prompts import minibatches
from rlhf_dist.recipes import groups
from rlhf_dist.run import Run

#: Optimizer steps that are sent to the ranks in one call.
STEPS_PER_CALL = 10


def total_steps(rows: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps for ``epochs`` passes over ``rows``; the last incomplete batch of a pass is left out.

    Raises:
        ValueError: fewer rows than one batch.
    """
    if rows < batch_size:
        raise ValueError(f"only {rows} rows for a batch of {batch_size}: lower batch_size, or check the data")
    return max(1, round(rows // batch_size * epochs))


def learner(
    run: Run,
    role: str,
    model_path: str,
    cfg: SupervisedConfig,
    rows: int,
    *,
    head: Literal["policy", "scalar"],
    objective: ObjectiveName,
) -> LearnerGroup:
    """The stage's learner, up and ready."""
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
        total_steps=total_steps(rows, cfg.batch_size, cfg.epochs),
    )
    run.start(**{role: group})
    return group


def train(
    run: Run, learner: LearnerGroup, table: ObjectRef, cfg: SupervisedConfig, rows: int, show: str
) -> dict[str, float]:
    """Train on ``table``; one call is always in flight while the next is queued. Returns the last call's means.

    Args:
        show: the metric beside the loss on the bar.
    """
    stage, steps = run.stage.label, total_steps(rows, cfg.batch_size, cfg.epochs)
    batches = minibatches(rows, cfg.batch_size, steps, [run.cfg.seed])
    calls = [batches[i : i + STEPS_PER_CALL] for i in range(0, steps, STEPS_PER_CALL)]
    in_flight: list[PendingStats] = []
    means: dict[str, float] = {}
    done = 0
    with run.terminal.stage(stage, steps) as bar:
        started = time.monotonic()
        for i, call in enumerate(calls):
            in_flight.append(learner.update(table, call))
            while len(in_flight) > 1 or (in_flight and i == len(calls) - 1):
                with run.keeping_failed_batch(stage, [learner]):
                    results = in_flight.pop(0).steps()
                for figures in results:
                    done += 1
                    run.log(stage, done, {f"train/{k}": v for k, v in figures.items()})
                means = {k: sum(r[k] for r in results) / len(results) for k in results[0]}
                rate = done * cfg.batch_size / (time.monotonic() - started)
                bar.update(done, {"loss": means["loss"], show: means[show], "samples/s": rate})
    return means
