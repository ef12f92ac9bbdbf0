"""The order in which prompts are trained: endless, seeded, with a cursor that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class PromptOrder:
    """Row numbers 0 .. ``n_rows`` - 1 without end: every one exactly once per epoch.

    With ``shuffle`` each epoch has a permutation of its own, which depends on ``seed`` and the epoch alone: two
    orders with equal arguments agree, and a restored one goes on as if it had never stopped.

    Example: PromptOrder(3, seed=0, shuffle=False).take(5) == [0, 1, 2, 0, 1]
    """

    def __init__(self, n_rows: int, seed: int, shuffle: bool = True) -> None:
        if n_rows < 1:
            raise ValueError(f"there is nothing to order: n_rows={n_rows}; the data have no usable prompt")
        self.n_rows, self.seed, self.shuffle = n_rows, seed, shuffle
        self._taken = 0
        self._permuted_epoch, self._permutation = -1, np.arange(n_rows)

    @property
    def epoch(self) -> int:
        """Epoch of the next row, from 0."""
        return self._taken // self.n_rows

    @property
    def taken(self) -> int:
        """Rows taken so far, over all epochs."""
        return self._taken

    def take(self, k: int) -> list[int]:
        """The next ``k`` row numbers; they may span epochs."""
        rows: list[int] = []
        while len(rows) < k:
            start = self._taken % self.n_rows
            part = self._order(self.epoch)[start : start + k - len(rows)]
            rows += part.tolist()
            self._taken += len(part)
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        if self.shuffle and epoch != self._permuted_epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            self._permuted_epoch = epoch
        return self._permutation

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the order depends on; JSON can hold it."""
        return {"n_rows": self.n_rows, "seed": self.seed, "shuffle": self.shuffle, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: the state is of another data set or seed, whose order is a different one.
        """
        for key, own in (("n_rows", self.n_rows), ("seed", self.seed), ("shuffle", self.shuffle)):
            if state[key] != own:
                raise ValueError(
                    f"the checkpoint's prompt order has {key}={state[key]}, this run has {own}; "
                    "resume with the data and the seed that the run was started with"
                )
        self._taken = int(state["taken"])


def minibatches(n_rows: int, batch_size: int, steps: int, seed: Sequence[int]) -> list[np.ndarray]:
    """Row numbers of ``steps`` optimizer steps: permutations of all rows, cut into whole batches.

    Where ``batch_size`` does not divide ``n_rows``, each pass leaves out a random rest.
    """
    rng = np.random.default_rng(list(seed))
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        order = rng.permutation(n_rows)
        batches += [order[i : i + batch_size] for i in range(0, n_rows - batch_size + 1, batch_size)]
    return batches[:steps]


def some_rows(n_rows: int, limit: int, seed: int) -> np.ndarray:
    """At most ``limit`` of ``n_rows`` row numbers: a random sample, in ascending order."""
    return np.sort(np.random.default_rng([seed, n_rows]).permutation(n_rows)[:limit])
