"""When a supervised stage stops, and which weights it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_dist.config import SFTConfig
from rlhf_dist.data.prompts import some_rows
from rlhf_dist.recipes.supervised import HeldOut, total_steps


class Scripted:
    """A learner whose held-out losses are known; its weights are the number of evaluations behind them."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self.weights = 0
        self.saved: dict[str, int] = {}

    def evaluate(self, table: Any, rows: np.ndarray) -> dict[str, float]:
        return {"loss": self.losses[self.weights]}

    def keep(self, folder: str) -> None:
        self.saved[folder] = self.weights

    def go_back(self, folder: str) -> None:
        self.weights = self.saved[folder]


def trained(losses: list[float], patience: int | None, folder: Path) -> tuple[Scripted, HeldOut, int]:
    """Evaluations after every tenth step until the losses or the patience are used up, and their number."""
    learner: Any = Scripted(losses)
    held_out = HeldOut(learner, None, np.arange(1), patience, str(folder))  # type: ignore[arg-type]
    for i in range(1, len(losses)):
        learner.weights = i
        held_out.evaluate(10 * i)
        if held_out.out_of_patience:
            break
    ran = learner.weights
    held_out.go_back()
    return learner, held_out, ran


@pytest.mark.parametrize(
    ("losses", "patience", "ran", "kept"),
    [
        ([9, 5, 4, 3], 1, 3, 3),
        ([9, 5, 4, 4.5, 3], 1, 3, 2),
        ([9, 5, 4, 4.5, 3, 3, 3, 1], 2, 6, 4),
        ([9, 5, float("nan"), 6, 1], 2, 3, 1),
        ([1, 5, 6], 3, 2, 1),
        ([9, 5, 6, 7], None, 3, 3),
    ],
    ids=["better", "worse", "equal is not better", "not a number", "the start is no result", "without patience"],
)
def test_the_best_weights_are_kept(
    losses: list[float], patience: int | None, ran: int, kept: int, tmp_path: Path
) -> None:
    learner, held_out, last = trained(losses, patience, tmp_path / "best")
    assert last == ran
    assert learner.weights == kept
    assert held_out.before == {"loss": losses[0]}
    assert (held_out.kept["loss"], held_out.kept_step) == (losses[kept], 10 * kept)
    assert bool(learner.saved) == (patience is not None), "nothing is written where nobody waits"


def test_held_out_rows_are_drawn_from_all() -> None:
    rows = some_rows(1000, 100, seed=3)
    assert len(set(rows.tolist())) == 100
    assert rows.tolist() == sorted(rows.tolist()) == some_rows(1000, 100, seed=3).tolist()
    assert rows[0] < 100
    assert rows[-1] >= 900
    assert some_rows(7, 100, seed=3).tolist() == list(range(7))


def test_steps_of_whole_batches() -> None:
    assert total_steps("sft", SFTConfig(batch_size=16, epochs=1.5), 100, 0) == 9
    assert total_steps("sft", SFTConfig(batch_size=16, epochs=0.01), 100, 0) == 1
    with pytest.raises(ValueError, match="only 15 rows for a batch of 16"):
        total_steps("sft", SFTConfig(batch_size=16), 15, 0)
    with pytest.raises(ValueError, match=r"sft\.patience=2 needs held-out rows, and there are none"):
        total_steps("sft", SFTConfig(eval_every=5, patience=2), 100, 0)
