"""After an optimizer step that failed, and in a replay: loss and gradient without a step, row by row or together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from rlhf_dist.data.batching import Batch
from rlhf_dist.data.nonfinite import RowFigures
from rlhf_dist.engines.objectives import Objective, Totals

if TYPE_CHECKING:
    from rlhf_dist.engines.deepspeed import LearnerEngine


def each_row(
    engine: LearnerEngine, objective: Objective, table: pa.Table, rows: np.ndarray, pad_id: int, packing: bool
) -> list[RowFigures]:
    """Figures of each of ``rows`` alone, in their order. Collective: the ranks share the rows, all return all.

    Every rank makes equally many passes, the last ones with dummies, because forward and backward are collective.
    """
    totals = objective.totals(table, rows)
    found: list[RowFigures] = []
    with engine.gradient_norms() as norm:
        for first in range(0, len(rows), engine.world):
            own = rows[first + engine.rank : first + engine.rank + 1].tolist()  # empty where there is none left
            batch = objective.collate(table, own, pad_id, packing).to(engine.device)
            loss, _ = objective.loss(engine, batch, totals)
            engine.backward(loss)
            figures = float(loss), norm()
            found += [RowFigures(row, *figures) for row in own]
    ranks = engine.gather(found)
    return [ranks[i % engine.world][i // engine.world] for i in range(len(rows))]


def together(
    engine: LearnerEngine, objective: Objective, batches: Iterable[Batch], totals: Totals
) -> tuple[float, float]:
    """Loss of a whole minibatch on one rank, and a bound of its gradient's norm: the sum of those of ``batches``."""
    losses, norms = 0.0, 0.0
    with engine.gradient_norms() as norm:
        for batch in batches:
            loss, _ = objective.loss(engine, batch, totals)
            engine.backward(loss)
            losses += float(loss)
            norms += norm()
    return losses, norms
