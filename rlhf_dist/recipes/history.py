"""What the evaluations of a PPO run add up to: over-optimisation, early stop, and which policy is the result.

With ``train.early_stop.metric`` the result is the policy of the best evaluation, and PPO ends when ``patience`` of them
were not better. Every new best is a checkpoint with this history in its state: weights and what is known of them are on
disk together or not at all, and a run that goes on decides as one without a break.
"""

from __future__ import annotations

import math
import shutil
from typing import Any

from rlhf_dist import checkpoint
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.data.trained import TrainedLedger
from rlhf_dist.evaluation import overoptimization
from rlhf_dist.recipes.evaluate import Evaluator
from rlhf_dist.recipes.saving import Saver
from rlhf_dist.run import Run


class History:
    """The evaluations of one PPO run so far.

    Args:
        before: of the initial policy, from which over-optimisation is counted; it is never the result.
        state: :meth:`state_dict` of the run that this one goes on from.
    """

    def __init__(self, run: Run, before: dict[str, Any], state: dict[str, Any]) -> None:
        self.run = run
        self.metric = run.cfg.train.early_stop.metric
        self._place = "" if run.stage.label == "ppo" else f"{run.stage.label}."
        self.rows: list[overoptimization.Row] = state.get("rows") or [overoptimization.row(0, before)]
        self.result: dict[str, Any] = state.get("result") or {}
        """The evaluation whose policy is the result as things stand, and its ``step``; empty before the first."""

    def state_dict(self) -> dict[str, Any]:
        """JSON can hold it."""
        return {"rows": self.rows, "result": self.result}

    def add(self, step: int, evaluation: dict[str, Any]) -> float | None:
        """Enter the evaluation after ``step``; returns its score: the figure of early stop, or else the reward."""
        self.rows.append(overoptimization.row(step, evaluation))
        self.run.summary.set(f"{self._place}overoptimization", overoptimization.summary(self.rows))
        if self.metric is None or not self.result or self._score(evaluation) > self._score(self.result):
            self.result = {"step": step, **evaluation}
        return evaluation["metrics"].get(self.metric or "reward")

    @property
    def best_step(self) -> int | None:
        """With early stop: the step whose policy is the best so far, and must be kept."""
        return self.result.get("step") if self.metric is not None else None

    @property
    def ended(self) -> bool:
        """Early stop's patience is over."""
        if self.best_step is None:
            return False
        return sum(row["step"] > self.best_step for row in self.rows) >= self.run.cfg.train.early_stop.patience

    def export(self, policy: LearnerGroup, saver: Saver, ledger: TrainedLedger, evaluate: Evaluator) -> dict[str, Any]:
        """Write the result to its folder; returns its evaluation, which is the summary's then.

        Args:
            policy: as it is after the last step, which was evaluated.
        """
        step, last = self.result["step"], int(self.rows[-1]["step"])
        if self.metric is not None:
            figures = {"best": self.result["metrics"].get(self.metric), "best_step": step, "last_step": last}
            self.run.summary.set(f"{self._place}early_stop", {"metric": self.metric, **figures, "result_step": step})
        if step < last:
            try:
                self._restore(saver.folder(step))
            except ValueError as error:  # that it could not be written was reported then
                self.run.terminal.warn(f"the result is the policy of the last step, not that of the best: {error}")
                self.run.summary.set(f"{self._place}early_stop.result_step", last)
            else:
                ledger.begin(step)  # the steps after it did not lead to the result
                self.run.terminal.info(f"{self.metric} was best after step {step} of {last}; that policy is the result")
                evaluate.report(self.run.stage.label, self.result)
                return self.result
        policy.export(self.run.result, self.run.tokenizer_dir)
        return self.result if step == last else evaluate(self.run.stage.label, last)

    def _score(self, evaluation: dict[str, Any]) -> float:
        """Below all others where no sample has one."""
        return evaluation["metrics"].get(self.metric, -math.inf)

    def _restore(self, folder: str) -> None:
        """Raises ValueError if the checkpoint is not there, or damaged."""
        checkpoint.verify(folder)
        with checkpoint.local_copy(f"{folder}/policy") as saved:
            shutil.copytree(saved, self.run.result, dirs_exist_ok=True)
