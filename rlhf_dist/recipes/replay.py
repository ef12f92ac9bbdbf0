"""Replay of a batch on which a run stopped: no generators, no rewards, one learner rank on this machine.

    python -m rlhf_dist.main replay RUN/failed/step_000012

Forward and backward of every row alone, then of the whole minibatch, without an optimizer step.
"""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path

import ray
from pydantic import TypeAdapter

from rlhf_dist.actors import group as actor_group
from rlhf_dist.actors.failed_batch import MODEL, About, Replayed
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.waiting import WorkerFailed
from rlhf_dist.connection import start_local
from rlhf_dist.observability.logs import quiet_libraries
from rlhf_dist.observability.terminal import Terminal

#: Seconds until the learner must be up.
STARTUP_LIMIT = 600.0
#: MB of Ray's object store: the learner reads the batch from its file.
OBJECT_STORE = 100
#: Rows that are shown, those that are not finite first.
SHOWN = 50


def replay(folder: Path, terminal: Terminal | None = None) -> int:
    """Exit code: 0 all is finite here, 1 the fault is there again, or a process failed.

    Raises:
        ValueError: ``folder`` is not what a failed run wrote.
    """
    terminal = terminal or Terminal()
    folder = folder.resolve()
    about = About.read(folder)
    terminal.title(f"replay: {about.stage}, step {about.step}, {about.role}, {about.place}")
    terminal.info(f"the run said: {about.message}")
    try:
        found = _replayed(folder, TypeAdapter(LearnerSpec).validate_python(about.spec), terminal)
    except WorkerFailed as error:
        terminal.error(f"{error}")
        return 1
    return show(found, terminal)


def show(found: list[Replayed], terminal: Terminal) -> int:
    """Print the rows and the whole minibatch; returns the exit code."""
    for part in found:
        rows = [
            [name, f.loss, f.grad_norm, f.finite, ", ".join(columns)]
            for name, f, columns in sorted(part.rows, key=lambda row: row[1].finite)
        ]
        title = "Rows of the minibatch, each alone" if part.source == "batch" else "Rows of the pretraining text"
        terminal.table(title, ["row", "loss", "gradient norm", "finite", "columns not finite"], rows[:SHOWN])
        if len(rows) > SHOWN:
            rest = ", all of them finite" if all(row[3] for row in rows[SHOWN:]) else ""
            terminal.info(f"and {len(rows) - SHOWN} rows more{rest}")
        terminal.info(f"all {len(rows)} together: loss {part.loss:.6g}, gradient norm at most {part.norm_bound:.6g}")
    if all(part.finite for part in found):
        terminal.info("finite here: every row alone, and all together")
        return 0
    faulty = sum(not f.finite for part in found for _, f, _ in part.rows)
    terminal.error(f"not finite here either: {f'{faulty} rows, each alone' if faulty else 'all together'}")
    return 1


def _replayed(folder: Path, spec: LearnerSpec, terminal: Terminal) -> list[Replayed]:
    quiet_libraries(_logs(folder) / "driver.log")
    actor_group.log_dir = str(_logs(folder))
    start_local(cpus=None, object_store_mb=OBJECT_STORE)
    try:
        spec = here(spec, folder, ray.cluster_resources())
        group = LearnerGroup(spec, "PACK", STARTUP_LIMIT).start()
        with terminal.starting({spec.role: 1}) as starting:
            group.wait_ready()
            starting.ready(spec.role)
        return group.replay(str(folder))
    finally:
        ray.shutdown()


def _logs(folder: Path) -> Path:
    path = folder / "logs"
    path.mkdir(exist_ok=True)
    return path


def here(spec: LearnerSpec, folder: Path, resources: dict[str, float]) -> LearnerSpec:
    """``spec`` for the saved model and one rank with the resources of this machine.

    Where the GPUs that the run had are missing it runs on the CPU, which knows neither offloading nor packing.
    """
    learner = spec.learner.model_copy(
        update={
            "ranks": 1,
            "zero_stage": min(spec.learner.zero_stage, 2),
            "cpus": min(spec.learner.cpus, resources["CPU"]),
            "offload_params": False,
            "resources": {},
        }
    )
    spec = changed(spec, model_path=str(folder / MODEL), learner=learner, restore=None)
    if learner.gpus <= resources.get("GPU", 0):
        return spec
    return changed(
        spec,
        learner=learner.model_copy(update={"gpus": 0, "offload_optimizer": False}),
        model=spec.model.model_copy(update={"attention": "sdpa"}),
        packing=False,
    )
