"""When checkpoints are written, what the driver puts into them, and where a run goes on.

A checkpoint of PPO is ``learner/policy``, ``learner/critic`` (DeepSpeed's shards, by the ranks themselves), ``policy/``
(which vLLM and transformers load) and what the driver knows: its ``state`` in the manifest, written last.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from ray import ObjectRef

from rlhf_dist import checkpoint
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.waiting import explained, wait_for
from rlhf_dist.checkpoint import Checkpoint
from rlhf_dist.run import Interrupted, Run


@dataclass
class TrainState:
    """What PPO's loop knows beside its learners; JSON can hold it."""

    step: int = 0
    """Steps that were trained."""
    stream: dict[str, Any] | None = None
    """:meth:`~rlhf_dist.actors.stream.RolloutStream.state_dict`."""
    kl_control: dict[str, float] | None = None
    before: dict[str, Any] = field(default_factory=dict)
    """The evaluation before the first step."""
    history: dict[str, Any] = field(default_factory=dict)
    """:meth:`~rlhf_dist.recipes.history.History.state_dict`."""

    @classmethod
    def of(cls, saved: Checkpoint | None) -> TrainState:
        """That of a checkpoint; without one that of the beginning."""
        return cls(**saved.manifest["state"]) if saved else cls()


class Saver:
    """Checkpoints of one stage, in the run folder or at ``run.checkpoint_dir``.

    consumes: steps that were trained; waits for: the checkpoint before, when the next is due; unblocks: nobody.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        elsewhere = run.cfg.run.checkpoint_dir
        self.root = f"{elsewhere}/{run.stage.parent}".removesuffix("/.") if elsewhere else run.beside("checkpoints")
        self._thread: threading.Thread | None = None
        self._figures: dict[str, float] = {}

    def newest(self) -> Checkpoint | None:
        """Where the run goes on; says which checkpoints it cannot go on from, and why."""
        found, faults = checkpoint.newest(self.root)
        for fault in faults:
            self.run.terminal.warn(f"not used: {fault}")
        if found:
            self.run.terminal.info(f"going on after step {found.manifest['step']}, from {found.folder}")
        return found

    def save_if_due(
        self, state: TrainState, learners: list[LearnerGroup], score: float | None = None, keep: bool = False
    ) -> None:
        """Save every ``run.checkpoint_every`` steps, and when the run was told to stop.

        Args:
            score: of an evaluation after this step; the checkpoints with the highest are kept.
            keep: save in any case.

        Raises:
            Interrupted: the run was told to stop, and has saved.
        """
        every = self.run.cfg.run.checkpoint_every
        stop = self.run.stop_requested
        if every and (state.step % every == 0 or stop or keep):
            self.save(state, learners, score)
        if stop:
            self.run.steps_done = state.step
            self.wait()
            raise Interrupted(stop)

    def save(self, state: TrainState, learners: list[LearnerGroup], score: float | None) -> None:
        """Begin to save; the learners go on when they have copied their state to memory."""
        self.wait()
        self.run.write_summary()
        folder = self.folder(state.step)
        saves = [learner.save(folder, self.run.tokenizer_dir) for learner in learners]
        sharded = {g.role: {"ranks": g.spec.learner.ranks, "zero_stage": g.spec.learner.zero_stage} for g in learners}
        about = {"step": state.step, "score": score, "learners": sharded, "state": asdict(state)}
        copied, written = ([ref for save in saves for ref in save[i]] for i in (0, 1))
        arguments = (folder, about, copied, written)
        self._thread = threading.Thread(target=self._finish, args=arguments, name="saver", daemon=True)
        self._thread.start()

    def folder(self, step: int) -> str:
        """Of the checkpoint after ``step``; any URL."""
        return f"{self.root}/step_{step:06d}"

    def wait(self) -> None:
        """Block until the checkpoint that is being written is complete, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def figures(self) -> dict[str, float]:
        """Of the checkpoint that was completed since the last call."""
        figures, self._figures = self._figures, {}
        return figures

    def _finish(self, folder: str, about: dict[str, Any], copied: list[ObjectRef], written: list[ObjectRef]) -> None:
        """Runs beside the training: seal the checkpoint when all ranks have written their files."""
        started = time.monotonic()
        try:
            seconds = wait_for(copied, f"the learners, copying their state for {folder}")
            files = checkpoint.merged(wait_for(written, f"the learners, writing {folder}"))
            checkpoint.seal(folder, about, files)
            cfg = self.run.cfg
            best = max(cfg.run.keep_best, int(cfg.train.early_stop.metric is not None))
            checkpoint.prune(self.root, cfg.run.keep_last, best)
        except Exception as error:  # noqa: BLE001  (a checkpoint that fails must not end the run: the one before stays)
            self.run.terminal.warn(f"checkpoint of step {about['step']} was not written: {explained(error, folder)}")
            with contextlib.suppress(OSError):  # without a manifest it does not count, removed or not
                checkpoint.remove(folder)
            return
        self._figures = {"timing/save": max(seconds), "timing/write_checkpoint": time.monotonic() - started}
